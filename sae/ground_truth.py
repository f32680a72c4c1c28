"""How much of a known dictionary an SAE found: the toy benchmark of Sharkey et al. 2022 and Cunningham et al. 2023.

    best_M  = max over latents f of cos(W_dec[f], truth[m])         signed: a latent's activations are never negative
    mean_max_cosine = mean of best_M
    recovered_share = share of true features with best_M > 0.9

numpy only, in float64. Shape letters: F latents, D d_in, M true features.
"""

from __future__ import annotations

import numpy as np

from .errors import ConfigError, ShapeError

RECOVERED_COSINE = 0.9
BLOCK_FEATURES = 1024  # true features at a time: F x 1024 cosines are in memory


def best_cosines(W_dec_FD: np.ndarray, truth_MD: np.ndarray) -> np.ndarray:
    """best_M of every true feature, float64. Rows of norm zero count as cosine 0.

    Raises:
        ShapeError: not two matrices of equal width.
        ConfigError: no latents, no features, or values that are not finite.
    """
    if W_dec_FD.ndim != 2 or truth_MD.ndim != 2 or W_dec_FD.shape[1] != truth_MD.shape[1]:
        raise ShapeError(f"expected (F, D) and (M, D), got {W_dec_FD.shape} and {truth_MD.shape}")
    if not len(W_dec_FD) or not len(truth_MD):
        raise ConfigError("the dictionaries must not be empty")
    if not (np.isfinite(W_dec_FD).all() and np.isfinite(truth_MD).all()):
        raise ConfigError("the dictionaries must be finite")
    latents_DF = _unit_rows(W_dec_FD).T
    starts = range(0, len(truth_MD), BLOCK_FEATURES)
    blocks = (_unit_rows(truth_MD[start : start + BLOCK_FEATURES]) for start in starts)
    return np.concatenate([(block_MD @ latents_DF).max(axis=1) for block_MD in blocks])


def dictionary_recovery(
    W_dec_FD: np.ndarray, truth_MD: np.ndarray, threshold: float = RECOVERED_COSINE
) -> dict[str, float]:
    """`mean_max_cosine` and `recovered_share`, the share of features whose best cosine is above `threshold`."""
    best_M = best_cosines(W_dec_FD, truth_MD)
    return {"mean_max_cosine": float(best_M.mean()), "recovered_share": float((best_M > threshold).mean())}


def _unit_rows(rows_XD: np.ndarray) -> np.ndarray:
    rows_XD = rows_XD.astype(np.float64)
    norm_X1 = np.linalg.norm(rows_XD, axis=1, keepdims=True)
    return np.divide(rows_XD, norm_X1, out=np.zeros_like(rows_XD), where=norm_X1 > 0)
