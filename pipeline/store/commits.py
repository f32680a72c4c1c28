"""Commit files: one per shard, written when all of the shard's arrays are on disk.

A commit holds only what the rows decide (no times, no worker names), so an undisturbed run and one that
was killed and resumed leave the same bytes. It carries the shard's statistics, so that whole-store
statistics need no second pass; they are read from it only when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from sae.errors import StoreError

from .backends import Backend, Location, open_backend
from .schema import COMMITS_FOLDER, dump_json
from .statistics import ShardStats

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """Shard `shard` holds `valid_rows` rows, its files have these sizes and sha256 sums."""

    shard: int
    valid_rows: int
    flagged_rows: int
    files: dict[str, dict[str, Any]]  # path in the store -> {"bytes", "sha256"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Commit:
        return cls(
            shard=data["shard"],
            valid_rows=data["valid_rows"],
            flagged_rows=data["flagged_rows"],
            files=data["files"],
        )


def commit_key(shard: int) -> str:
    return f"{COMMITS_FOLDER}/{shard:08d}.json"


def write_commit(backend: Backend, commit: Commit, stats: Mapping[str, ShardStats]) -> None:
    """`stats`: those of each hook."""
    hooks = {name: found.as_dict() for name, found in stats.items()}
    backend.put(commit_key(commit.shard), dump_json({**asdict(commit), "hooks": hooks}))


def committed_shards(location: Location | Backend) -> list[int]:
    """Shards that are whole, ascending."""
    names = [PurePosixPath(key) for key in open_backend(location).list(f"{COMMITS_FOLDER}/")]
    return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdecimal())


def read_commit(backend: Backend, shard: int) -> Commit:
    """Raises StoreError for a commit file that cannot be read, naming it."""
    return _read(backend, shard, Commit.from_dict)


def read_shard_stats(backend: Backend, shard: int, widths: Mapping[str, int]) -> dict[str, ShardStats]:
    """Statistics of a shard at the hooks of `widths`, from its commit.

    Raises StoreError for a commit file that cannot be read, or has none for one of them.
    """

    def stats(data: dict[str, Any]) -> dict[str, ShardStats]:
        found = {name: ShardStats.from_dict(data["hooks"][name]) for name in widths}
        for name, width in widths.items():
            if len(found[name].sum_D) != width:
                raise ValueError(f"statistics of width {len(found[name].sum_D)} at {name}, not {width}")
        return found

    return _read(backend, shard, stats)


def _read(backend: Backend, shard: int, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(json.loads(backend.get(commit_key(shard)).decode("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"commit {backend.location}/{commit_key(shard)} is damaged ({error}); "
            f"delete it and resume extract to redo shard {shard}"
        ) from None
