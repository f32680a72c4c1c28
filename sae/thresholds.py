"""From a top-k choice to thresholds: TopK, BatchTopK or GroupMax to JumpReLU. numpy only.

    a = TopK(ReLU(pre))   becomes   a = pre where pre > theta, else 0

With thresholds a row is encoded by comparing alone, latents do not compete, and any number may fire.

Shape letters: N rows, F latents, K slots.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .errors import ConfigError, ShapeError
from .runtime import encode
from .weights import SAEWeights

MODES = ("global", "latent")


def to_thresholds(w: SAEWeights, x_ND: np.ndarray, mode: str = "global") -> SAEWeights:
    """The SAE with thresholds fitted on the rows x_ND, variant "threshold".

    "global": one theta for all latents, so that as many activations pass it on these rows as the choice kept: the mean
    L0 is the same up to ties. "latent": theta_f so that latent f passes it on as many of these rows as it was chosen
    on; its rate is the same. A latent that was never chosen gets the largest pre-activation it had, so it stays
    silent on these rows (or 0 if that was below).

    Raises:
        ConfigError: an unknown mode, an SAE that has thresholds already.
        ShapeError: no rows.
    """
    if mode not in MODES:
        raise ConfigError(f"thresholds must be one of {', '.join(MODES)}, got {mode!r}")
    if w.variant == "threshold":
        raise ConfigError("this SAE has thresholds already")
    if not len(x_ND):
        raise ShapeError("thresholds are fitted on rows, got none")
    idx_NK, vals_NK = encode(w, x_ND)
    count_F = np.bincount(idx_NK[vals_NK > 0], minlength=w.num_latents)
    theta_F = _global(w, x_ND, int(count_F.sum())) if mode == "global" else _per_latent(w, x_ND, count_F)
    return replace(w, variant="threshold", threshold_F=theta_F)


def _global(w: SAEWeights, x_ND: np.ndarray, count: int) -> np.ndarray:
    """Between the `count`-th largest activation of all rows and the next."""
    every = replace(w, variant="threshold", threshold_F=np.zeros(w.num_latents))
    _, vals_NK = encode(every, x_ND)
    positive = np.sort(vals_NK[vals_NK > 0])[::-1]
    below = positive[count] if count < len(positive) else np.float32(0)
    return np.full(
        w.num_latents, _between(float(positive[count - 1]), float(below)) if count else positive.max(initial=0.0)
    )


def _per_latent(w: SAEWeights, x_ND: np.ndarray, count_F: np.ndarray) -> np.ndarray:
    every = replace(w, variant="threshold", threshold_F=np.zeros(w.num_latents))
    idx_NK, vals_NK = encode(every, x_ND)
    latent_P, value_P = idx_NK[vals_NK > 0], vals_NK[vals_NK > 0]
    order_P = np.lexsort((-value_P, latent_P))
    value_P = value_P[order_P]
    start_F = np.searchsorted(latent_P[order_P], np.arange(w.num_latents + 1))
    theta_F = np.zeros(w.num_latents, np.float32)
    for latent, count in enumerate(count_F):
        own = value_P[start_F[latent] : start_F[latent + 1]]  # largest first
        if not len(own):
            continue
        below = own[count] if count < len(own) else np.float32(0)
        theta_F[latent] = _between(float(own[count - 1]), float(below)) if count else own[0]
    return theta_F


def _between(above: float, below: float) -> float:
    """A float32 in [below, above): their middle, or `below` where nothing lies between."""
    middle = np.float32((above + below) / 2)
    return float(middle) if middle < above else below
