"""A file as llama.cpp is to see it: bytes of our own, then ranges of a real file. Where glibc and a compiler are."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import LlamaError
from sae.native.build import BuildError, build

SOURCE = Path(__file__).with_name("parts.c")
_P, _I = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes at `start`, which lie in the file from `source` on."""

    start: int
    length: int
    source: int


@contextmanager
def stream_of(path: Path, head: bytes, parts: Sequence[Part], size: int) -> Iterator[int]:
    """A C `FILE *` of `size` bytes, opened for reading: `head`, then `parts` (ascending); zero where neither is.

    LlamaError where it cannot be had, OSError for a file that cannot be read.
    """
    library = _library()
    table_N3 = np.array([(part.start, part.length, part.source) for part in parts], np.int64).reshape(-1, 3)
    file = os.open(path, os.O_RDONLY)
    try:
        made = library.ggscope_open_parts(file, size, head, len(head), table_N3.ctypes.data, len(parts))
        if not made:
            raise LlamaError("the C library cannot make a stream")
        try:
            yield made
        finally:
            library.ggscope_close_parts(made)
    finally:
        os.close(file)


@functools.cache
def _library() -> Any:
    """parts.c; LlamaError without a compiler, or with a C library that has no `fopencookie`."""
    try:
        library = ctypes.CDLL(str(build("parts", [SOURCE], [("-O2", "-Werror=implicit-function-declaration")])))
    except (BuildError, OSError) as error:
        raise LlamaError(f"no stream of parts of a file: {error}") from error
    library.ggscope_open_parts.argtypes = (ctypes.c_int, _I, ctypes.c_char_p, _I, _P, _I)
    library.ggscope_open_parts.restype = _P
    library.ggscope_close_parts.argtypes = (_P,)
    return library
