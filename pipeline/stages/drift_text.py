"""A drift report as people read it: the table of forms on files, the line of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from sae.weights import SAEWeights

from ..terminal import shown
from .inputs import counted, number


def describe(weights: SAEWeights) -> str:
    k = f", k {weights.k}" if weights.variant != "threshold" else ""
    return f"{counted(weights.num_latents, 'latent')} of width {weights.d_in}{k}"


def table_of(result: dict[str, Any]) -> Table:
    made = Table(title=f"{result['sae']} at {result['hook']}", title_justify="left")
    for title in (
        "model", "SAE", "MB", "FVU", "L0", "overlap", "CE recovered", "95 %", "delta CE (nats)", "95 %", "KL (nats)",
    ):  # fmt: skip
        made.add_column(title, justify="left" if title in ("model", "SAE") else "right")
    for model in result["models"]:
        moved = f"activations moved by {number(model['activation_fvu'])} FVU"
        made.add_section()
        made.add_row(
            f"[bold]{escape(shown(model['name']))}[/bold]",
            moved,
            f"{model['bytes'] / 1e6:.1f}",
            *[""] * 3,
            f"CE {number(model['ce_clean'])}",
        )
        for form in model["forms"]:
            made.add_row(
                "", form["types"], f"{form['matrix_bytes'] / 1e6:.1f}", number(form["fvu"]), f"{form['l0']:.1f}",
                number(form["top_k_overlap"]), number(form["ce_recovered"]), half(form.get("ce_recovered_ci95")),
                number(form["delta_ce_nats"]), half(form["delta_ce_ci95"]), number(form["kl"]),
            )  # fmt: skip
    return made


def half(interval: Sequence[float | None] | None) -> str:
    """Half the width of a 95 % interval."""
    low, high = interval or (None, None)
    return "n/a" if low is None or high is None else f"+-{(high - low) / 2:.4f}"


def numbers(result: dict[str, Any]) -> str:
    """As it is, and the worst of all."""
    cells = [(f"{form['types']} on {model['name']}", form) for model in result["models"] for form in model["forms"]]

    def worst(key: str, sign: int) -> str:
        have = [(sign * form[key], name) for name, form in cells if form[key] is not None]
        return f"{sign * max(have)[0]:.4f} ({max(have)[1]})" if have else "n/a"

    name, first = cells[0]
    return (
        f"{name}: FVU {number(first['fvu'])}, CE recovered {number(first['ce_recovered'])}; at worst FVU {worst('fvu', 1)}, "
        f"CE recovered {worst('ce_recovered', -1)}, top-k overlap {worst('top_k_overlap', -1)}"
    )
