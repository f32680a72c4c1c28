"""The picture of `bench.grid`: FVU and CE recovered over L0, a curve for each trainer and width."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.grid_runs import Point

COLOURS = ("#c8371e", "#2a6f97", "#5a8f3c", "#8a5aa8", "#555555")
LINES = ("-", "--", ":", "-.")


def draw(found: dict[str, dict[Point, dict[str, Any]]], path: Path) -> None:
    """Write the PNG. `found`: numbers of each trainer at each point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _curves(left, found, "fvu", "FVU on held-out text, lower is better")
    _curves(right, found, "ce_recovered", "CE recovered on held-out text, higher is better")
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


def _curves(ax: Any, found: dict[str, dict[Point, dict[str, Any]]], key: str, title: str) -> None:
    widths = sorted({point.num_latents for at in found.values() for point in at})
    for colour, (name, at) in zip(COLOURS, found.items(), strict=False):
        for style, width in zip(LINES, widths, strict=False):
            own = sorted(
                (numbers["l0"], numbers[key])
                for point, numbers in at.items()
                if point.num_latents == width and point.variant == "topk"
            )
            if own:
                ax.plot(
                    *zip(*own, strict=True), style, color=colour, marker="o", ms=4, lw=1.3, label=f"{name}, n={width}"
                )
            single = [(n["l0"], n[key]) for p, n in at.items() if p.num_latents == width and p.variant != "topk"]
            if single:
                ax.scatter(*zip(*single, strict=True), color=colour, marker="x", s=40)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("L0 (crosses: BatchTopK)", fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_xticks([16, 32, 64], ["16", "32", "64"])
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(color="#e5e5e5", lw=0.6)
