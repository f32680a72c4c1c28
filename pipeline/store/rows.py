"""Rows by their numbers, to and from a buffer in the format on disk: compiled where a compiler is, else numpy.

Both ways give the same bits. Letters: M buffer rows, N rows asked for, D width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sae.native.build import BuildError, build

from .schema import STORED_DTYPES, is_finite, to_float32

SOURCE = Path(__file__).with_name("rows.c")
FLAGS = (("-O3", "-march=native"), ("-O3", "-mcpu=native"), ("-O3",))
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
UNUSED = 3  # references to an array that only the list, the loop and the question itself hold
_P, _I = ctypes.c_void_p, ctypes.c_int64

_log = logging.getLogger(__name__)


class RowBuffer:
    """M rows of width D in the format on disk (`dtype`: logical). Threads may put rows while others are taken."""

    def __init__(self, rows: int, width: int, dtype: str, *, compiled: bool = True) -> None:
        self.dtype = dtype
        self._stored_MD = np.empty((rows, width), STORED_DTYPES[dtype])
        self._library = _library() if compiled else None
        self._finite = True  # of every row put so far: numpy then converts faster

    def put(self, slots_N: np.ndarray, stored_RD: np.ndarray, rows_N: np.ndarray, first: int) -> None:
        """Slot n becomes row `rows_N[n] - first` of `stored_RD`."""
        table_MD = self._stored_MD
        if self._library is None:
            self._finite = self._finite and is_finite(stored_RD, self.dtype)
            table_MD[slots_N] = stored_RD if len(stored_RD) == len(rows_N) else stored_RD[rows_N - first]
            return
        slots_N, rows_N, data = _numbers(slots_N), _numbers(rows_N), np.ascontiguousarray(stored_RD)
        assert data.dtype == table_MD.dtype, f"{data.dtype} into a buffer of {table_MD.dtype}"
        row_bytes = table_MD.strides[0]
        self._library.ggscope_put_rows(
            table_MD.ctypes.data,
            row_bytes,
            slots_N.ctypes.data,
            data.ctypes.data,
            rows_N.ctypes.data,
            first,
            len(rows_N),
        )

    def read(self, file: int, offset: int, slots_N: np.ndarray, rows_N: np.ndarray, first: int) -> bool:
        """`put` from the open `file`, whose rows (from `first` on) begin at byte `offset`. False: not without a compiler.

        Raises OSError, EOFError where the file ends too soon.
        """
        if self._library is None:
            return False
        table_MD = self._stored_MD
        slots_N, rows_N = _numbers(slots_N), _numbers(rows_N)
        failed = self._library.ggscope_read_rows(
            file,
            offset,
            table_MD.ctypes.data,
            table_MD.strides[0],
            slots_N.ctypes.data,
            rows_N.ctypes.data,
            first,
            len(rows_N),
        )
        if failed < 0:
            raise EOFError("the file ends too soon")
        if failed:
            raise OSError(failed, os.strerror(failed))
        return True

    def take_into(self, slots_N: np.ndarray, out_ND: np.ndarray) -> None:
        """`out_ND` (float32, contiguous rows) becomes the slots' rows."""
        table_MD = self._stored_MD
        if self._library is None:
            out_ND[...] = to_float32(table_MD[slots_N], self.dtype, finite=self._finite)
            return
        assert out_ND.dtype == np.float32
        assert out_ND.flags.c_contiguous
        slots_N = _numbers(slots_N)
        self._library.ggscope_take_rows(
            table_MD.ctypes.data,
            KINDS[self.dtype],
            table_MD.shape[1],
            slots_N.ctypes.data,
            len(slots_N),
            out_ND.ctypes.data,
        )


class BatchArrays:
    """Float32 arrays (B, D) for batches, used again once nobody holds them or a view of them.

    A fresh array of some megabytes costs more than filling it: the system hands out every page of it zeroed.
    """

    def __init__(self, rows: int, width: int, most: int = 4) -> None:
        self._shape, self._most = (rows, width), most
        self._made: list[np.ndarray] = []

    def next(self) -> np.ndarray:
        """An array of anything."""
        for x_BD in self._made:
            if sys.getrefcount(x_BD) == UNUSED:
                return x_BD
        fresh_BD = np.empty(self._shape, np.float32)
        if len(self._made) < self._most:
            self._made.append(fresh_BD)
        return fresh_BD


def will_read(file: int, offset: int, length: int) -> None:
    """Ask the disk for a whole range at once: the kernel's own read-ahead asks for small parts one after another."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)


def _numbers(rows_N: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows_N, np.int64)


@functools.cache
def _library() -> Any:
    """rows.c, or None where it cannot be compiled."""
    try:
        library = ctypes.CDLL(str(build("rows", [SOURCE], FLAGS)))
    except (BuildError, OSError) as error:
        _log.warning("reading stores without the compiled row copy, more slowly: %s", error)
        return None
    library.ggscope_put_rows.argtypes = (_P, _I, _P, _P, _P, _I, _I)
    library.ggscope_take_rows.argtypes = (_P, _I, _I, _P, _I, _P)
    library.ggscope_read_rows.argtypes = (ctypes.c_int, _I, _P, _I, _P, _P, _I, _I)
    library.ggscope_read_rows.restype = ctypes.c_int
    library.ggscope_put_rows.restype = library.ggscope_take_rows.restype = None
    return library
