"""What a store holds, in numbers: for `ggscope store info`, and the statistics files written when a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.corpus.windows import (
    FLAG_BOS,
    FLAG_FIRST,
    FLAG_GENERATED,
    FLAG_NOT_FINITE,
    FLAG_OUTLIER,
    FLAG_SPECIAL,
)

from .backends import Backend, Location
from .checksums import note_checksums
from .schema import STATS_ARRAYS_FILE, STATS_FILE, dump_json
from .statistics import HookStats

if TYPE_CHECKING:
    from .reader import ActivationStore

FLAG_NAMES = {
    FLAG_BOS: "bos",
    FLAG_SPECIAL: "special",
    FLAG_FIRST: "first",
    FLAG_OUTLIER: "outlier",
    FLAG_NOT_FINITE: "not_finite",
    FLAG_GENERATED: "generated",
}
TOP_DIMS = 16
COLUMN_BLOCK_ROWS = 1 << 22
RANGES_NAMED = 8


def write_stats(location: Location | Backend) -> dict[str, Any]:
    """Write `stats.safetensors` and `stats.json` of the committed rows into the store, and note the commits' checksums;
    returns what stats.json says.

    The same rows give the same bytes. Call it when the run that holds the store ends.
    """
    from .reader import ActivationStore

    store = ActivationStore(location)
    for key, document in statistics_documents(store).items():
        store.backend.put(key, document)
    note_checksums(store.backend, [commit.shard for commit in store.commits])
    return hooks_summary(store)


def statistics_documents(store: ActivationStore) -> dict[str, bytes]:
    """The two files: vectors as float64 tensors `<hook>.<name>`, numbers as JSON."""
    from safetensors.numpy import save

    if not store.n_rows or store.flagged_rows == store.n_rows:
        return {STATS_FILE: dump_json({"rows": store.n_rows, "unflagged_rows": 0, "hooks": {}})}
    tensors: dict[str, np.ndarray] = {}
    for name, stats in store.all_stats().items():
        tensors |= {
            f"{name}.mean": stats.mean_D,
            f"{name}.variance": stats.var_D,
            f"{name}.second_moment": stats.second_moment_D,
            f"{name}.max_abs": stats.max_abs_D,
        }
    numbers = {
        "rows": store.n_rows,
        "unflagged_rows": store.n_rows - store.flagged_rows,
        "hooks": hooks_summary(store),
    }
    return {STATS_ARRAYS_FILE: save(tensors), STATS_FILE: dump_json(numbers)}


def hooks_summary(store: ActivationStore) -> dict[str, Any]:
    """Per hook the statistics that are single numbers; empty while no unflagged row is committed."""
    if store.flagged_rows == store.n_rows:
        return {}
    return {name: _numbers(stats) for name, stats in store.all_stats().items()}


def info(store: ActivationStore) -> dict[str, Any]:
    """Everything `ggscope store info` says, as plain JSON."""
    meta = store.meta
    there = {commit.shard for commit in store.commits}
    missing = [shard for shard in range(meta.n_shards) if shard not in there]
    return {
        "store": str(store.path),
        "model": meta.model,
        "corpus_hash": meta.corpus_hash,
        "settings": meta.config,
        "rows": store.n_rows,
        "rows_planned": meta.rows,
        "shard_rows": meta.shard_rows,
        "chunk_rows": meta.chunk_rows,
        "shards_committed": len(store.commits),
        "shards_missing": missing,
        "bytes": sum(file["bytes"] for commit in store.commits for file in commit.files.values()),
        "flagged_rows": store.flagged_rows,
        "flags": flag_counts(store),
        "hooks": {
            hook.name: {"width": hook.width, "dtype": hook.dtype, "outlier_threshold": hook.outlier_threshold}
            for hook in meta.hooks
        },
        "statistics": hooks_summary(store),
    }


def flag_counts(store: ActivationStore) -> dict[str, int]:
    """Rows that carry each flag; a row may carry several."""
    counts = dict.fromkeys(FLAG_NAMES.values(), 0)
    for start in range(0, store.n_rows, COLUMN_BLOCK_ROWS):
        flags = store.column_rows("flags", start, min(start + COLUMN_BLOCK_ROWS, store.n_rows))
        for bit, name in FLAG_NAMES.items():
            counts[name] += int(np.count_nonzero(flags & bit))
    return counts


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7, 9-12`, cut after a few."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    named = [f"{first}-{last}" if first < last else str(first) for first, last in parts[:RANGES_NAMED]]
    return ", ".join(named + ["..."] * (len(parts) > RANGES_NAMED))


def _numbers(stats: HookStats) -> dict[str, Any]:
    return {
        "rows": stats.count,
        "mean_norm": stats.mean_norm,
        "variance": stats.variance,
        "max_abs": stats.max_abs,
        "norm_quantiles": _keyed(stats.norm_quantiles_all),
        "norm_quantiles_by_position": {name: _keyed(found) for name, found in stats.norm_quantiles.items()},
        "outlier_dims": len(stats.outlier_dims),
        "top_outlier_dims": [{"dim": dim, "rms": rms} for dim, rms in stats.top_dims(TOP_DIMS)],
    }


def _keyed(quantiles: dict[float, float]) -> dict[str, float]:
    return {str(share): value for share, value in quantiles.items()}
