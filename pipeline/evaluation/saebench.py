"""SAEBench's names beside ours: `eval_result_metrics` of its core evaluation and its sparse probing (sae-bench 0.6.0),
filled from our numbers.

docs/conventions.md says which of its numbers are defined otherwise. What we do not compute is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .measure import SAE, ZERO


def core_metrics(result: Mapping[str, Any], columns: Mapping[str, np.ndarray], d_in: int) -> dict[str, dict[str, Any]]:
    """The nested names of SAEBench core.

    `result` is that of `evaluate`, with `dictionary` in it; `columns` are those of LatentStatistics; `mse` there is
    summed over the `d_in` dimensions.
    """
    zero_kl = result["baselines"][ZERO]["kl"]
    geometry = result.get("dictionary", {})
    return {
        "model_behavior_preservation": {
            "kl_div_score": (zero_kl - result["kl"]) / zero_kl if zero_kl and result["kl"] is not None else None,
            "kl_div_with_ablation": zero_kl,
            "kl_div_with_sae": result["kl"],
        },
        "model_performance_preservation": {
            "ce_loss_score": result["ce_recovered"],
            "ce_loss_with_ablation": result[f"ce_{ZERO}"],
            "ce_loss_with_sae": result[f"ce_{SAE}"],
            "ce_loss_without_sae": result["ce_clean"],
        },
        "reconstruction_quality": {
            "explained_variance": 1 - result["fvu"],
            "explained_variance_legacy": None,
            "mse": result["mse"] * d_in,
            "cossim": result["cosine"],
        },
        "shrinkage": {
            key: result[key] for key in ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias")
        },
        "sparsity": {key: result[key] for key in ("l0", "l1")},
        "token_stats": {
            "total_tokens_eval_reconstruction": result["splice_rows"],
            "total_tokens_eval_sparsity_variance": result["rows"],
        },
        "misc_metrics": {
            **frequencies(columns["density"]),
            "average_max_encoder_cosine_sim": geometry.get("encoder_nearest", {}).get("mean"),
            "average_max_decoder_cosine_sim": geometry.get("decoder_nearest", {}).get("mean"),
            "frac_alive": 1 - result["dead_share"],
        },
    }


def sparse_probing_metrics(probing: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The names of SAEBench's sparse probing for the accuracies of `probing.probe`."""
    ks = probing["ks"]
    top = {kind: {k: probing[f"{kind}_top_{k}"]["accuracy"] for k in ks} for kind in ("raw", "sae")}
    return {
        "llm": {
            "llm_test_accuracy": probing["dense"]["accuracy"],
            **{f"llm_top_{k}_test_accuracy": accuracy for k, accuracy in top["raw"].items()},
        },
        "sae": {f"sae_top_{k}_test_accuracy": accuracy for k, accuracy in top["sae"].items()},
    }


def frequencies(density_F: np.ndarray) -> dict[str, float]:
    """Share of the latents that fire on more than 1 % and 10 % of the rows, and their share of all firings."""
    total = float(density_F.sum())
    found = {}
    for percent in (1, 10):
        above_F = density_F > percent / 100
        found[f"freq_over_{percent}_percent"] = float(above_F.mean())
        share = float(density_F[above_F].sum()) / total if total > 0 else 0.0
        found[f"normalized_freq_over_{percent}_percent"] = share
    return found
