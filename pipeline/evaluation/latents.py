"""The table of the latents (`latents.npz`) and what the evaluation says of the dictionary as a whole.

F latents, S latents whose neighbours are searched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae.dictionary import nearest, row_cosines
from sae.latent_statistics import LatentStatistics
from sae.weights import SAEWeights

COSINE_BINS = 100  # over [-1, 1]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = 0.9  # of a pair of directions that say nearly the same


def latent_columns(
    weights: SAEWeights, statistics: LatentStatistics, scatter: float, *, searched: int, seed: int
) -> dict[str, np.ndarray]:
    """One value per latent: what it does on the split, and where its directions lie.

    `density`, `mean_on`, `max`, `explained` as in sae/latent_statistics.py; `encoder_decoder_cosine`;
    `decoder_nearest` and `decoder_nearest_latent`, `encoder_nearest` and `encoder_nearest_latent`: the largest
    cosine with another row and whose it is, among all latents, for at most `searched` latents drawn by `seed`
    (0: all; NaN and -1 for the others); `encoder_bias`, `encoder_norm`, `decoder_norm`.
    """
    latents = weights.num_latents
    chosen_S = np.arange(latents)
    if 0 < searched < latents:
        chosen_S = np.sort(np.random.default_rng(seed).choice(latents, searched, replace=False))
    columns = statistics.result(scatter)
    columns["encoder_decoder_cosine"] = row_cosines(weights.W_enc_FD, weights.W_dec_FD)
    for name, W_FD in (("decoder", weights.W_dec_FD), ("encoder", weights.W_enc_FD)):
        cosine_F, latent_F = np.full(latents, np.nan, np.float32), np.full(latents, -1, np.int64)
        cosine_F[chosen_S], latent_F[chosen_S] = nearest(W_FD, chosen_S)
        columns |= {f"{name}_nearest": cosine_F, f"{name}_nearest_latent": latent_F}
    columns["encoder_bias"] = weights.b_enc_F
    columns["encoder_norm"] = np.linalg.norm(weights.W_enc_FD, axis=1)
    columns["decoder_norm"] = np.linalg.norm(weights.W_dec_FD, axis=1)
    return columns


def save_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write an .npz as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **columns)
    os.replace(partial, path)


def dictionary_summary(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The distributions of the cosines: nearest neighbours (of the latents searched), encoder against decoder."""
    return {
        "searched": int((columns["decoder_nearest_latent"] >= 0).sum()),
        **{name: distribution(columns[name]) for name in ("decoder_nearest", "encoder_nearest", "encoder_decoder_cosine")},
    }  # fmt: skip


def distribution(cosine_F: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles, share above 0.9 and counts over [-1, 1] of the values that are there."""
    known = cosine_F[np.isfinite(cosine_F)].astype(np.float64)
    if not known.size:
        return {"mean": None, "above_0.9": None, "quantiles": {}, "counts": [0] * COSINE_BINS}
    counts_B, _ = np.histogram(known.clip(-1, 1), bins=COSINE_BINS, range=(-1, 1))
    return {
        "mean": float(known.mean()),
        "above_0.9": float((known > NEAR).mean()),
        "quantiles": {str(q): float(np.quantile(known, q)) for q in QUANTILES},
        "counts": counts_B.tolist(),
    }
