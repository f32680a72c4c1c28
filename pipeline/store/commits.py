"""Commit files: one per shard, written when all of the shard's arrays are on disk.

A commit holds only what the rows decide (no times, no worker names), so an undisturbed run and one that
was killed and resumed leave the same bytes. It carries the shard's statistics, so that whole-store
statistics need no second pass; they are read from it only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from sae.errors import StoreError

from .backends import Backend, Location, open_backend
from .checks import inside, of_kind, only_keys, parse_object, whole_number
from .schema import COMMITS_FOLDER, dump_json
from .statistics import ShardStats

T = TypeVar("T")
MAX_BYTES = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """Shard `shard` holds `valid_rows` rows, its files have these sizes and sha256 sums."""

    shard: int
    valid_rows: int
    flagged_rows: int
    files: dict[str, dict[str, Any]]  # path in the store -> {"bytes", "sha256"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Commit:
        """Raises ValueError for what is no commit."""
        only_keys(data, {"shard", "valid_rows", "flagged_rows", "files", "hooks"}, "keys")
        of_kind(data["hooks"], dict, "hooks")
        valid_rows = whole_number(data["valid_rows"], "valid_rows")
        files = of_kind(data["files"], dict, "files")
        for key, file in files.items():
            only_keys(of_kind(file, dict, inside(key, "files")), {"bytes", "sha256"}, key)
            whole_number(file["bytes"], f"bytes of {key}", most=MAX_BYTES)
            of_kind(file["sha256"], str, f"sha256 of {key}")
        return cls(
            shard=whole_number(data["shard"], "shard"),
            valid_rows=valid_rows,
            flagged_rows=whole_number(data["flagged_rows"], "flagged_rows", most=valid_rows),
            files=files,
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


def read_commit(backend: Backend, shard: int, shard_rows: int) -> Commit:
    """Raises StoreError, naming the file, for a commit that cannot be read or is none of a shard of `shard_rows`."""

    def commit(data: dict[str, Any]) -> Commit:
        found = Commit.from_dict(data)
        whole_number(found.shard, "shard", shard, shard)
        whole_number(found.valid_rows, "valid_rows", most=shard_rows)
        return found

    return _read(backend, shard, commit)


def read_shard_stats(backend: Backend, shard: int, widths: Mapping[str, int]) -> dict[str, ShardStats]:
    """Statistics of a shard at the hooks of `widths`, from its commit.

    Raises StoreError for a commit file that cannot be read, or has none for one of them.
    """

    def stats(data: dict[str, Any]) -> dict[str, ShardStats]:
        hooks = of_kind(data.get("hooks"), dict, "hooks")
        found = {name: ShardStats.from_dict(of_kind(hooks.get(name), dict, f"hooks.{name}")) for name in widths}
        for name, width in widths.items():
            if len(found[name].sum_D) != width:
                raise ValueError(f"statistics of width {len(found[name].sum_D)} at {name}, not {width}")
        return found

    return _read(backend, shard, stats)


def _read(backend: Backend, shard: int, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(parse_object(backend.get(commit_key(shard))))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"commit {backend.location}/{commit_key(shard)} is damaged ({error}); "
            f"delete it and resume extract to redo shard {shard}"
        ) from None
