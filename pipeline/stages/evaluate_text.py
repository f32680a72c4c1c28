"""An evaluation as people read it: the line of numbers, the baselines beside the SAE."""

from __future__ import annotations

from typing import Any

from .evaluate_extras import interval, numbers_of_extras
from .inputs import LABELS, number


def numbers(result: dict[str, Any]) -> str:
    """The line of numbers."""
    return "; ".join(
        [
            f"FVU {number(result['fvu'])}{at_each(result)}, L0 {result['l0']:.1f}, dead {result['dead_share']:.2%} and dense {result['dense_share']:.2%} of "
            f"{result['num_latents']} over {result['rows']:,} held-out rows ({result['flagged_share']:.2%} flagged, left out)",
            f"CE recovered {number(result['ce_recovered'])} {interval(result['ce_recovered_ci95'])}, delta CE "
            f"{number(result['delta_ce_nats'])} nats {interval(result['delta_ce_ci95'])}, "
            f"KL {number(result['kl'])} nats over {result['splice_rows']:,} rows (95 % by {result['clusters']} {result['cluster_kind']}s)",
            beside(result),
            *numbers_of_extras(result),
        ]
    )


def at_each(result: dict[str, Any]) -> str:
    """FVU at each hook point that is reconstructed, where that is another or several."""
    parts = ", ".join(f"{hook} {number(fvu)}" for hook, fvu in result.get("fvu_of", {}).items())
    return f" ({parts})" if parts else ""


def beside(result: dict[str, Any]) -> str:
    """The baselines, and the SAE on the same rows: those spliced, fewer than its own FVU is over. The last token of a window
    is reconstructed and has no next one: FVU is over a few rows more than CE."""
    own = {"sae": {**result["same_rows"], "ce_recovered": result["ce_recovered"]}}
    rows = [
        f"{LABELS.get(name, name)} FVU {number(row['fvu'])} CE {number(row['ce_recovered'])}"
        for name, row in (own | result["baselines"]).items()
    ]
    return f"on the {result['same_rows']['rows']:,} rows of these texts " + ", ".join(rows)
