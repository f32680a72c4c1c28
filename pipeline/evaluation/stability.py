"""Seed stability: which latents of an SAE another one of the same hook point and width has found too.

The directions are matched one to one so that the sum of the cosines is the largest possible (linear assignment),
once by decoder rows and once by encoder rows; a latent is shared where both matchings give it the same partner at a
cosine above 0.7 (Paulo and Belrose 2025, arXiv 2501.16615).

Up to MATRIX_BYTES the whole matrix of cosines is assigned: exact. Beyond, each latent keeps its CANDIDATES nearest on
either side and the assignment is over these pairs; latents it leaves over are paired in the order of their cosines. No
matching can exceed the mean of each row's largest cosine, which is reported beside it as `bound`.

A, B the two dictionaries; F latents, D width, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sae.dictionary import unit_rows
from sae.errors import ConfigError, ShapeError
from sae.weights import SAEWeights

from .optional import needed

MATRIX_BYTES = 1 << 29  # of float64: 8,192 latents; scipy takes as much again
BLOCK_BYTES = 64 << 20
CANDIDATES = 32
SHARED = 0.7
LEVELS = (0.7, 0.9)


def seed_stability(a: SAEWeights, b: SAEWeights, *, matrix_bytes: int = MATRIX_BYTES) -> dict[str, Any]:
    """How well the latents of `a` are found among those of `b`.

    For `decoder` and `encoder`: `mean` matched cosine, its `bound`, `above_0.7`, `above_0.9` (shares of the latents),
    `quantiles`, `exact`; `shared`: the share of the latents that both matchings pair alike above 0.7.

    Raises:
        ConfigError: another hook point, or scipy is missing.
        ShapeError: another width or number of latents.
    """
    check_same_kind(a, b)
    found: dict[str, Any] = {}
    partners = {}
    cosines = {}
    for name, A_FD, B_FD in (("decoder", a.W_dec_FD, b.W_dec_FD), ("encoder", a.W_enc_FD, b.W_enc_FD)):
        partners[name], cosines[name], bound, exact = match(A_FD, B_FD, matrix_bytes=matrix_bytes)
        found[name] = summary(cosines[name], bound, exact)
    alike_F = (partners["decoder"] == partners["encoder"]) & (np.minimum(*cosines.values()) > SHARED)
    return found | {"num_latents": a.num_latents, "shared": float(alike_F.mean())}


def check_same_kind(a: SAEWeights, b: SAEWeights) -> None:
    """ConfigError, ShapeError for an SAE whose latents cannot be matched with those of `a`."""
    if a.hook != b.hook:
        raise ConfigError(f"evaluate.against: expected an SAE of {a.hook}, got one of {b.hook}")
    if a.W_dec_FD.shape != b.W_dec_FD.shape:
        raise ShapeError(
            f"evaluate.against: expected {a.num_latents} latents of width {a.d_in}, got {b.num_latents} of {b.d_in}"
        )


def match(
    A_FD: np.ndarray, B_FD: np.ndarray, *, matrix_bytes: int = MATRIX_BYTES, candidates: int = CANDIDATES
) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """(partner_F: row of B for each row of A, each once; cosine_F of the pairs; bound; whether the matching is exact)."""
    A_FD, B_FD = unit_rows(A_FD), unit_rows(B_FD)
    latents = len(A_FD)
    exact = 8 * latents * latents <= matrix_bytes
    partner_F = _assign_all(A_FD, B_FD) if exact else _assign_candidates(A_FD, B_FD, min(candidates, latents))
    cosine_F = np.einsum("fd,fd->f", A_FD, B_FD[partner_F], dtype=np.float64)
    bound = float(np.concatenate([block.max(axis=1) for _, block in _blocks(A_FD, B_FD)]).mean(dtype=np.float64))
    return partner_F, cosine_F, bound, exact


def summary(cosine_F: np.ndarray, bound: float, exact: bool) -> dict[str, Any]:
    """The numbers of a matching."""
    return {
        "mean": float(cosine_F.mean()),
        "bound": bound,
        **{f"above_{level}": float((cosine_F > level).mean()) for level in LEVELS},
        "quantiles": {str(q): float(np.quantile(cosine_F, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "exact": exact,
    }


def _blocks(A_FD: np.ndarray, B_FD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, BLOCK_BYTES // (4 * len(B_FD)))
    for start in range(0, len(A_FD), step):
        rows = slice(start, min(len(A_FD), start + step))
        yield rows, A_FD[rows] @ B_FD.T


def _assign_all(A_FD: np.ndarray, B_FD: np.ndarray) -> np.ndarray:
    optimize = needed("scipy.optimize", "evaluate.against")
    cosines = np.empty((len(A_FD), len(B_FD)))
    for rows, block in _blocks(A_FD, B_FD):
        cosines[rows] = block
    return optimize.linear_sum_assignment(cosines, maximize=True)[1]


def _assign_candidates(A_FD: np.ndarray, B_FD: np.ndarray, candidates: int) -> np.ndarray:
    """The best matching over the candidate pairs; every latent may also stay alone, so that there always is one."""
    sparse, graph = (needed(f"scipy.{m}", "evaluate.against") for m in ("sparse", "sparse.csgraph"))
    latents = len(A_FD)
    forward, backward = _nearest(A_FD, B_FD, candidates), _nearest(B_FD, A_FD, candidates)
    row_M, column_M = np.r_[forward[0], backward[1]], np.r_[forward[1], backward[0]]
    pair_M = np.unique(row_M * latents + column_M)
    row_M, column_M = pair_M // latents, pair_M % latents
    cosine_M = np.concatenate(
        [
            np.einsum("md,md->m", A_FD[row_M[part]], B_FD[column_M[part]])
            for part in np.array_split(np.arange(len(pair_M)), max(1, len(pair_M) * A_FD.shape[1] * 8 // BLOCK_BYTES))
        ]
    )
    alone_F = np.arange(latents)
    # costs above zero: a stored zero would count as no pair. Being alone costs more than any pair.
    cost = np.r_[2.0 - cosine_M, np.full(latents, 4.0)]
    places = (np.r_[row_M, alone_F], np.r_[column_M, latents + alone_F])
    table = sparse.csr_array((cost, places), shape=(latents, 2 * latents))
    _, chosen_F = graph.min_weight_full_bipartite_matching(table)
    partner_F = np.where(chosen_F < latents, chosen_F, -1)
    return _pair_the_rest(partner_F, A_FD, B_FD)


def _nearest(A_FD: np.ndarray, B_FD: np.ndarray, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of A, row of B), the `candidates` nearest of each row of A."""
    found = [  # copied: a view would keep the whole block's order alive
        np.argpartition(block, len(B_FD) - candidates, axis=1)[:, len(B_FD) - candidates :].copy()
        for _, block in _blocks(A_FD, B_FD)
    ]
    return np.repeat(np.arange(len(A_FD)), candidates), np.concatenate(found).reshape(-1).astype(np.int64)


def _pair_the_rest(partner_F: np.ndarray, A_FD: np.ndarray, B_FD: np.ndarray) -> np.ndarray:
    """Pair what was left alone, each row with the nearest that is free: these cosines are small either way."""
    free = np.ones(len(partner_F), bool)
    free[partner_F[partner_F >= 0]] = False
    for row in np.flatnonzero(partner_F < 0):
        open_M = np.flatnonzero(free)
        partner_F[row] = open_M[np.argmax(B_FD[open_M] @ A_FD[row])]
        free[partner_F[row]] = False
    return partner_F
