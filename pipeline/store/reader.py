"""Reading a store: rows of committed shards, by ranges of bytes where the shard files allow it.

Letters: N rows, D width of a hook. Row numbers count the valid rows of the committed shards in shard
order; in a finished store they are the plan's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from pipeline.corpus.windows import FLAGS_ALL
from sae.errors import StoreError

from .backends import Backend, Location, open_backend
from .checks import parse_object
from .commits import Commit, committed_shards, read_commit, read_shard_stats
from .documents import document_of
from .encode import ARRAY_METADATA, is_plain, plain_index, shard_key
from .rows import RowBuffer, will_read
from .schema import DOCS_FILE, STORED_DTYPES, HookInfo, index_size, read_meta, to_float32
from .shuffle import ShuffledBatches
from .statistics import Fold, HookStats
from .verify import Problem, wrong_file

DEFAULT_BUFFER_ROWS = 131_072
COMMITS_AT_ONCE = 8
# What zarr raises of metadata that are not a store's.
ODD_METADATA = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)


class ActivationStore:
    """The committed rows of the store at `location`, open for reading; extract may still be adding shards.

    `fast_path=False` reads through the zarr API only. `damaged_commits`: shards whose commit is damaged are left out
    and told in `damaged`, instead of an error. Memory does not grow with what is read.
    Raises StoreError when there is no store, or (on the first read of it) a shard is damaged: the
    message names the shard and how to redo it.
    """

    def __init__(self, location: Location | Backend, *, fast_path: bool = True, damaged_commits: bool = False) -> None:
        self.backend = open_backend(location)
        self.path: Location = self.backend.location
        self.fast_path = fast_path
        self.meta = read_meta(self.backend)
        self.hooks: dict[str, HookInfo] = {hook.name: hook for hook in self.meta.hooks}
        self.damaged: list[Problem] = []
        self.commits = self._read_commits(damaged_commits)
        self._starts = np.cumsum([0, *(commit.valid_rows for commit in self.commits)])
        self._plain: dict[str, bool] = {}  # shard file -> whether it is its rows, checked on the first read
        self._plain_arrays: dict[str, bool] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._stats: dict[str, HookStats] = {}

    def _read_commits(self, damaged_commits: bool) -> list[Commit]:
        def read(shard: int) -> Commit | None:
            try:
                return read_commit(self.backend, shard, self.meta.shard_rows)
            except StoreError as error:
                if not damaged_commits:
                    raise
                self.damaged.append(Problem(shard=shard, file="commit", what=f"cannot be used: {error}"))
                return None

        found = self.backend.each(read, committed_shards(self.backend))
        return [commit for commit in found if commit is not None]

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

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """name, bytes, sha256, exact_offsets of each document; the `doc` column is the index."""
        return list(self.iter_documents())

    def iter_documents(self) -> Iterator[dict[str, Any]]:
        """The same, one after another from the file."""
        try:
            size, pending = self.backend.size(DOCS_FILE), b""
            if size is None:
                raise ValueError("it is missing")
            for chunk in self.backend.chunks(DOCS_FILE, size):
                *lines, pending = (pending + chunk).split(b"\n")
                yield from (document_of(line) for line in lines)
            if pending:
                raise ValueError("it ends within a line")
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}/{DOCS_FILE} is damaged ({error}); extract into a new store") from None

    def column(self, name: str) -> np.ndarray:
        """One of doc, window, pos, token, byte_offset, flags of all rows, (n_rows,), read-only; kept in memory."""
        if name not in self._columns:
            column = self.column_rows(name, 0, self.n_rows)
            column.flags.writeable = False
            self._columns[name] = column
        return self._columns[name]

    def column_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start : stop` of a column. May be read-only."""
        if name not in self.meta.columns:
            raise StoreError(f"the store has no column {name!r}; it has {', '.join(self.meta.columns)}")
        return self._read(f"columns/{name}", np.dtype(self.meta.columns[name]), (), start, stop)

    def shard_column(self, name: str, commit: Commit) -> np.ndarray:
        """A column of one shard's valid rows."""
        return self._shard_rows(f"columns/{name}", np.dtype(self.meta.columns[name]), (), commit, 0, commit.valid_rows)

    def rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Rows `start : stop` as float32 (n, D), whatever shards they lie in."""
        return to_float32(self.stored_rows(hook, start, stop), self.meta.hook(hook).dtype)

    def stored_rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Like `rows`, in the format on disk. May be read-only."""
        info = self.meta.hook(hook)
        return self._read(info.array_path, np.dtype(STORED_DTYPES[info.dtype]), (info.width,), start, stop)

    def read_into(self, hook: str, rows_N: np.ndarray, buffer: RowBuffer, slots_N: np.ndarray) -> None:
        """Rows (ascending) into slots of a buffer, from local shard files straight to their places."""
        info = self.meta.hook(hook)
        dtype, width, start = np.dtype(STORED_DTYPES[info.dtype]), (info.width,), int(rows_N[0])
        for commit, low, high in self._spans(start, int(rows_N[-1]) + 1):
            part = slice(*np.searchsorted(rows_N, (start, start + high - low)).tolist())
            if part.stop > part.start and not self._read_file(
                info, commit, low, rows_N[part], start, buffer, slots_N[part]
            ):
                stored = self._shard_rows(info.array_path, dtype, width, commit, low, high)
                buffer.put(slots_N[part], stored, rows_N[part], start)
            start += high - low

    def _read_file(
        self,
        info: HookInfo,
        commit: Commit,
        low: int,
        rows_n: np.ndarray,
        first: int,
        buffer: RowBuffer,
        slots_n: np.ndarray,
    ) -> bool:
        """`first` is the number of row `low` of the shard. False where its file cannot be read that way."""
        key = shard_key(info.array_path, commit.shard, 2)
        row_bytes = info.width * np.dtype(STORED_DTYPES[info.dtype]).itemsize
        try:
            if not self._plain_file(info.array_path, key, commit, row_bytes, is_hook=True):
                return False
            with self.backend.descriptor(key) as file:
                if file is None:
                    return False
                will_read(file, low * row_bytes, int(rows_n[-1] + 1 - first) * row_bytes)
                return buffer.read(file, low * row_bytes, slots_n, rows_n, first)
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise self._damaged(commit, f"{info.array_path} cannot be read ({error})") from None

    def stats(self, hook: str) -> HookStats:
        """Mean, variance, norm quantiles, ... over the unflagged rows, from the commits: no data is read."""
        self.meta.hook(hook)
        return self._fold([hook])[hook]

    def all_stats(self) -> dict[str, HookStats]:
        """`stats` of every hook, in one pass over the commits."""
        return self._fold(list(self.hooks))

    def _fold(self, hooks: Sequence[str]) -> dict[str, HookStats]:
        """Statistics of some hooks, kept once known. At any time a few commits are in memory."""
        widths = {hook: self.hooks[hook].width for hook in hooks if hook not in self._stats}
        if widths:
            folds = {hook: Fold(width) for hook, width in widths.items()}
            shards = [commit.shard for commit in self.commits]
            for start in range(0, len(shards), COMMITS_AT_ONCE):
                several = shards[start : start + COMMITS_AT_ONCE]
                for found in self.backend.each(lambda shard: read_shard_stats(self.backend, shard, widths), several):
                    for hook, fold in folds.items():
                        fold.add(found[hook])
            self._stats |= {hook: fold.result() for hook, fold in folds.items()}
        return {hook: self._stats[hook] for hook in hooks}

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
            for key, expected in commit.files.items():
                what = wrong_file(self.backend, key, expected, checksums)
                if what:
                    problems.append(Problem(shard=commit.shard, file=key, what=what))
        return problems

    def _read(self, array_path: str, dtype: np.dtype, width: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Rows `start : stop` of an array, from whichever shards hold them."""
        if not 0 <= start <= stop <= self.n_rows:
            raise StoreError(f"rows {start}:{stop} are not in the store, which has {self.n_rows}")
        spans = list(self._spans(start, stop))

        def read(span: tuple[Commit, int, int]) -> np.ndarray:
            return self._shard_rows(array_path, dtype, width, *span)

        if len(spans) == 1:
            return read(spans[0])
        return np.concatenate([np.empty((0, *width), dtype), *self.backend.each(read, spans)])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Commit, int, int]]:
        """The shards of the rows `start : stop`, with first and past-the-last row inside each."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for index in range(first, len(self.commits)):
            offset = int(self._starts[index])
            low, high = max(start, offset), min(stop, int(self._starts[index + 1]))
            if low >= high:
                return
            yield self.commits[index], low - offset, high - offset

    def _shard_rows(
        self, array_path: str, dtype: np.dtype, width: tuple[int, ...], commit: Commit, start: int, stop: int
    ) -> np.ndarray:
        key = shard_key(array_path, commit.shard, 1 + len(width))
        row_bytes = dtype.itemsize * int(np.prod(width, dtype=np.int64))
        plain = self._plain_file(array_path, key, commit, row_bytes, is_hook=bool(width))
        try:
            if not plain:
                return self._through_zarr(array_path, dtype, width, commit.shard * self.meta.shard_rows, start, stop)
            data = self.backend.get_range(key, start * row_bytes, (stop - start) * row_bytes)
            return np.frombuffer(data, dtype).reshape(stop - start, *width)
        except (ValueError, KeyError, OSError) as error:
            raise self._damaged(commit, f"{array_path} cannot be read ({error})") from None

    def _plain_file(self, array_path: str, key: str, commit: Commit, row_bytes: int, *, is_hook: bool) -> bool:
        """`_is_plain`, found once for each file."""
        if key not in self._plain:
            self._check_size(key, commit)
            self._plain[key] = self.fast_path and self._is_plain(array_path, key, commit, row_bytes, is_hook=is_hook)
        return self._plain[key]

    def _is_plain(self, array_path: str, key: str, commit: Commit, row_bytes: int, *, is_hook: bool) -> bool:
        """Whether the file `key` is the rows one after another, then the shard index: size, codecs and index say so."""
        rows, chunk_rows = self.meta.shard_rows, self.meta.chunk_rows
        n_chunks = rows // chunk_rows if is_hook else 0
        index_bytes = index_size(n_chunks) if is_hook else 0
        if commit.files[key]["bytes"] != rows * row_bytes + index_bytes:
            return False
        if array_path not in self._plain_arrays:
            metadata = self.backend.get(f"{array_path}/{ARRAY_METADATA}")
            self._plain_arrays[array_path] = is_plain(metadata, rows, chunk_rows)
        if not self._plain_arrays[array_path]:
            return False
        if not is_hook:
            return True
        index = self.backend.get_range(key, rows * row_bytes, index_bytes)
        return index == plain_index(n_chunks, chunk_rows * row_bytes)

    def _through_zarr(
        self, array_path: str, dtype: np.dtype, width: tuple[int, ...], first: int, start: int, stop: int
    ) -> np.ndarray:
        parse_object(self.backend.get(f"{array_path}/{ARRAY_METADATA}"))
        try:
            array: Any = zarr.open_array(self.backend.open_zarr_store(), path=array_path, mode="r")
        except ODD_METADATA as error:
            raise ValueError(f"zarr refuses its {ARRAY_METADATA}: {' '.join(str(error).split())}") from None
        if array.shape != (self.meta.padded_rows, *width) or array.dtype != dtype:
            raise ValueError(f"its {ARRAY_METADATA} says {array.shape} of {array.dtype}")
        try:
            return np.asarray(array[first + start : first + stop])
        except ODD_METADATA as error:
            raise ValueError(f"zarr cannot decode it: {' '.join(str(error).split())}") from None

    def _check_size(self, key: str, commit: Commit) -> None:
        """zarr reads a missing file as zeros, so its size is compared with the commit before."""
        expected = commit.files.get(key, {}).get("bytes")
        size = self.backend.size(key)
        if size is None:
            raise self._damaged(commit, f"{key} is missing")
        if size != expected:
            raise self._damaged(commit, f"{key} has {size} bytes, not {expected}")

    def _damaged(self, commit: Commit, what: str) -> StoreError:
        return StoreError(
            f"shard {commit.shard} of {self.path} is damaged: {what}; `ggscope extract resume=RUN` captures it again"
        )
