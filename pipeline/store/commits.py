"""Commit files: one per shard, written when all of the shard's arrays are on disk.

A commit holds only what the rows decide (no times, no worker names), so an undisturbed run and one that
was killed and resumed leave the same bytes. It carries the shard's statistics, so that whole-store
statistics need no second pass. Letters: N rows, D width of a hook.

Source of the merge: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import StoreError

from .schema import COMMITS_FOLDER, dump_json, to_float32, write_atomic

# Position buckets of the norm quantiles: first position of each.
POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384)
NORM_BINS_PER_OCTAVE = 32  # a quantile read from them is within 2**(1/64), 1.1 %, of the value
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
OUTLIER_DIM_FACTOR = 10.0
STATS_BLOCK_ROWS = 512  # the float64 copy of a block stays in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStats:
    """Sums over the unflagged rows of one shard at one hook, in float64.

    `sum_D`; `centred_D` = sum over rows of (x - shard mean)^2 (not the raw sum of squares, which loses
    digits when the mean is large); `max_abs`; `norm_bins`: position bucket -> {floor(32 log2 |x|): rows},
    rows of norm 0 are counted under the key "zero".
    """

    count: int
    sum_D: np.ndarray
    centred_D: np.ndarray
    max_abs: float
    norm_bins: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sum": self.sum_D.tolist(),
            "centred_sumsq": self.centred_D.tolist(),
            "max_abs": self.max_abs,
            "norm_bins": self.norm_bins,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardStats:
        return cls(
            count=data["count"],
            sum_D=np.array(data["sum"], np.float64),
            centred_D=np.array(data["centred_sumsq"], np.float64),
            max_abs=data["max_abs"],
            norm_bins=data["norm_bins"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HookStats:
    """Statistics of a hook over the unflagged rows.

    `variance` = E||x - mean||^2 = sum of `var_D`. `norm_quantiles`: position bucket such as `16-63` ->
    {quantile: norm}, to 1.1 %. `outlier_dims`: dimensions whose root mean square is above 10 times the median one.
    """

    mean_D: np.ndarray
    var_D: np.ndarray
    variance: float
    count: int
    norm_quantiles: dict[str, dict[float, float]]
    max_abs: float
    outlier_dims: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """Shard `shard` holds `valid_rows` rows, its files have these sizes and sha256 sums."""

    shard: int
    valid_rows: int
    flagged_rows: int
    stats: dict[str, ShardStats]
    files: dict[str, dict[str, Any]]  # path in the store -> {"bytes", "sha256"}

    def as_dict(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "valid_rows": self.valid_rows,
            "flagged_rows": self.flagged_rows,
            "hooks": {name: stats.as_dict() for name, stats in self.stats.items()},
            "files": self.files,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Commit:
        return cls(
            shard=data["shard"],
            valid_rows=data["valid_rows"],
            flagged_rows=data["flagged_rows"],
            stats={name: ShardStats.from_dict(stats) for name, stats in data["hooks"].items()},
            files=data["files"],
        )


def commit_path(store: Path, shard: int) -> Path:
    return store / COMMITS_FOLDER / f"{shard:08d}.json"


def write_commit(store: Path, commit: Commit) -> None:
    write_atomic(commit_path(store, commit.shard), dump_json(commit.as_dict()))


def committed_shards(store: Path) -> list[int]:
    """Shards that are whole, ascending."""
    folder = store / COMMITS_FOLDER
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def read_commit(store: Path, shard: int) -> Commit:
    """Raises StoreError for a commit file that cannot be read, naming it."""
    path = commit_path(store, shard)
    try:
        return Commit.from_dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"commit {path} is damaged ({error}); delete it and resume extract to redo shard {shard}"
        ) from None


def shard_stats(stored_ND: np.ndarray, dtype: str, keep_N: np.ndarray, pos_N: np.ndarray) -> ShardStats:
    """Statistics of the rows of one shard that `keep_N` marks, as they are on disk (`dtype`: logical).

    One pass around a pilot mean p, that of the first block:
    sum (x - mean)^2 = sum (x - p)^2 - (sum (x - p))^2 / n, which loses no digits while p is near the mean.
    """
    width = stored_ND.shape[1]
    kept_n = np.flatnonzero(keep_N)
    count = len(kept_n)
    pilot_D, sum_D, sumsq_D, norm_n = np.zeros(width), np.zeros(width), np.zeros(width), np.zeros(count)
    max_abs = 0.0
    for start in range(0, count, STATS_BLOCK_ROWS):
        block = slice(start, start + STATS_BLOCK_ROWS)
        x = to_float32(stored_ND[kept_n[block]], dtype)
        max_abs = max(max_abs, float(x.max()), -float(x.min()))
        x = x.astype(np.float64)
        norm_n[block] = np.sqrt(np.einsum("nd,nd->n", x, x))
        if start == 0:
            pilot_D = x.mean(axis=0)
        x -= pilot_D
        sum_D += x.sum(axis=0)
        sumsq_D += np.einsum("nd,nd->d", x, x)
    centred_D = np.maximum(sumsq_D - sum_D**2 / max(count, 1), 0)
    bins = _norm_bins(norm_n, pos_N[kept_n])
    return ShardStats(count=count, sum_D=sum_D + count * pilot_D, centred_D=centred_D, max_abs=max_abs, norm_bins=bins)


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


def merge_stats(parts: list[ShardStats]) -> HookStats:
    """Statistics of all shards; `parts` in shard order, so that the same store gives the same digits."""
    parts = [part for part in parts if part.count]
    if not parts:
        raise StoreError("the store has no unflagged committed row; extract more text or raise extract.outlier_factor")
    moments = RunningMoments.empty(len(parts[0].sum_D))
    bins: dict[str, dict[str, int]] = {}
    for part in parts:
        moments = moments.plus(part.count, part.sum_D, part.centred_D)
        for bucket, counts in part.norm_bins.items():
            merged = bins.setdefault(bucket, {})
            for key, rows in counts.items():
                merged[key] = merged.get(key, 0) + rows
    var_D = moments.centred_D / moments.count
    rms_D = np.sqrt(var_D + moments.mean_D**2)
    return HookStats(
        mean_D=moments.mean_D,
        var_D=var_D,
        variance=float(var_D.sum()),
        count=moments.count,
        norm_quantiles={bucket_name(int(b)): _quantiles(bins[b]) for b in sorted(bins, key=int)},
        max_abs=max(part.max_abs for part in parts),
        outlier_dims=np.flatnonzero(rms_D > OUTLIER_DIM_FACTOR * np.median(rms_D)).tolist(),
    )


def bucket_name(bucket: int) -> str:
    """`0`, `1-3`, `4-15`, ..., `16384-`."""
    first = POSITION_EDGES[bucket]
    if bucket + 1 == len(POSITION_EDGES):
        return f"{first}-"
    last = POSITION_EDGES[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


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
