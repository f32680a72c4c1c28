"""Commit files: one per shard, written when all of the shard's arrays are on disk.

A commit holds only what the rows decide (no times, no worker names), so an undisturbed run and one that
was killed and resumed leave the same bytes. It carries the shard's statistics, so that whole-store
statistics need no second pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sae.errors import StoreError

from .backends import Backend, Location, open_backend
from .schema import COMMITS_FOLDER, dump_json
from .statistics import HookStats as HookStats  # where they used to be
from .statistics import ShardStats
from .statistics import merge_stats as merge_stats
from .statistics import shard_stats as shard_stats


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


def commit_key(shard: int) -> str:
    return f"{COMMITS_FOLDER}/{shard:08d}.json"


def write_commit(backend: Backend, commit: Commit) -> None:
    backend.put(commit_key(commit.shard), dump_json(commit.as_dict()))


def committed_shards(location: Location | Backend) -> list[int]:
    """Shards that are whole, ascending."""
    names = [PurePosixPath(key) for key in open_backend(location).list(f"{COMMITS_FOLDER}/")]
    return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdecimal())


def read_commit(location: Location | Backend, shard: int) -> Commit:
    """Raises StoreError for a commit file that cannot be read, naming it."""
    backend = open_backend(location)
    try:
        return Commit.from_dict(json.loads(backend.get(commit_key(shard)).decode("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"commit {backend.location}/{commit_key(shard)} is damaged ({error}); "
            f"delete it and resume extract to redo shard {shard}"
        ) from None
