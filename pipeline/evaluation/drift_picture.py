"""A drift report as one picture: four numbers over the SAE's types, a line for each file of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .picture import INK, titled_panel

PANELS = (
    ("fvu", "FVU, lower is better"),
    ("top_k_overlap", "top-k overlap with the SAE as it is on the reference"),
    ("ce_recovered", "CE recovered, higher is better"),
    ("kl", "KL in nats per token with 95 % intervals, lower is better"),
)
WHERE_L0_VARIES = (("l0", "L0"), ("delta_ce_nats", "ΔCE in nats per token with 95 % intervals"))
INTERVALS = {"ce_recovered": "ce_recovered_ci95", "kl": "kl_ci95", "delta_ce_nats": "delta_ce_ci95"}


def draw_drift(path: Path, result: Mapping[str, Any]) -> None:
    """Write a PNG of a `drift.json`. Points are set apart sideways so that equal ones stay visible."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = result["models"]
    types = [form["types"] for form in models[0]["forms"]]
    varies = len({round(form["l0"], 1) for model in models for form in model["forms"] if form["l0"] is not None}) > 1
    chosen = PANELS + WHERE_L0_VARIES * varies
    rows = len(chosen) // 2
    figure = Figure(
        figsize=(max(11.0, 1.2 * len(types)), 0.4 + 3.4 * rows), dpi=130, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{result['sae']} at {result['hook']}, {models[0]['forms'][0]['rows']:,} held-out rows; reference: {result['reference']}",
        fontsize=11, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    panels = figure.subplots(rows, 2)
    for ax, (key, title) in zip(panels.flat, chosen, strict=True):
        for i, model in enumerate(models):
            colour = colormaps["viridis"](0.82 * i / max(1, len(models) - 1))
            aside = (i - (len(models) - 1) / 2) * min(0.12, 0.6 / len(models))
            _line(ax, model, key, colour, aside)
        ax.set_xticks(range(len(types)), types)
        titled_panel(ax, title, "the SAE's matrices stored as", "")
        ax.margins(y=0.12)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(models)), fontsize=8.5, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


def _line(ax: Any, model: Mapping[str, Any], key: str, colour: Any, aside: float) -> None:
    have = [(i + aside, form) for i, form in enumerate(model["forms"]) if form[key] is not None]
    places, values = [place for place, _ in have], [form[key] for _, form in have]
    label = f"model in {model['name']}" + (f", CE {model['ce_clean']:.3f}" if model["ce_clean"] is not None else "")
    ax.plot(places, values, "o-", color=colour, markersize=4.5, linewidth=1.1, label=label)
    if key in INTERVALS:
        bounds = [(place, *form[INTERVALS[key]]) for place, form in have if None not in form[INTERVALS[key]]]
        for place, low, high in bounds:
            ax.plot([place, place], [low, high], color=colour, linewidth=1, alpha=0.6)
