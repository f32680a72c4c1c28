"""FVU and CE recovered over L0, with the line of those that no other SAE beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.picture import INK, titled
from .collect import Row, front

FEW = 14  # points that are still named
LINE = "#c8371e"


def draw_pareto(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG. Held-out FVU where every SAE has it, else that of the training, so that like is beside like."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes = sorted({row.num_latents for row in rows})
    colours = {size: colormaps["viridis"](0.85 * i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}
    evaluated = all(row.held_out_fvu is not None for row in rows)
    fvu = "held_out_fvu" if evaluated else "fvu"
    plot(left, rows, fvu, colours, lower_is_better=True)
    titled(left, f"FVU {'on held-out text' if evaluated else 'at the end of training'}, lower is better", "L0")
    plot(right, rows, "ce_recovered", colours, lower_is_better=False)
    titled(right, "CE recovered on held-out text, higher is better", "L0")
    if all(row.ce_recovered is None for row in rows):
        right.text(0.5, 0.5, "no SAE was evaluated", transform=right.transAxes, ha="center", color=INK)
    left.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot(ax: Any, rows: Sequence[Row], key: str, colours: dict[int, Any], *, lower_is_better: bool) -> None:
    """Points by size of the dictionary, and the front."""
    sign = 1 if lower_is_better else -1
    found = [(row, row.l0, value) for row in rows if (value := getattr(row, key)) is not None and row.l0 is not None]
    best = front([(l0, sign * value) for _, l0, value in found])
    ax.plot(
        [l0 for l0, _ in best], [sign * value for _, value in best], color=LINE, linewidth=1, zorder=1, label="front"
    )
    for size, colour in colours.items():
        mine = [(l0, value) for row, l0, value in found if row.num_latents == size]
        if mine:
            ax.scatter(*zip(*mine, strict=True), color=colour, s=34, zorder=2, label=f"{size} latents")
    ax.margins(x=0.18, y=0.08)  # room for the names
    if len(found) <= FEW:
        for row, l0, value in found:
            ax.annotate(
                short(row, rows), (l0, value), fontsize=6.5, color=INK, xytext=(4, 4), textcoords="offset points"
            )


def short(row: Row, rows: Sequence[Row]) -> str:
    """The name without what all of them begin with."""
    names = [other.name for other in rows]
    common = next((i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), 0)
    start = max(row.name.rfind(mark, 0, common + 1) for mark in "-_/") + 1
    return row.name[start:]
