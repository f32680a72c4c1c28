"""Reading a store: rows of committed shards, by memory map where the shard files allow it.

Letters: N rows, D width of a hook. Row numbers count the valid rows of the committed shards in shard
order; in a finished store they are the plan's rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.corpus.windows import FLAGS_ALL
from sae.errors import StoreError

from .commits import Commit, HookStats, committed_shards, merge_stats, read_commit
from .schema import DOCS_FILE, STORED_DTYPES, HookInfo, index_size, read_meta, to_float32
from .shuffle import ShuffledBatches
from .writer import shard_file

DEFAULT_BUFFER_ROWS = 131_072


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A file of a shard that is not what its commit says."""

    shard: int
    file: str
    what: str

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.file} {self.what}"


class ActivationStore:
    """The committed rows of the store at `path`, open for reading; extract may still be adding shards.

    `fast_path=False` reads through the zarr API only. Raises StoreError when there is no store, or
    (on the first read of it) a shard is damaged: the message names the shard and how to redo it.
    """

    def __init__(self, path: Path | str, *, fast_path: bool = True) -> None:
        self.path = Path(path)
        self.fast_path = fast_path
        self.meta = read_meta(self.path)
        self.hooks: dict[str, HookInfo] = {hook.name: hook for hook in self.meta.hooks}
        self.commits: list[Commit] = [read_commit(self.path, shard) for shard in committed_shards(self.path)]
        self._starts = np.cumsum([0, *(commit.valid_rows for commit in self.commits)])
        self._maps: dict[tuple[str, int], np.ndarray | None] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._documents: list[dict[str, Any]] | None = None

    @property
    def n_rows(self) -> int:
        """Committed valid rows."""
        return int(self._starts[-1])

    @property
    def flagged_rows(self) -> int:
        return sum(commit.flagged_rows for commit in self.commits)

    @property
    def complete(self) -> bool:
        """Whether every shard of the plan is committed."""
        return len(self.commits) == self.meta.n_shards

    @property
    def documents(self) -> list[dict[str, Any]]:
        """name, bytes, sha256, exact_offsets of each document; the `doc` column is the index."""
        if self._documents is None:
            try:
                with (self.path / DOCS_FILE).open(encoding="utf-8") as file:
                    self._documents = [json.loads(line) for line in file]
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path / DOCS_FILE} is damaged ({error}); extract into a new store") from None
        return self._documents

    def column(self, name: str) -> np.ndarray:
        """One of doc, window, pos, token, byte_offset, flags of all rows, (n_rows,), read-only."""
        if name not in self.meta.columns:
            raise StoreError(f"the store has no column {name!r}; it has {', '.join(self.meta.columns)}")
        if name not in self._columns:
            parts = [self._shard_column(name, commit) for commit in self.commits]
            column = np.concatenate([np.empty(0, self.meta.columns[name]), *parts])
            column.flags.writeable = False
            self._columns[name] = column
        return self._columns[name]

    def rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Rows `start : stop` as float32 (n, D), whatever shards they lie in."""
        return to_float32(self.stored_rows(hook, start, stop), self.meta.hook(hook).dtype)

    def stored_rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Like `rows`, in the format on disk. May be a read-only view of the file."""
        info = self.meta.hook(hook)
        if not 0 <= start <= stop <= self.n_rows:
            raise StoreError(f"rows {start}:{stop} are not in the store, which has {self.n_rows}")
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for index in range(first, len(self.commits)):
            low, high = max(start, int(self._starts[index])), min(stop, int(self._starts[index + 1]))
            if low >= high:
                break
            offset = int(self._starts[index])
            parts.append(self._shard_rows(info, self.commits[index], low - offset, high - offset))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, info.width), STORED_DTYPES[info.dtype]), *parts])

    def stats(self, hook: str) -> HookStats:
        """Mean, variance, norm quantiles, ... over the unflagged rows, from the commits: no data is read."""
        self.meta.hook(hook)
        return merge_stats([commit.stats[hook] for commit in self.commits])

    def batches(
        self,
        hook: str,
        *,
        batch_rows: int,
        seed: int,
        exclude_flags: int = FLAGS_ALL,
        buffer_rows: int = DEFAULT_BUFFER_ROWS,
        block_starts: np.ndarray | None = None,
    ) -> ShuffledBatches:
        """Shuffled float32 batches without end, resumable: `sae.trainer.BatchSource`."""
        return ShuffledBatches(
            self,
            hook,
            batch_rows=batch_rows,
            seed=seed,
            exclude_flags=exclude_flags,
            buffer_rows=buffer_rows,
            block_starts=block_starts,
        )

    def verify(self, *, checksums: bool = True) -> list[Problem]:
        """Every committed file against its size and, with `checksums`, its sha256. Empty: the store is whole."""
        problems = []
        for commit in self.commits:
            for relative, expected in commit.files.items():
                what = _wrong(self.path / relative, expected, checksums)
                if what:
                    problems.append(Problem(shard=commit.shard, file=relative, what=what))
        return problems

    def _shard_rows(self, info: HookInfo, commit: Commit, start: int, stop: int) -> np.ndarray:
        mapped = self._mapped(info, commit)
        if mapped is not None:
            return mapped[start:stop]
        first = commit.shard * self.meta.shard_rows
        return self._through_zarr(info.array_path, commit, slice(first + start, first + stop))

    def _mapped(self, info: HookInfo, commit: Commit) -> np.ndarray | None:
        """The shard as a read-only memory map (S, D), or None where the file is not plain row-major bytes."""
        key = (info.name, commit.shard)
        if key not in self._maps:
            relative = shard_file(info.array_path, commit.shard, 2)
            self._check_size(relative, commit)
            plain = self.fast_path and self._is_plain(info, self.path / relative)
            shape = (self.meta.shard_rows, info.width)
            self._maps[key] = (
                np.memmap(self.path / relative, STORED_DTYPES[info.dtype], "r", 0, shape) if plain else None
            )
        return self._maps[key]

    def _is_plain(self, info: HookInfo, file: Path) -> bool:
        """Whether `file` is the rows one after another, then the shard index: size, codecs and index say so."""
        chunk_bytes = self.meta.chunk_rows * info.width * np.dtype(STORED_DTYPES[info.dtype]).itemsize
        n_chunks = self.meta.shard_rows // self.meta.chunk_rows
        if file.stat().st_size != n_chunks * chunk_bytes + index_size(n_chunks):
            return False
        if not _codecs_are_plain(self.path / info.array_path / "zarr.json", self.meta.chunk_rows, info.width):
            return False
        with file.open("rb") as handle:
            handle.seek(n_chunks * chunk_bytes)
            index = np.frombuffer(handle.read(16 * n_chunks), "<u8").reshape(n_chunks, 2)
        in_order = np.arange(n_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
        return bool((index[:, 0] == in_order).all() and (index[:, 1] == chunk_bytes).all())

    def _shard_column(self, name: str, commit: Commit) -> np.ndarray:
        array_path = f"columns/{name}"
        self._check_size(shard_file(array_path, commit.shard, 1), commit)
        first = commit.shard * self.meta.shard_rows
        return self._through_zarr(array_path, commit, slice(first, first + commit.valid_rows))

    def _through_zarr(self, array_path: str, commit: Commit, rows: slice) -> np.ndarray:
        try:
            return np.asarray(zarr.open_array(self.path / array_path, mode="r")[rows])
        except (ValueError, KeyError, OSError) as error:
            raise self._damaged(commit, f"{array_path} cannot be read ({error})") from None

    def _check_size(self, relative: str, commit: Commit) -> None:
        """zarr reads a missing file as zeros, so its size is compared with the commit before."""
        expected = commit.files.get(relative, {}).get("bytes")
        try:
            size = (self.path / relative).stat().st_size
        except FileNotFoundError:
            raise self._damaged(commit, f"{relative} is missing") from None
        if size != expected:
            raise self._damaged(commit, f"{relative} has {size} bytes, not {expected}")

    def _damaged(self, commit: Commit, what: str) -> StoreError:
        return StoreError(
            f"shard {commit.shard} of {self.path} is damaged: {what}; `ggscope extract resume=RUN` captures it again"
        )


def _wrong(file: Path, expected: dict[str, Any], checksums: bool) -> str:
    """What is wrong with a committed file; empty when nothing is."""
    try:
        with file.open("rb") as handle:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"has {size} bytes, not {expected['bytes']}"
            if checksums and hashlib.file_digest(handle, "sha256").hexdigest() != expected["sha256"]:
                return "has another sha256 than its commit"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _codecs_are_plain(metadata: Path, chunk_rows: int, width: int) -> bool:
    """Whether an array is sharded, its chunks are whole rows, and nothing but little-endian bytes is applied."""
    try:
        codecs = json.loads(metadata.read_text("utf-8"))["codecs"]
        inner = codecs[0]["configuration"]
        little = [{"name": "bytes", "configuration": {"endian": "little"}}]
        return (
            len(codecs) == 1
            and codecs[0]["name"] == "sharding_indexed"
            and inner["chunk_shape"] == [chunk_rows, width]
            and inner["codecs"] == little
            and inner["index_location"] == "end"
            and inner["index_codecs"] == [*little, {"name": "crc32c"}]
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False
