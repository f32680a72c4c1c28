"""A picture of a store's statistics: norms by position, dimensions by size, mean beside standard deviation.

Up to FEW hooks get a row of panels each; more share four panels, one line or mark per hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import HookStats

if TYPE_CHECKING:
    from .reader import ActivationStore

FEW = 4
OUTLIERS_NAMED = 5
DIAGONAL = "standard deviation = mean"
OWN, BAND, MARK, INK, GRID = "#1667c9", "#9cc3f0", "#c8371e", "#1d2126", "#e3e6ea"
DARKEST, LIGHTEST = 0.05, 0.88  # of the colour map, so that the last lines can be seen on white


def draw_stats(store: ActivationStore, path: Path) -> None:
    """Write a PNG of the statistics of every hook, over the unflagged rows.

    Drawn on a white ground without a display; nothing of matplotlib's global state is changed.
    Raises StoreError when no unflagged row is committed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = store.all_stats()
    rows = next(iter(found.values())).count
    few = len(found) <= FEW
    size = (12, 3.3 * len(found) + 0.5) if few else (12, 5.2 + 0.19 * len(found))
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    model = store.meta.model.get("name") or store.meta.model.get("architecture") or "model"
    figure.suptitle(f"{model}: {rows:,} unflagged row{'s' * (rows != 1)}", fontsize=11, color=INK, x=0.01, ha="left")
    if few:
        panels = figure.subplots(len(found), 3, squeeze=False)
        for axes, (name, stats) in zip(panels, found.items(), strict=True):
            _norms(axes[0], stats, name)
            _dimensions(axes[1], stats)
            _means(axes[2], stats)
        named = [dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)) for ax in panels.flat]
        entries = {label: handle for found in named for label, handle in found.items()}
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower left", ncols=len(entries), fontsize=8, frameon=False
        )
    else:
        _overview(figure, found)
    figure.savefig(path, format="png", metadata={"Software": None})


def _norms(ax: Any, stats: HookStats, name: str) -> None:
    """Norm quantiles over the buckets of positions."""
    places = range(len(stats.norm_quantiles))
    quantiles = list(stats.norm_quantiles.values())

    def line(share: float) -> list[float]:
        return [found[share] for found in quantiles]

    ax.fill_between(places, line(0.01), line(0.99), color=BAND, alpha=0.35, linewidth=0, label="norm, 1-99 %")
    ax.fill_between(places, line(0.05), line(0.95), color=BAND, alpha=0.9, linewidth=0, label="5-95 %")
    ax.plot(places, line(0.5), color=OWN, linewidth=1.6, marker="o", markersize=3.5, label="median")
    ax.axhline(stats.mean_norm, color=INK, linewidth=0.8, linestyle=":", label="mean, all positions")
    ax.set_xticks(places, list(stats.norm_quantiles))
    ax.margins(x=0.06)
    _titled(ax, name, "position in the window", "norm")
    _zoomed(ax, line(0.01), line(0.99))


def _dimensions(ax: Any, stats: HookStats) -> None:
    """Root mean square of each dimension, largest first; outliers marked and named."""
    order = np.argsort(-stats.rms_D, kind="stable")
    rms_D = stats.rms_D[order]
    rank_D = np.arange(1, len(order) + 1)
    positive = rms_D > 0
    ax.plot(rank_D[positive], rms_D[positive], color=OWN, linewidth=1.6)
    _logarithmic(ax, "x")
    _logarithmic(ax, "y")
    outliers = np.isin(order, stats.outlier_dims)
    ax.plot(rank_D[outliers], rms_D[outliers], "o", color=MARK, markersize=4)
    for rank in np.flatnonzero(outliers)[:OUTLIERS_NAMED].tolist():
        place = (rank_D[rank], rms_D[rank])
        ax.annotate(f"{order[rank]}", place, (5, 2), textcoords="offset points", fontsize=7.5, color=MARK)
    count = len(stats.outlier_dims)
    named = f"{count} outlier dimension{'s' * (count != 1)}" if count else "no outlier dimension"
    _titled(ax, f"dimensions by size; {named}", "rank", "root mean square")


def _means(ax: Any, stats: HookStats) -> None:
    """Mean against standard deviation, a dot per dimension; below the diagonal the mean outweighs it."""
    mean_D, std_D = np.abs(stats.mean_D), np.sqrt(stats.var_D)
    shown = (mean_D > 0) & (std_D > 0)
    outliers = np.isin(np.arange(len(mean_D)), stats.outlier_dims)
    for chosen, color, size in ((shown & ~outliers, OWN, 5), (shown & outliers, MARK, 16)):
        ax.scatter(mean_D[chosen], std_D[chosen], s=size, color=color, linewidths=0, alpha=0.7)
    _logarithmic(ax, "x")
    _logarithmic(ax, "y")
    if shown.any():
        low, high = max(mean_D[shown].min(), std_D[shown].min()), min(mean_D[shown].max(), std_D[shown].max())
        if low < high:
            ax.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", label=DIAGONAL)
    else:
        ax.text(0.5, 0.5, "no dimension has a mean and a spread", transform=ax.transAxes, ha="center", color=INK)
        ax.set(xticks=[], yticks=[])
    _titled(ax, "mean and spread of each dimension", "|mean|", "standard deviation")


def _overview(figure: Any, found: dict[str, HookStats]) -> None:
    """Four panels that all hooks share."""
    axes = figure.subplots(2, 2, height_ratios=(1, 0.6 + 0.06 * len(found)))
    colours = _colours(len(found))
    for (name, stats), colour in zip(found.items(), colours, strict=True):
        medians = [quantiles[0.5] for quantiles in stats.norm_quantiles.values()]
        axes[0, 0].plot(list(stats.norm_quantiles), medians, color=colour, linewidth=1.2, label=name)
        sorted_D = np.sort(stats.rms_D[stats.rms_D > 0])[::-1]
        axes[0, 1].plot(np.arange(1, len(sorted_D) + 1), sorted_D, color=colour, linewidth=1.0)
    if all(min(quantiles[0.5] for quantiles in s.norm_quantiles.values()) > 0 for s in found.values()):
        _logarithmic(axes[0, 0], "y")
    _logarithmic(axes[0, 1], "x")
    _logarithmic(axes[0, 1], "y")
    _titled(axes[0, 0], "median norm; dark: the first hook, light: the last", "position in the window", "norm")
    _titled(axes[0, 1], "dimensions by size", "rank", "root mean square")
    _norms_by_hook(axes[1, 0], found, colours)
    _spread_by_hook(axes[1, 1], found)


def _norms_by_hook(ax: Any, found: dict[str, HookStats], colours: Sequence[Any]) -> None:
    places = range(len(found))
    for place, stats, colour in zip(places, found.values(), colours, strict=True):
        quantiles = stats.norm_quantiles_all
        ax.plot([quantiles[0.01], quantiles[0.99]], [place, place], color=colour, linewidth=1)
        ax.plot([quantiles[0.05], quantiles[0.95]], [place, place], color=colour, linewidth=4, solid_capstyle="butt")
        ax.plot(quantiles[0.5], place, "o", color="white", markeredgecolor=INK, markersize=4)
    if all(stats.norm_quantiles_all[0.01] > 0 for stats in found.values()):
        _logarithmic(ax, "x")
    _hook_rows(ax, list(found))
    _titled(ax, "norm: 1-99 %, 5-95 %, median", "norm", "")


def _spread_by_hook(ax: Any, found: dict[str, HookStats]) -> None:
    places = list(range(len(found)))
    ax.plot(
        [float(np.linalg.norm(s.mean_D)) for s in found.values()],
        places,
        "D",
        color=OWN,
        markersize=4.5,
        label="norm of the mean",
    )
    ax.plot([s.variance**0.5 for s in found.values()], places, "o", color=INK, markersize=4, label="standard deviation")
    ax.plot([s.max_abs for s in found.values()], places, "x", color=MARK, markersize=5, label="largest magnitude")
    _logarithmic(ax, "x")
    _hook_rows(ax, [f"{len(s.outlier_dims)}" for s in found.values()])
    _titled(ax, "mean and spread of the rows; at the left the number of outlier dimensions", "", "")
    ax.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](share) for share in np.linspace(DARKEST, LIGHTEST, count)]


def _hook_rows(ax: Any, labels: list[str]) -> None:
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=GRID, linewidth=0.8)


def _zoomed(ax: Any, low: Sequence[float], high: Sequence[float]) -> None:
    """From zero, or logarithmic where the norms span more than a factor of 20."""
    if min(low) > 0 and max(high) > 20 * min(low):
        _logarithmic(ax, "y")
    else:
        ax.set_ylim(0, 1.08 * max(high) or 1)


def _logarithmic(ax: Any, which: str) -> None:
    """A logarithmic axis over what is drawn; ticks at 1, 2, 5 where it spans less than two decades, more if less.

    Linear where nothing above 0 is drawn: the spread of a single row.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if not np.isfinite(getattr(ax.dataLim, f"minpos{which}")):
        return
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    subs = (1, 1.5, *range(2, 10)) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _titled(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    ax.set_xlabel(x, fontsize=8.5)
    ax.set_ylabel(y, fontsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=INK)
    ax.set_axisbelow(True)
