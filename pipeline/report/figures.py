"""The picture for the README: training curve and evaluation beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import TrainingCurve
from .svg import short

BARS = {
    "sae": "this SAE",
    "pca": "PCA,\nk components",
    "linear": "linear map,\nrank k",
    "affine": "linear map,\nany rank",
    "untrained": "SAE before\ntraining",
    "random_model": "SAE of a random-\nweights model",
}
FEW_ROWS = 30  # that are marked one by one: a line through one or two says nothing
OWN, OTHER, INK = "#1667c9", "#9aa7b5", "#1d2126"


def summary_figure(path: Path, training: TrainingCurve | None, evaluation: Mapping[str, Any], title: str) -> None:
    """Write a PNG or SVG (by the suffix of `path`): FVU over training, CE recovered and FVU beside the baselines.

    Drawn on a white ground without a display; nothing of matplotlib's global state is changed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    _training(axes[0], training)
    own = {**evaluation.get("same_rows", {}), "ce_recovered": evaluation.get("ce_recovered")}
    rows = {"sae": own, **evaluation.get("baselines", {})}
    _bars(axes[1], rows, "ce_recovered", "CE recovered (higher is better)", lambda v: f"{100 * v:.1f} %")
    _bars(axes[2], rows, "fvu", "FVU (lower is better)", lambda v: f"{v:.3f}")
    axes[2].set_yticklabels([])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _training(ax: Any, training: TrainingCurve | None) -> None:
    left_out = training.left_out if training is not None else ""
    ax.set_title(f"FVU while training{left_out}", fontsize=9.5, loc="left", color=INK)
    if training is not None and training.tokens:
        start, marker = training.start, "o" if len(training.tokens) <= FEW_ROWS else None
        ax.plot(training.tokens[start:], training.fvu[start:], color=OWN, linewidth=1.4, marker=marker, markersize=3.5)
    ax.set_xlabel("tokens trained on", fontsize=8.5)
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    _plain(ax)
    ax.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    ax.set_axisbelow(True)


def _bars(ax: Any, rows: Mapping[str, Mapping[str, Any]], key: str, title: str, label: Any) -> None:
    names = [name for name in BARS if name in rows]
    values = [_finite(rows[name].get(key)) for name in names]
    shown = [min(max(v, 0.0), 1.15) if v is not None else 0.0 for v in values]
    places = range(len(names))
    ax.barh(places, shown, color=[OWN if n == "sae" else OTHER for n in names], height=0.62)
    for place, value, width in zip(places, values, shown, strict=True):
        ax.text(width + 0.02, place, "–" if value is None else label(value), va="center", fontsize=8.5, color=INK)
    ax.set_yticks(places, [BARS[name] for name in names], fontsize=8.5)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.4)
    ax.set_xticks([])
    ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    _plain(ax)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5, colors=INK)


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
