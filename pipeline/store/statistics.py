"""Statistics of a hook point: sums per shard, kept in its commit, and what a whole store makes of them.

Letters: N rows, D width of a hook.

Source of the merge: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances".
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import StoreError

from .checks import finite, of_kind, only_keys, whole_number
from .schema import magnitude_bits, to_float32

# Position buckets of the norm quantiles: first position of each.
POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384)
NORM_BINS_PER_OCTAVE = 32  # a quantile read from them is within 2**(1/64), 1.1 %, of the value
BUCKETS = {str(bucket) for bucket in range(len(POSITION_EDGES))}
BIN = re.compile(r"-?[0-9]{1,5}")
MAX_BIN = 1023 * NORM_BINS_PER_OCTAVE
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
OUTLIER_DIM_FACTOR = 10.0
BLOCK_BYTES = 1 << 20  # the float64 copy of a block stays in the cache
SQUARES = (1e-30, 1e37)  # sums of squares outside are taken in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStats:
    """Sums over the unflagged rows of one shard at one hook.

    `sum_D`; `centred_D` = sum over rows of (x - shard mean)^2 (not the raw sum of squares, which loses
    digits when the mean is large), both float64; `max_abs_D`; `norm_sum`: sum of |x|, to 1e-6;
    `norm_bins`: position bucket -> {floor(32 log2 |x|): rows}, rows of norm 0 are counted under "zero".
    """

    count: int
    sum_D: np.ndarray
    centred_D: np.ndarray
    max_abs_D: np.ndarray
    norm_sum: float
    norm_bins: dict[str, dict[str, int]]

    @property
    def max_abs(self) -> float:
        return float(self.max_abs_D.max(initial=0.0))

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sum": _as_text(self.sum_D),
            "centred_sumsq": _as_text(self.centred_D),
            "max_abs": _as_text(self.max_abs_D),
            "norm_sum": self.norm_sum,
            "norm_bins": self.norm_bins,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardStats:
        """Raises ValueError for what is no statistics."""
        only_keys(data, {"count", "sum", "centred_sumsq", "max_abs", "norm_sum", "norm_bins"}, "statistics")
        sum_D, centred_D, max_abs_D = (_from_text(data[key], key) for key in ("sum", "centred_sumsq", "max_abs"))
        if not len(sum_D) == len(centred_D) == len(max_abs_D):
            raise ValueError("statistics: vectors of several widths")
        count = whole_number(data["count"], "count")
        return cls(
            count=count,
            sum_D=sum_D,
            centred_D=centred_D,
            max_abs_D=max_abs_D,
            norm_sum=finite(data["norm_sum"], "norm_sum"),
            norm_bins=_checked_bins(data["norm_bins"], count),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HookStats:
    """Statistics of a hook over the unflagged rows.

    `variance` = E||x - mean||^2 = sum of `var_D`; `second_moment_D` = E[x^2] (with `count` what an imatrix
    holds as a sum of squares). `norm_quantiles`: position bucket such as `16-63` -> {quantile: norm}, to
    1.1 %, `norm_quantiles_all` over all positions. `outlier_dims`: dimensions whose root mean square is
    above 10 times the median one.
    """

    mean_D: np.ndarray
    var_D: np.ndarray
    max_abs_D: np.ndarray
    variance: float
    count: int
    mean_norm: float
    norm_quantiles: dict[str, dict[float, float]]
    norm_quantiles_all: dict[float, float]
    outlier_dims: list[int]

    @property
    def max_abs(self) -> float:
        return float(self.max_abs_D.max())

    @property
    def second_moment_D(self) -> np.ndarray:
        return self.var_D + self.mean_D**2

    @property
    def rms_D(self) -> np.ndarray:
        return np.sqrt(self.second_moment_D)

    def top_dims(self, most: int) -> list[tuple[int, float]]:
        """The outlier dimensions of the largest root mean square: `(dimension, rms)`, largest first."""
        rms_D = self.rms_D
        ranked = sorted(self.outlier_dims, key=lambda dim: (-rms_D[dim], dim))
        return [(dim, float(rms_D[dim])) for dim in ranked[:most]]


def shard_stats(stored_ND: np.ndarray, dtype: str, keep_N: np.ndarray, pos_N: np.ndarray) -> ShardStats:
    """Statistics of the rows of one shard that `keep_N` marks, as they are on disk (`dtype`: logical).

    One pass around a pilot mean p, that of the first block:
    sum (x - mean)^2 = sum (x - p)^2 - (sum (x - p))^2 / n, which loses no digits while p is near the mean.
    No product goes through BLAS, whose sums depend on the number of threads.
    """
    width = stored_ND.shape[1]
    kept_n = np.flatnonzero(keep_N)
    count = len(kept_n)
    pilot_D, sum_D, sumsq_D = np.zeros(width), np.zeros(width), np.zeros(width)
    most_D, squares_n = magnitude_bits(stored_ND[:0]).max(axis=0, initial=0), np.zeros(count)
    step = max(1, BLOCK_BYTES // (8 * width))
    for start in range(0, count, step):
        block = slice(start, start + step)
        stored = stored_ND[kept_n[block]]
        np.maximum(most_D, magnitude_bits(stored).max(axis=0), out=most_D)
        x = to_float32(stored, dtype, finite=True)
        squares_n[block] = _sums_of_squares(x)
        y = x.astype(np.float64)
        if start == 0:
            pilot_D = y.mean(axis=0)
        y -= pilot_D
        sum_D += y.sum(axis=0)
        sumsq_D += np.einsum("nd,nd->d", y, y)
    norm_n = np.sqrt(squares_n)
    return ShardStats(
        count=count,
        sum_D=sum_D + count * pilot_D,
        centred_D=np.maximum(sumsq_D - sum_D**2 / max(count, 1), 0),
        max_abs_D=to_float32(most_D.view(stored_ND.dtype), dtype).astype(np.float64),
        norm_sum=float(norm_n.sum()),
        norm_bins=_norm_bins(norm_n, pos_N[kept_n]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningMoments:
    """Rows, mean and sum (x - mean)^2 of the parts so far, in float64; the order of the parts decides the last digits."""

    count: int
    mean_D: np.ndarray
    centred_D: np.ndarray

    @classmethod
    def empty(cls, width: int) -> RunningMoments:
        return cls(count=0, mean_D=np.zeros(width), centred_D=np.zeros(width))

    def plus(self, count: int, sum_D: np.ndarray, centred_D: np.ndarray) -> RunningMoments:
        """With one more part. M of both is M_a + M_b + (mean_b - mean_a)^2 n_a n_b / n, M = sum (x - mean)^2."""
        if not count:
            return self
        delta_D = sum_D / count - self.mean_D
        total = self.count + count
        return RunningMoments(
            count=total,
            mean_D=self.mean_D + delta_D * (count / total),
            centred_D=self.centred_D + centred_D + delta_D**2 * (self.count * count / total),
        )


class Fold:
    """Statistics of a hook of width `width` from those of its shards, one after another; keeps no shard's.

    Shards come in their order, so that the same store gives the same digits.
    """

    def __init__(self, width: int) -> None:
        self._moments = RunningMoments.empty(width)
        self._max_abs_D, self._norm_sum = np.zeros(width), 0.0
        self._bins: dict[str, dict[str, int]] = {}

    def add(self, part: ShardStats) -> None:
        self._moments = self._moments.plus(part.count, part.sum_D, part.centred_D)
        np.maximum(self._max_abs_D, part.max_abs_D, out=self._max_abs_D)
        self._norm_sum += part.norm_sum
        for bucket, counts in part.norm_bins.items():
            _add_counts(self._bins.setdefault(bucket, {}), counts)

    def result(self) -> HookStats:
        """Raises StoreError when no row was unflagged."""
        moments, bins = self._moments, self._bins
        if not moments.count:
            raise StoreError(
                "the store has no unflagged committed row; extract more text or raise extract.outlier_factor"
            )
        var_D = moments.centred_D / moments.count
        rms_D = np.sqrt(var_D + moments.mean_D**2)
        everywhere: dict[str, int] = {}
        for counts in bins.values():
            _add_counts(everywhere, counts)
        return HookStats(
            mean_D=moments.mean_D,
            var_D=var_D,
            max_abs_D=self._max_abs_D,
            variance=float(var_D.sum()),
            count=moments.count,
            mean_norm=self._norm_sum / moments.count,
            norm_quantiles={bucket_name(int(b)): _quantiles(bins[b]) for b in sorted(bins, key=int)},
            norm_quantiles_all=_quantiles(everywhere),
            outlier_dims=np.flatnonzero(rms_D > OUTLIER_DIM_FACTOR * np.median(rms_D)).tolist(),
        )


def bucket_name(bucket: int) -> str:
    """`0`, `1-3`, `4-15`, ..., `16384-`."""
    first = POSITION_EDGES[bucket]
    if bucket + 1 == len(POSITION_EDGES):
        return f"{first}-"
    last = POSITION_EDGES[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def _sums_of_squares(x_ND: np.ndarray) -> np.ndarray:
    """|x|^2 of each row, float64: float32 sums where they neither overflow nor vanish, else float64 ones."""
    with np.errstate(over="ignore"):
        squares_N = np.einsum("nd,nd->n", x_ND, x_ND).astype(np.float64)
    rough = ~((squares_N > SQUARES[0]) & (squares_N < SQUARES[1]))
    if rough.any():
        x = x_ND[rough].astype(np.float64)
        squares_N[rough] = np.einsum("nd,nd->n", x, x)
    return squares_N


def _as_text(x_D: np.ndarray) -> str:
    """Exact, and a third of the decimal digits: base64 of little-endian float64."""
    return base64.b64encode(x_D.astype("<f8").tobytes()).decode("ascii")


def _from_text(text: Any, name: str) -> np.ndarray:
    x_D = np.frombuffer(base64.b64decode(of_kind(text, str, name), validate=True), "<f8").astype(np.float64)
    if not np.isfinite(x_D).all():
        raise ValueError(f"{name}: values that are not finite")
    return x_D


def _checked_bins(bins: Any, count: int) -> dict[str, dict[str, int]]:
    """Norm histograms of `count` rows; raises ValueError."""
    total = 0
    for bucket, counts in of_kind(bins, dict, "norm_bins").items():
        if bucket not in BUCKETS:
            raise ValueError(f"norm_bins: no bucket {bucket!a:.60}")
        for key, rows in of_kind(counts, dict, "norm_bins").items():
            if key != "zero" and not (BIN.fullmatch(key) and abs(int(key)) <= MAX_BIN):
                raise ValueError(f"norm_bins: no bin {key!a:.60}")
            total += whole_number(rows, "norm_bins")
    if total != count:
        raise ValueError(f"norm_bins: {total} rows, not {count}")
    return bins


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for key, rows in counts.items():
        total[key] = total.get(key, 0) + rows


def _norm_bins(norm_N: np.ndarray, pos_N: np.ndarray) -> dict[str, dict[str, int]]:
    bucket_N = np.searchsorted(POSITION_EDGES, pos_N, side="right") - 1
    bins: dict[str, dict[str, int]] = {}
    for bucket in np.unique(bucket_N).tolist():
        norms = norm_N[bucket_N == bucket]
        positive = norms[norms > 0]
        keys, counts = np.unique(np.floor(NORM_BINS_PER_OCTAVE * np.log2(positive)).astype(int), return_counts=True)
        bins[str(bucket)] = {str(key): rows for key, rows in zip(keys.tolist(), counts.tolist(), strict=True)}
        if len(positive) < len(norms):
            bins[str(bucket)]["zero"] = len(norms) - len(positive)
    return bins


def _quantiles(bins: dict[str, int]) -> dict[float, float]:
    """The middle (in log) of the bin in which each quantile's row lies."""
    zeros = bins.get("zero", 0)
    keys = sorted(int(key) for key in bins if key != "zero")
    values = [0.0, *(2.0 ** ((key + 0.5) / NORM_BINS_PER_OCTAVE) for key in keys)]
    cumulative = np.cumsum([zeros, *(bins[str(key)] for key in keys)])
    last_row = int(cumulative[-1]) - 1
    return {q: values[int(np.searchsorted(cumulative, round(q * last_row), side="right"))] for q in QUANTILES}
