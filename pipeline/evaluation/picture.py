"""One picture of an evaluation: how often latents fire, how the dictionary lies, what the model loses; more where measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .measure import MEAN, ZERO

OWN, SECOND, OTHER, MARK, INK, GRID = "#1667c9", "#e08a1e", "#9aa7b5", "#c8371e", "#1d2126", "#e3e6ea"
NAMES = {
    "pca": "PCA, k components",
    "linear": "linear map, rank k",
    "affine": "linear map, any rank",
    "untrained": "untrained SAE",
    "random_model": "SAE of a random model",
    MEAN: "mean ablation",
    ZERO: "zero ablation",
}
SHOWN = ("ce_recovered", "ce_recovered_ci95", "delta_ce_nats", "delta_ce_ci95", "kl")
DENSE_LOG10 = -1.0  # a tenth of the rows


def draw_evaluation(path: Path, result: Mapping[str, Any], title: str) -> None:
    """Write a PNG of an `evaluation.json`.

    Drawn on a white ground without a display; nothing of matplotlib's global state is changed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable[[Any], None]] = [
        lambda ax: _density(ax, result),
        lambda ax: _nearest(ax, result),
    ]
    if "encoder_decoder_cosine" in result["dictionary"]:
        panels.append(lambda ax: _encoder_decoder(ax, result))
    further: list[Callable[[Any], None]] = [lambda ax: _table(ax, result, len(further) > 1)]
    if result.get("stability"):
        further.append(lambda ax: _stability(ax, result["stability"]))
    if result.get("probing"):
        further.append(lambda ax: _probing(ax, result["probing"]))
    height = 3.2 if len(further) > 1 else 0.35 * len(result["baselines"]) + 1.3  # of the lower half
    figure = Figure(figsize=(12, 3.4 + height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    figures: Any = figure.subfigures(2, 1, height_ratios=(3.4, height))
    above, below = figures
    for ax, draw in zip(above.subplots(1, len(panels)), panels, strict=True):
        draw(ax)
    widths = (2.2, *(1.0 for _ in further[1:]))
    for ax, draw in zip(below.subplots(1, len(further), squeeze=False, width_ratios=widths)[0], further, strict=True):
        draw(ax)
    figure.savefig(path, format="png", metadata={"Software": None})


def _density(ax: Any, result: Mapping[str, Any]) -> None:
    histogram = result["density_histogram"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    colours = [SECOND if left >= DENSE_LOG10 - 1e-9 else OWN for left in edges[:-1]]
    ax.bar(edges[:-1], counts, width=[b - a for a, b in pairwise(edges)], align="edge",
           color=colours, edgecolor="white", linewidth=0.6)  # fmt: skip
    ax.axvline(DENSE_LOG10, color=INK, linewidth=0.8, linestyle=":")
    ax.text(0.02, 0.97, f"dead {result['dead_share']:.2%}\ndense {result['dense_share']:.2%}",
            transform=ax.transAxes, va="top", fontsize=8.5, color=INK)  # fmt: skip
    ax.set_xticks(range(math.ceil(edges[0]), 1))
    ax.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:.0f}}}$" if value else "1")
    ax.set_ylim(0, 1.2 * max([1, *counts]))
    titled_panel(ax, "how often the latents fire", "share of rows", "latents")


def _nearest(ax: Any, result: Mapping[str, Any]) -> None:
    found = result["dictionary"]
    for key, name, colour in (("decoder_nearest", "decoder", OWN), ("encoder_nearest", "encoder", SECOND)):
        mean = found[key]["mean"]
        label = name if mean is None else f"{name}, mean {mean:.2f}"
        _cosines(ax, found[key]["counts"], colour, label)
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    titled_panel(ax, "nearest other latent", f"cosine, of {found['searched']:,} latents", "latents")


def _encoder_decoder(ax: Any, result: Mapping[str, Any]) -> None:
    found = result["dictionary"]["encoder_decoder_cosine"]
    _cosines(ax, found["counts"], OWN, f"mean {found['mean']:.2f}")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    titled_panel(ax, "encoder against decoder, each latent", "cosine", "latents")


def _cosines(ax: Any, counts: Sequence[int], colour: str, label: str) -> None:
    """A histogram over [-1, 1], cut to where there is something."""
    width = 2 / len(counts)
    left = [-1 + i * width for i in range(len(counts))]
    ax.stairs(counts, [*left, 1.0], fill=True, color=colour, alpha=0.45)
    ax.stairs(counts, [*left, 1.0], color=colour, linewidth=1.3, label=label)
    shown = [x for x, count in zip(left, counts, strict=True) if count]
    low, _ = ax.get_xlim()
    ax.set_xlim(min([low if ax.lines or len(ax.patches) > 2 else 1.0, *shown, 0.0]) - width / 2, 1.0 + width / 2)
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.25 * max([1, *counts])))


def _table(ax: Any, result: Mapping[str, Any], tall: bool) -> None:
    """The SAE beside its baselines, on the same rows."""
    rows: list[tuple[str, Mapping[str, Any]]] = [
        ("this SAE", {**result.get("same_rows", {}), **{k: result.get(k) for k in SHOWN}})
    ]  # fmt: skip
    if joint := result.get("joint"):
        rows.append((f"{len(joint['hooks'])} SAEs together", joint))
    baselines = result.get("baselines", {})
    rows += [(name, baselines[key]) for key, name in NAMES.items() if key in baselines]
    heads = ("the model runs on", "FVU", "L0", "CE recovered", "ΔCE, nats", "95 %", "KL, nats")
    places = (0.0, 0.35, 0.43, 0.62, 0.75, 0.88, 1.0)
    ax.axis("off")
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 9.2)
    reconstructed = result.get("same_rows", {}).get("rows")
    of_fvu = f"; FVU and L0 over {reconstructed:,}" if reconstructed else ""
    title = f"what the model loses, {result['splice_rows']:,} held-out rows{of_fvu}"
    ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    spacing = min(1.05, 8.2 / len(rows)) if tall else 8.2 / len(rows)
    for line, cells in enumerate([heads, *(_cells(name, row) for name, row in rows)]):
        y = 8.6 - line * spacing
        weight = "bold" if line in (0, 1) else "normal"
        for place, text, align in zip(places, cells, ("left", *["right"] * 6), strict=True):
            ax.text(place, y, text, ha=align, va="center", fontsize=8.5, color=INK, fontweight=weight)
        if line == 0:
            ax.plot([0, 1], [y - spacing / 2, y - spacing / 2], color=OTHER, linewidth=0.8)


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    half, half_recovered = _half(row.get("delta_ce_ci95")), _half(row.get("ce_recovered_ci95"))
    recovered = row.get("ce_recovered")
    beside = "" if half_recovered is None else f" ± {half_recovered:.1%}"
    return (
        name,
        _number(row.get("fvu"), 3),
        _number(row.get("l0"), 1),
        "–" if recovered is None else f"{recovered:.1%}{beside}",
        _number(row.get("delta_ce_nats"), 4),
        "–" if half is None else f"± {half:.4f}",
        _number(row.get("kl"), 4),
    )


def _half(interval: Sequence[float | None] | None) -> float | None:
    """Half the width of an interval."""
    low, high = interval or (None, None)
    return None if low is None or high is None else (high - low) / 2


def _stability(ax: Any, stability: Mapping[str, Any]) -> None:
    keys = (("mean", "mean cosine"), ("above_0.7", "above 0.7"), ("above_0.9", "above 0.9"))
    for side, (name, colour) in enumerate((("decoder", OWN), ("encoder", SECOND))):
        values = [stability[name][key] for key, _ in keys]
        places = [i + 0.38 * side for i in range(len(keys))]
        ax.barh(places, values, height=0.36, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            ax.text(max(value, 0) + 0.02, place, f"{value:.2f}", va="center", fontsize=8, color=INK)
    ax.set_yticks([i + 0.19 for i in range(len(keys))], [name for _, name in keys])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2)  # room for the numbers
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=2)
    titled_panel(ax, f"matched with the other SAE: {stability['shared']:.0%} shared", "", "")


def _probing(ax: Any, probing: Mapping[str, Any]) -> None:
    ks = probing["ks"]
    for kind, name, colour in (("sae", "k latents", OWN), ("raw", "k raw dimensions", OTHER)):
        ax.plot(range(len(ks)), [probing[f"{kind}_top_{k}"]["accuracy"] for k in ks], "o-", color=colour, label=name)
    for key, name, style in (("dense", "dense probe", "--"), ("majority", "majority", ":")):
        ax.axhline(probing[key]["accuracy"], color=INK, linewidth=0.9, linestyle=style, label=name)
    ax.set_xticks(range(len(ks)), [str(k) for k in ks])
    ax.margins(x=0.15)
    ax.set_ylim(None, 1.02)
    ax.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2)
    titled_panel(ax, f"probing, {probing['test_texts']:,} texts held out", "k", "accuracy")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def titled_panel(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9.5, loc="left", color=INK)
    ax.set_xlabel(x, fontsize=8.5)
    ax.set_ylabel(y, fontsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
