"""The table of the latents (`latents.npz`) and what the evaluation says of the dictionary as a whole.

F latents, S latents whose neighbours are searched, I columns read, O columns reconstructed, P hook points of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae.dictionary import nearest, row_cosines
from sae.latent_statistics import LatentStatistics
from sae.weights import SAEWeights

COSINES = ("decoder_nearest", "encoder_nearest", "encoder_decoder_cosine")
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
    chosen_S = searched_latents(weights.num_latents, searched, seed)
    return (
        statistics.result(scatter)
        | encoder_against_decoder(weights.W_enc_FD, weights.W_dec_FD)
        | directions("decoder", weights.W_dec_FD, chosen_S)
        | directions("encoder", weights.W_enc_FD, chosen_S)
        | {"encoder_bias": weights.b_enc_F}
    )


def wired_columns(
    weights: SAEWeights,
    statistics: LatentStatistics,
    scatter_P: Sequence[float],
    scale_P: Sequence[float],
    *,
    searched: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """The same of an SAE over several hook points; `statistics.parts` are the columns of each that is reconstructed.

    Decoder rows, and the encoder rows of a crosscoder, are taken with the columns of hook point p divided (of the
    encoder multiplied) by s_p / max s, as they were trained; of one output as they are. `decoder_norm`,
    `decoder_nearest` and `decoder_nearest_latent` are of the whole row, with `_of` appended (F, P) of its part at
    each output; `explained_of` (F, P) is that of each output's own FVU. No `encoder_decoder_cosine` where the
    encoder reads another space.
    """
    chosen_S = searched_latents(weights.num_latents, searched, seed)
    relative_O = np.ones(weights.d_out, np.float32)
    for part, scale in zip(statistics.parts, scale_P, strict=True):
        relative_O[part] = scale / max(scale_P)
    W_dec_FO = weights.W_dec_FD / relative_O
    whole = directions("decoder", W_dec_FO, chosen_S)
    each = [whole]
    if len(statistics.parts) > 1:
        each = [directions("decoder", W_dec_FO[:, part], chosen_S) for part in statistics.parts]
    columns = statistics.result(scatter_P, scale_P) | whole
    columns |= {f"{name}_of": np.stack([found[name] for found in each], axis=1) for name in whole}
    columns["explained_of"] = statistics.explained_of(scatter_P)
    W_enc_FI = weights.W_enc_FD
    if not weights.hook_out:
        W_enc_FI = W_enc_FI * relative_O
        columns |= encoder_against_decoder(W_enc_FI, W_dec_FO)
    return columns | directions("encoder", W_enc_FI, chosen_S) | {"encoder_bias": weights.b_enc_F}


def searched_latents(latents: int, searched: int, seed: int) -> np.ndarray:
    """At most `searched` (0: all) of the latents, drawn by `seed`, in order: (S,)."""
    if not 0 < searched < latents:
        return np.arange(latents)
    return np.sort(np.random.default_rng(seed).choice(latents, searched, replace=False))


def encoder_against_decoder(W_enc_FD: np.ndarray, W_dec_FD: np.ndarray) -> dict[str, np.ndarray]:
    """The cosine of each latent's own two directions: for an encoder that reads what the decoder writes."""
    return {"encoder_decoder_cosine": row_cosines(W_enc_FD, W_dec_FD)}


def directions(name: str, W_FD: np.ndarray, chosen_S: np.ndarray) -> dict[str, np.ndarray]:
    """`<name>_nearest`, `<name>_nearest_latent` and `<name>_norm` of the rows, each (F,)."""
    cosine_F, latent_F = np.full(len(W_FD), np.nan, np.float32), np.full(len(W_FD), -1, np.int64)
    cosine_F[chosen_S], latent_F[chosen_S] = nearest(W_FD, chosen_S)
    return {
        f"{name}_nearest": cosine_F,
        f"{name}_nearest_latent": latent_F,
        f"{name}_norm": np.linalg.norm(W_FD, axis=1),
    }


def save_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write an .npz as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **columns)
    os.replace(partial, path)


def dictionary_summary(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The distributions of the cosines that there are: nearest neighbours (of the latents searched), encoder against
    decoder."""
    return {
        "searched": int((columns["decoder_nearest_latent"] >= 0).sum()),
        **{name: distribution(columns[name]) for name in COSINES if name in columns},
    }


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
