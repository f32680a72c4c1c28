"""A picture of a training run: FVU, L0, dead latents, learning rate and speed over tokens, one line an SAE."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .settings import sae_folder

PANELS = (
    ("fvu", "FVU", "log"),
    ("l0", "L0", "linear"),
    ("dead", "dead latents", "linear"),
    ("lr", "learning rate", "linear"),
    ("tokens_per_s", "tokens/s", "linear"),
    ("wait_share", "share of the time spent waiting for rows", "linear"),
)
SHOWN = ("tokens", *(key for key, _, _ in PANELS))
INK, GRID = "#1d2126", "#e3e6ea"
FEW = 10  # lines that the legend still names
FEW_ROWS = 30  # that are marked one by one: a line through one or two says nothing
LOG_FROM = 3.0  # ratio of the largest to the least value from which on a logarithmic axis has ticks to read


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that have a number for every panel; a line that a kill cut short has not."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(type(row.get(key)) in (int, float) for key in SHOWN):
            rows.append(row)
    return rows


def draw_training(run: Path, names: Sequence[str], path: Path, searched: dict[str, dict[str, Any]]) -> None:
    """Write the PNG. `names`: the SAEs of the run folder; `searched`: what `lr_search` found, drawn where there is any.

    Drawn on a white ground without a display; nothing of matplotlib's global state is changed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    rows = {name: read_rows(sae_folder(run, name) / "metrics.jsonl") for name in names}
    count = len(PANELS) + bool(searched)
    figure = Figure(figsize=(13, 3.1 * -(-count // 3)), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(-(-count // 3), 3).flat)
    colours = {name: colormaps["viridis"](0.85 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    for ax, (key, title, scale) in zip(panels, PANELS, strict=False):
        for name, found in rows.items():
            tokens = [row["tokens"] for row in found]
            ax.plot(
                tokens, [row[key] for row in found], color=colours[name], linewidth=1.4, label=name, clip_on=False, zorder=3,
                marker="o" if len(found) <= FEW_ROWS else None, markersize=3.5,
            )  # fmt: skip
        titled(ax, title, "tokens")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        values = [row[key] for found in rows.values() for row in found if math.isfinite(row[key])]
        if scale == "linear" or max(values, default=1.0) < LOG_FROM * min(values, default=1.0):
            ax.set_ylim(0, 1.05 * max(values, default=0) or 1.0)
        else:
            ax.set_yscale(scale)
            far = max(values) > 10 * min(values)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if far else (1, 1.5, 2, 3, 5, 7)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
    if searched:
        draw_search(panels[len(PANELS)], searched, colours)
    for ax in panels[count:]:
        ax.set_axis_off()
    if 1 < len(names) <= FEW:
        panels[0].legend(fontsize=7.5, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_search(ax: Any, searched: dict[str, dict[str, Any]], colours: dict[str, Any]) -> None:
    """FVU over the rates tried; the one taken is filled, one that diverged is missing."""
    for name, found in searched.items():
        points = sorted((float(lr), fvu) for lr, fvu in found["fvu"].items() if fvu is not None)
        colour = colours.get(name, INK)
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker="o", markerfacecolor="white")
        best = found["best"]
        ax.plot([best], [dict(points)[best]], color=colour, marker="o", markersize=8)
    ax.set_xscale("log")
    ax.minorticks_off()
    rates = sorted({float(lr) for found in searched.values() for lr in found["fvu"]})
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    tokens = next(iter(searched.values()))["tokens"]
    titled(ax, f"FVU of the learning rates after {tokens:,} tokens", "learning rate")


def titled(ax: Any, title: str, below: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel(below, fontsize=8, color=INK)
    ax.tick_params(labelsize=7.5, colors=INK)
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
