"""What is reported of one run of the model on something else than its own activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sae.metrics import ReconstructionMetrics

from .baselines import Replacement
from .losses import Interval, clustered_mean, clustered_ratio
from .splice import CLEAN, SpliceResult

SAE, MEAN, ZERO = "sae", "mean", "zero"
RUN_KEYS = (
    "ce_recovered", "ce_recovered_ci95", "ce_recovered_mean", "ce_recovered_mean_ci95",
    "delta_ce_nats", "delta_ce_ci95", "kl", "kl_ci95",
)  # fmt: skip


def measured(run: Replacement, metrics: ReconstructionMetrics) -> Callable[[np.ndarray], np.ndarray]:
    """`run`, with every reconstruction counted in `metrics` on its way."""

    def reconstruct(x_ND: np.ndarray) -> np.ndarray:
        idx_NK, vals_NK = run.code(x_ND)
        x_hat_ND = run.decode(idx_NK, vals_NK, x_ND)
        metrics.update(x_ND, x_hat_ND, idx_NK, np.abs(vals_NK))  # PCA's coefficients have both signs
        return x_hat_ND

    return reconstruct


def run_losses(
    losses: SpliceResult, name: str, cluster_N: np.ndarray, *, zero: str = ZERO, mean: str = MEAN
) -> dict[str, Any]:
    """RUN_KEYS of the run `name`; `zero` and `mean` are the runs in which all it replaces is zero or its mean."""
    clean_N, run_N = losses.ce[CLEAN], losses.ce[name]
    delta = clustered_mean(run_N - clean_N, cluster_N)
    kl = clustered_mean(losses.kl[name], cluster_N)
    return {
        "ce_recovered": recovered(losses.ce[zero], run_N, clean_N),
        "ce_recovered_ci95": _recovered_bounds(losses.ce[zero], run_N, clean_N, cluster_N),
        "ce_recovered_mean": recovered(losses.ce[mean], run_N, clean_N),
        "ce_recovered_mean_ci95": _recovered_bounds(losses.ce[mean], run_N, clean_N, cluster_N),
        "delta_ce_nats": delta.mean,
        "delta_ce_ci95": _bounds(delta),
        "kl": kl.mean,
        "kl_ci95": _bounds(kl),
    }


def recovered(ablated_N: np.ndarray, run_N: np.ndarray, clean_N: np.ndarray) -> float:
    """(CE_ablated - CE_run) / (CE_ablated - CE_clean); NaN where the ablation costs nothing or even helps."""
    if not len(clean_N):
        return math.nan
    cost = float(ablated_N.mean() - clean_N.mean())
    return math.nan if cost <= 0 else float(ablated_N.mean() - run_N.mean()) / cost


def quality(metrics: ReconstructionMetrics) -> dict[str, Any]:
    """The reconstruction metrics shown beside each run."""
    if metrics.rows < 2:
        return {"fvu": math.nan, "l0": math.nan, "rows": metrics.rows}
    result = metrics.result()
    return {key: result[key] for key in ("fvu", "l0", "cosine", "l2_ratio", "rows")}


def _recovered_bounds(
    ablated_N: np.ndarray, run_N: np.ndarray, clean_N: np.ndarray, cluster_N: np.ndarray
) -> list[float]:
    """Of `recovered`; NaN where that is."""
    if math.isnan(recovered(ablated_N, run_N, clean_N)):
        return [math.nan, math.nan]
    return _bounds(clustered_ratio(ablated_N - run_N, ablated_N - clean_N, cluster_N))


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def json_safe(value: Any) -> Any:
    """numpy scalars and arrays as Python's; numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, np.ndarray):
        return json_safe(value.tolist())
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
