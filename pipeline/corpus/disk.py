"""Columns and documents that stay on disk: read by position, so that memory does not grow with what was read.

A memory map would count every page it touched; `pread` does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from .table import DocumentInfo

GAP_ITEMS = 1024  # items nearer to each other than this are read together
PIECE_BYTES = 1 << 18
RUN_ITEMS = 1 << 20  # most that are read at once for an index array


class DiskFile:
    """A file read by position. It may be pickled, and opens itself again in another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` on. Raises EOFError where the file ends before."""
        while len(into):
            part = os.pread(self._descriptor, min(len(into), PIECE_BYTES), start)
            if not part:
                raise EOFError(f"{self.path} became shorter while it was read")
            into[: len(part)] = part
            start, into = start + len(part), into[len(part) :]

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def __reduce__(self) -> tuple[type[DiskFile], tuple[Path]]:
        return type(self), (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class DiskColumn:
    """A column of a table as a file: `len`, `[row]`, `[start:stop]`, `[row array]`, `np.asarray`.

    Every access reads from the file and returns a new array.
    """

    def __init__(self, path: Path, dtype: str | np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self._file = DiskFile(path)
        self._length = self._file.size_bytes // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int]:
        return (self._length,)

    @property
    def ndim(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(self._length)
            if step == 1:
                return self._read(start, max(stop, start))
            return self[np.arange(start, stop, step)]
        if isinstance(key, int | np.integer):
            row = int(key) + (self._length if key < 0 else 0)
            if not 0 <= row < self._length:
                raise IndexError(f"row {key} of a column of {self._length}")
            return self._read(row, row + 1)[0]
        row_N = np.asarray(key)
        if row_N.dtype == bool:
            if row_N.shape != self.shape:
                raise IndexError(f"a mask of shape {row_N.shape} for a column of {self._length}")
            row_N = np.flatnonzero(row_N)
        return self._gather(row_N)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self._length, RUN_ITEMS):
            yield from self._read(start, min(start + RUN_ITEMS, self._length))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self._read(0, self._length)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"DiskColumn({self._length} x {self.dtype}, {self._file.path})"

    def _read(self, start: int, stop: int) -> np.ndarray:
        array = np.empty(stop - start, self.dtype)
        self._file.read_into(start * self.dtype.itemsize, array.view(np.uint8).data)
        return array

    def _gather(self, row_N: np.ndarray) -> np.ndarray:
        flat_N = row_N.reshape(-1).astype(np.int64)
        flat_N = np.where(flat_N < 0, flat_N + self._length, flat_N)
        if flat_N.size and not (flat_N.min() >= 0 and flat_N.max() < self._length):
            raise IndexError(f"rows {row_N.min()}..{row_N.max()} of a column of {self._length}")
        found = np.empty(len(flat_N), self.dtype)
        order_N = np.argsort(flat_N, kind="stable")
        sorted_N = flat_N[order_N]
        at = 0
        while at < len(sorted_N):
            limit = int(np.searchsorted(sorted_N, sorted_N[at] + RUN_ITEMS))
            gaps = np.flatnonzero(np.diff(sorted_N[at:limit]) > GAP_ITEMS)
            stop = at + int(gaps[0]) + 1 if len(gaps) else limit
            first = int(sorted_N[at])
            run = self._read(first, int(sorted_N[stop - 1]) + 1)
            found[order_N[at:stop]] = run[sorted_N[at:stop] - first]
            at = stop
        return found.reshape(row_N.shape)


class DiskDocuments(Sequence[DocumentInfo]):
    """The documents of a table, one JSON line each; `starts` says where each line begins."""

    def __init__(self, path: Path, starts: DiskColumn) -> None:
        self._file, self._starts = DiskFile(path), starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, key: int) -> DocumentInfo: ...
    @overload
    def __getitem__(self, key: slice) -> list[DocumentInfo]: ...
    def __getitem__(self, key: int | slice) -> DocumentInfo | list[DocumentInfo]:
        if isinstance(key, slice):
            return [self[index] for index in range(*key.indices(len(self)))]
        index = int(key) + (len(self) if key < 0 else 0)
        start = int(self._starts[index])  # raises IndexError
        stop = int(self._starts[index + 1]) if index + 1 < len(self) else self._file.size_bytes
        line = bytearray(stop - start)
        self._file.read_into(start, memoryview(line))
        return DocumentInfo(**json.loads(line))

    def __iter__(self) -> Iterator[DocumentInfo]:
        with self._file.path.open("rb") as lines:
            for line in lines:
                yield DocumentInfo(**json.loads(line))
