"""Cross entropy and KL from logits, and means with confidence intervals. float64 sums, numpy only.

N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..cores import usable_cores

MAX_THREADS = 4
BLOCK_ELEMENTS = 1 << 18  # logits worked on at once: 1 MiB of float32 stays in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The clean run's logits of a batch, kept for the KL of the runs compared with it."""

    logits_NV: np.ndarray  # float32
    log_z_N: np.ndarray  # float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean, or a ratio of means, and its 95 % confidence interval. NaN where it cannot be estimated."""

    mean: float
    low: float
    high: float
    clusters: int


def log_normaliser(logits_NV: np.ndarray) -> np.ndarray:
    """log sum_v exp(logits_v) of every row, float64; exp in float32 of values <= 0, summed in float64.

    The exponentials carry a relative error of 1e-7 each, so the result is good to 1e-7 nats.
    """
    out_N = np.empty(len(logits_NV), np.float64)

    def work(rows: slice) -> None:
        block = logits_NV[rows]
        top = block.max(axis=1, keepdims=True)
        sums = np.exp(block - top).sum(axis=1, dtype=np.float64)
        out_N[rows] = top[:, 0].astype(np.float64) + np.log(sums)

    _over_blocks(logits_NV.shape, work)
    return out_N


def cross_entropy(logits_NV: np.ndarray, log_z_N: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """-log p(target) of every row in nats, float64."""
    picked = logits_NV[np.arange(len(targets_N)), targets_N].astype(np.float64)
    return log_z_N - picked


def kl_divergence(clean: Reference, logits_NV: np.ndarray, log_z_N: np.ndarray) -> np.ndarray:
    """KL(clean || other) of every row in nats, float64: sum_v p_v (z_v - z'_v) + log Z' - log Z.

    Equal logits give exactly 0.
    """
    out_N = np.empty(len(logits_NV), np.float64)

    def work(rows: slice) -> None:
        base = np.asarray(clean.logits_NV[rows])
        p = np.exp(base - clean.log_z_N[rows, None].astype(np.float32))
        p_total = p.sum(axis=1, dtype=np.float64)
        moved = (p * (base - logits_NV[rows])).sum(axis=1, dtype=np.float64)
        out_N[rows] = moved / p_total + log_z_N[rows] - clean.log_z_N[rows]

    _over_blocks(logits_NV.shape, work)
    return out_N


def _over_blocks(shape: tuple[int, ...], work: Callable[[slice], None]) -> None:
    """Call `work` on blocks of rows that fit the cache, from a few threads: numpy lets go of the interpreter."""
    step = max(1, BLOCK_ELEMENTS // max(1, shape[1]))
    blocks = [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
    if len(blocks) < 2:
        for rows in blocks:
            work(rows)
        return
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores(), len(blocks))) as pool:
        for _ in pool.map(work, blocks):
            pass


def clustered_mean(values_N: np.ndarray, cluster_N: np.ndarray) -> Interval:
    """Mean over tokens, and its 95 % interval when the tokens of one cluster are not independent.

    With S_c the sum and n_c the number of tokens of cluster c, m clusters, n tokens, mean = S / n:
    var = m/(m-1) * sum_c (S_c - mean n_c)^2 / n^2, half width = t_{0.975, m-1} sqrt(var)
    (the linearised ratio estimator of survey sampling).
    """
    return clustered_ratio(values_N, np.ones(len(values_N)), cluster_N)


def clustered_ratio(over_N: np.ndarray, under_N: np.ndarray, cluster_N: np.ndarray) -> Interval:
    """R = sum over / sum under, and its 95 % interval when the tokens of one cluster are not independent.

    With A_c and B_c the sums of both over cluster c, m clusters, B = sum_c B_c (the delta method):
    var = m/(m-1) * sum_c (A_c - R B_c)^2 / B^2, half width = t_{0.975, m-1} sqrt(var).
    It holds where B is many of its own standard errors away from 0. NaN without tokens and where B is 0.
    """
    if len(over_N) == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, clusters=0)
    _, which_N = np.unique(cluster_N, return_inverse=True)
    over_C = np.bincount(which_N, weights=over_N.astype(np.float64))
    under_C = np.bincount(which_N, weights=under_N.astype(np.float64))
    total, m = float(under_C.sum()), len(over_C)
    if total == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, clusters=m)
    ratio = float(over_C.sum()) / total
    if m < 2:
        return Interval(mean=ratio, low=math.nan, high=math.nan, clusters=m)
    variance = m / (m - 1) * float(((over_C - ratio * under_C) ** 2).sum()) / total**2
    half = t_quantile_975(m - 1) * math.sqrt(variance)
    return Interval(mean=ratio, low=ratio - half, high=ratio + half, clusters=m)


def t_quantile_975(df: int) -> float:
    """The 0.975 quantile of Student's t with `df` degrees of freedom, to 1e-3 for df >= 3.

    df 1 and 2 are exact; beyond, the expansion about the normal quantile
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    if df == 1:
        return 12.706204736
    if df == 2:
        return 4.302652730
    z = 1.959963984540054
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / df + g2 / df**2 + g3 / df**3 + g4 / df**4
