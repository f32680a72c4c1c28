"""The compiled filter in front of the eval callback, built with the machine's C compiler when it is first wanted.

It leaves out questions to which the Python callback would answer "no", and copies single rows that are only read.
Without a compiler the Python callback is asked about every node, which costs a few microseconds each, and much more
beside a busy thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae.native.build import BuildError, build

from .symbols import TYPE_F32, GgmlTensor, op_name, tensor_copy, tensor_get

SOURCE = Path(__file__).with_name("ask.c")
NAME_BYTES, MAX_NAMES, MAX_READS = 64, 256, 64  # as in ask.c
_BEGIN = -1  # as in ask.c
PYTHON_EVERY = 64  # nodes between two looks at Python, where a signal ends a decode with hooks that are called
_P = ctypes.c_void_p


class RowRead(ctypes.Structure):
    """`struct read` of ask.c: where the one row of a node goes, and what is called when it is there."""

    _fields_ = (
        ("name", ctypes.c_char * NAME_BYTES),
        ("op", ctypes.c_char * NAME_BYTES),
        ("width", ctypes.c_int64),
        ("into", _P),
        ("tensor", _P),
        ("then", _P),
        ("argument", _P),
        ("occurrence", ctypes.c_int),
        ("seen", ctypes.c_int),
        ("done", ctypes.c_int),
    )


class _Layout(ctypes.Structure):
    _fields_ = (
        *((field, ctypes.c_size_t) for field in ("name", "op", "type", "ne", "nb")),
        ("f32", ctypes.c_int),
        ("size", ctypes.c_size_t),
        ("op_name", _P),
        ("get", _P),
        ("copy", _P),
    )

    def __init__(self) -> None:
        offsets = {field: getattr(GgmlTensor, field).offset for field in ("name", "op", "type", "ne", "nb")}
        named: dict[str, Any] = {"op_name": op_name, "get": tensor_get, "copy": tensor_copy}
        functions = {name: ctypes.cast(found, _P).value for name, found in named.items()}
        super().__init__(f32=TYPE_F32, size=ctypes.sizeof(GgmlTensor), **offsets, **functions)


class AskFilter(ctypes.Structure):
    """`struct filter` of ask.c; `function` is what llama.cpp calls, with this structure's address as user data."""

    _fields_ = (
        ("python", _P),
        ("at", _Layout),
        ("always", ctypes.c_int),
        ("every", ctypes.c_int),
        ("asked", ctypes.c_int),
        ("count", ctypes.c_int),
        ("read_count", ctypes.c_int),
        ("missing", ctypes.c_int),
        ("names", (ctypes.c_char * NAME_BYTES) * MAX_NAMES),
        ("reads", RowRead * MAX_READS),
    )

    def __init__(self, python: Any) -> None:
        super().__init__(python=ctypes.cast(python, _P).value, at=_Layout(), always=1)

    def watch(self, names: Iterable[bytes]) -> bool:
        """Ask Python about nodes of these names; False where they are too many to tell apart here."""
        wanted = {name for name in names if name}
        self.count = min(len(wanted), MAX_NAMES)
        for place, name in zip(self.names, wanted, strict=False):
            place.value = name
        return len(wanted) <= MAX_NAMES

    def read(self, reads: Sequence[RowRead]) -> None:
        """Copy these rows, at most MAX_READS, in the decodes that follow, and ask Python about no node."""
        self.count, self.every, self.read_count = 0, 0, len(reads)
        for i, row in enumerate(reads):
            self.reads[i] = row

    def begin(self) -> None:
        """The next decode is to give every row."""
        self.missing = _BEGIN


@functools.cache
def ask_function() -> Any:
    """The compiled `ggscope_ask`, or None where it cannot be had."""
    try:
        return ctypes.CDLL(str(_built())).ggscope_ask
    except (BuildError, OSError, AttributeError):
        return None


def _built() -> Path:
    """The library, from the user's cache where it was built before."""
    return build("ask", [SOURCE], [("-O2",)])
