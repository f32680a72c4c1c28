"""Memory in pages of 2 MB (Linux): reading a matrix with every token costs a third more where its addresses are looked up
page by page of 4 KB. Hints only: what the system makes of them changes no number. Without torch."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import numpy as np

BYTES = 2 << 20  # of a page
LEAST_BYTES = 1 << 20  # smaller matrices gain nothing
_COLLAPSE = 25  # MADV_COLLAPSE (Linux 6.1): make large pages of what is there now
_P, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def room(n_bytes: int) -> int:
    """Bytes to ask for where so many are to begin and end with a page."""
    return n_bytes + 2 * BYTES


def start_in(address: int) -> int:
    """The first page from an address on."""
    return -(-address // BYTES) * BYTES


def expect(address: int, n_bytes: int) -> None:
    """To be called before the memory is written to, with all of its `room`."""
    _advise(address, n_bytes, getattr(mmap, "MADV_HUGEPAGE", None))


def settle(address: int, n_bytes: int) -> None:
    """To be called once the memory is written: parts of it may have been in use before, in small pages."""
    for page in range(address // BYTES * BYTES, address + n_bytes, BYTES):
        _advise(page, BYTES, _COLLAPSE)


def array(n_bytes: int) -> np.ndarray:
    """uint8 (n_bytes,) of zeros, fresh from the system: memory that a program gave back may be in small pages for good.

    MemoryError where there is not enough.
    """
    try:
        private = mmap.mmap(-1, room(n_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{n_bytes:,} bytes: {error}") from None
    whole = np.frombuffer(private, np.uint8)
    expect(whole.ctypes.data, whole.nbytes)
    start = start_in(whole.ctypes.data) - whole.ctypes.data
    return whole[start : start + n_bytes]


def _advise(address: int, n_bytes: int, advice: int | None) -> None:
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + n_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = _madvise()
    if madvise is not None and advice is not None and length > 0:
        madvise(_P(start), _SIZE(length), advice)


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
