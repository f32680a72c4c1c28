"""From a top-k choice to thresholds: TopK, BatchTopK or GroupMax to JumpReLU. numpy only.

    a = TopK(ReLU(pre))   becomes   a = pre where pre > theta, else 0

With thresholds a row is encoded by comparing alone, latents do not compete, and any number may fire.

Shape letters: N rows, F latents, K slots, P positive pre-activations of all rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import ConfigError, ShapeError
from .runtime import encode
from .weights import SAEWeights

MODES = ("global", "latent")
ONE = 1e-5  # thresholds that differ by less, relative to the largest, are one: free rows are folded with rounding


def to_thresholds(w: SAEWeights, x_ND: np.ndarray, mode: str = "global") -> SAEWeights:
    """The SAE with thresholds fitted on the rows x_ND, variant "threshold", `freq_F` as they fire on these rows.

    It is another SAE, with another `id` in `training`, which says under `thresholds` what it was made from and how.

    The choice that is kept is that of the training: of TopK the k largest of a row, of GroupMax the largest of each
    group, of an SAE with one threshold for all latents (a trained BatchTopK or Matryoshka) the k N largest of all N
    rows, as they choose in training. There k is the number recorded with the SAE, whatever the old threshold let pass.

    "global": one theta for all latents, so that as many activations pass it on these rows as the choice kept: the mean
    L0 is the same up to ties. "latent": theta_f so that latent f passes it on as many of these rows as it was chosen
    on; its rate is the same. A latent that was never chosen gets the largest pre-activation it had, so it stays
    silent on these rows (or 0 if that was below).

    Raises:
        ConfigError: an unknown mode, an SAE whose latents have a threshold each.
        ShapeError: no rows.
    """
    if mode not in MODES:
        raise ConfigError(f"thresholds must be one of {', '.join(MODES)}, got {mode!r}")
    if not is_one(w.threshold_F):
        raise ConfigError(
            "this SAE has a threshold for each latent already (JumpReLU, gated); thresholds are fitted for a top-k choice "
            "or one threshold for all latents: leave convert.thresholds at none"
        )
    if not len(x_ND):
        raise ShapeError("thresholds are fitted on rows, got none")
    latent_P, value_P = _positive(w, x_ND)
    if w.variant == "threshold":
        theta = _global(value_P, min(w.k * len(x_ND), len(value_P)))
        count_F = np.bincount(latent_P[value_P > theta], minlength=w.num_latents)
    else:
        idx_NK, vals_NK = encode(w, x_ND)
        count_F = np.bincount(idx_NK[vals_NK > 0], minlength=w.num_latents)
        theta = _global(value_P, int(count_F.sum()))
    theta_F = np.full(w.num_latents, theta) if mode == "global" else _per_latent(latent_P, value_P, count_F)
    found = replace(w, variant="threshold", threshold_F=theta_F)
    return replace(found, freq_F=_rate(found, x_ND), training=_described(found, mode, len(x_ND)))


def is_one(threshold_F: np.ndarray | None) -> bool:
    """Whether no threshold is there, or the same for all latents."""
    return threshold_F is None or float(np.ptp(threshold_F)) <= ONE * float(threshold_F.max())


def _rate(w: SAEWeights, x_ND: np.ndarray) -> np.ndarray:
    """Share of the rows on which each latent fires, (F,)."""
    idx_NK, vals_NK = encode(w, x_ND)
    return np.bincount(idx_NK[vals_NK > 0], minlength=w.num_latents) / len(x_ND)


def _described(w: SAEWeights, mode: str, rows: int) -> dict[str, Any]:
    """`training` with `thresholds` = {mode, rows, of}, and where there is an id that of the SAE with these thresholds."""
    made = {"mode": mode, "rows": rows}
    if not (source := w.trained_id):
        return w.training | {"thresholds": made}
    assert w.threshold_F is not None
    digest = hashlib.sha256(source.encode() + w.threshold_F.astype("<f4").tobytes()).hexdigest()
    return w.training | {"id": digest[:16], "thresholds": made | {"of": source}}


def _positive(w: SAEWeights, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """latent_P and value_P of every positive pre-activation, largest first within a row."""
    every = replace(w, variant="threshold", threshold_F=np.zeros(w.num_latents))
    idx_NK, vals_NK = encode(every, x_ND)
    return idx_NK[vals_NK > 0], vals_NK[vals_NK > 0]


def _global(value_P: np.ndarray, count: int) -> float:
    """Between the `count`-th largest activation of all rows and the next."""
    positive = np.sort(value_P)[::-1]
    if not count:
        return float(positive.max(initial=0.0))
    below = positive[count] if count < len(positive) else np.float32(0)
    return _between(float(positive[count - 1]), float(below))


def _per_latent(latent_P: np.ndarray, value_P: np.ndarray, count_F: np.ndarray) -> np.ndarray:
    """The same within each latent: theta_F with count_F activations above."""
    order_P = np.lexsort((-value_P, latent_P))
    value_P = value_P[order_P]
    start_F = np.searchsorted(latent_P[order_P], np.arange(len(count_F) + 1))
    theta_F = np.zeros(len(count_F), np.float32)
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
