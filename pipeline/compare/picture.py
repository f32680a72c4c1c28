"""FVU and CE recovered over L0, with the line of those that no other SAE beats in both; a row of panels a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..training.picture import INK, titled
from .collect import Row, front, rows_of_group

FEW = 14  # points that are still named
LINE = "#c8371e"
MARKERS = "os^DvP*X"
# where a name may stand beside its point: (points right, points up, alignment), the first that is free
PLACES = [(6 * side, up, "left" if side > 0 else "right") for up in (4, -10, 15, -21, 26, -32, 37) for side in (1, -1)]


def draw_pareto(grouped: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Write the PNG. Held-out FVU where every SAE of a group has it, else that of the training: like beside like, over the L0
    on the same rows. No front through numbers of different held-out rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5 * len(grouped)), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(grouped), 2, squeeze=False)
    named = []
    for (name, rows), (left, right) in zip(grouped.items(), panels, strict=True):
        evaluated = all(row.held_out_fvu is not None for row in rows)
        fvu, what = ("held_out_fvu", "on held-out text") if evaluated else ("fvu", "at the end of training")
        mixed = len(rows_of_group(rows)) > 1
        start = f"{name}\n" if len(grouped) > 1 else ""
        for ax, key, title, lower_is_better in (
            (left, fvu, f"FVU {what}, lower is better", True),
            (right, "ce_recovered", "CE recovered on held-out text, higher is better", False),
        ):
            apart = mixed and key != "fvu"
            named.append((ax, plot(ax, rows, key, lower_is_better=lower_is_better, with_front=not apart)))
            titled(ax, f"{start}{title}{', not on the same rows' if apart else ''}", "L0 on these rows")
        if all(row.ce_recovered is None for row in rows):
            right.text(0.5, 0.5, "CE recovered of no SAE is known", transform=right.transAxes, ha="center", color=INK)
            right.set(xticks=[], yticks=[])
        left.legend(fontsize=7.5, frameon=False)
    figure.draw_without_rendering()  # the layout is made, so that it is known where text ends
    figure.set_layout_engine("none")
    for ax, points in named:
        if len(points) <= FEW:
            name_points(ax, points)
    figure.savefig(path, format="png", metadata={"Software": None})


def plot(
    ax: Any, rows: Sequence[Row], key: str, *, lower_is_better: bool, with_front: bool = True
) -> list[tuple[str, float, float]]:
    """Points, coloured by size of the dictionary and shaped by variant, and the front; returns (name, L0, value) of each."""
    from matplotlib import colormaps

    sign = 1 if lower_is_better else -1
    at = [row.l0 if key == "fvu" or row.held_out_l0 is None else row.held_out_l0 for row in rows]
    found = [
        (row, l0, value)
        for row, l0 in zip(rows, at, strict=True)
        if (value := getattr(row, key)) is not None and l0 is not None
    ]
    best = front([(l0, sign * value) for _, l0, value in found])
    if with_front and len(best) > 1:  # one point is no line
        front_line = [l0 for l0, _ in best], [sign * value for _, value in best]
        ax.plot(*front_line, color=LINE, linewidth=1, zorder=1, label="front")
    sizes = sorted({row.num_latents for row in rows})
    variants = sorted({row.variant for row in rows})
    for (i, size), (j, variant) in product(enumerate(sizes), enumerate(variants)):
        mine = [(l0, value) for row, l0, value in found if (row.num_latents, row.variant) == (size, variant)]
        if mine:
            colour, marker = colormaps["viridis"](0.85 * i / max(1, len(sizes) - 1)), MARKERS[j % len(MARKERS)]
            label = f"{size} latents" + (f", {variant}" if len(variants) > 1 else "")
            ax.scatter(*zip(*mine, strict=True), color=colour, marker=marker, s=34, zorder=2, label=label)
    ax.margins(x=0.18, y=0.12)  # room for the names
    return [(short(row, rows), l0, value) for row, l0, value in found]


def name_points(ax: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the names so that none covers another or a point or leaves the panel; one that finds no free place is left out."""
    from matplotlib.transforms import Bbox

    at = ax.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    panel = ax.bbox  # past its edge stand the ticks, or the next panel
    if legend := ax.get_legend():
        taken.append(legend.get_window_extent())
    fronts = [line.get_transform().transform_path(line.get_path()) for line in ax.lines]
    for name, x, y in points:
        # beside the point and off the front, else the nearest place: farther off it would seem to be another point's
        for crossing, (right, up, align) in [
            *((False, place) for place in PLACES[:4]),
            *((True, place) for place in PLACES),
        ]:
            text = ax.annotate(
                name, (x, y), fontsize=6.5, color=INK, xytext=(right, up), textcoords="offset points", ha=align
            )
            box = text.get_window_extent()
            inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
            crossed = any(front.intersects_bbox(box, filled=False) for front in fronts)
            if inside and (crossing or not crossed) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def short(row: Row, rows: Sequence[Row]) -> str:
    """The name without what all of them begin with."""
    names = [other.name for other in rows]
    common = next((i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), 0)
    start = max(row.name.rfind(mark, 0, common + 1) for mark in "-_/") + 1
    return row.name[start:]
