"""The SAE before any training: the baseline that a trained one must beat. numpy only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .runtime import decode, encode
from .weights import SAEWeights


def untrained_weights(
    d_in: int,
    num_latents: int,
    k: int,
    mean_D: np.ndarray,
    variance: float,
    hook: str,
    host: dict[str, Any],
    seed: int,
    *,
    sample_ND: np.ndarray | None = None,
) -> SAEWeights:
    """Random unit decoder rows, W_enc = c W_dec, b_enc = 0, b_dec = mean.

    The one number fitted is c, which scales all activations and moves no support: the c that minimises
    sum ||x - mean - c r||^2 over the sample, r the reconstruction at c = 1, is c = sum <x - mean, r> / sum ||r||^2.
    Without a sample, isotropic Gaussian rows around the mean stand in for it.
    """
    rng = np.random.default_rng(seed)
    rows_FD = rng.standard_normal((num_latents, d_in)).astype(np.float32)
    rows_FD /= np.linalg.norm(rows_FD, axis=1, keepdims=True)
    weights = SAEWeights(
        W_enc_FD=rows_FD,
        b_enc_F=np.zeros(num_latents),
        W_dec_FD=rows_FD,
        b_dec_D=mean_D,
        mean_D=mean_D,
        variance=variance,
        k=k,
        hook=hook,
        host=host,
    )
    gauss_ND = mean_D + rng.standard_normal((4096, d_in)) * np.sqrt(variance / d_in) if sample_ND is None else sample_ND
    sample_ND = np.asarray(gauss_ND, dtype=np.float32)
    r_ND = (decode(weights, *encode(weights, sample_ND)) - weights.b_dec_D).astype(np.float64)
    centred_ND = sample_ND - weights.b_dec_D
    norm = float((r_ND**2).sum())
    factor = float((centred_ND * r_ND).sum()) / norm if norm > 0 else 1.0
    return replace(weights, W_enc_FD=rows_FD * np.float32(factor), training={"untrained": True, "seed": seed})
