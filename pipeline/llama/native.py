"""The compiled filter in front of the eval callback, built with the machine's C compiler when it is first wanted.

It decides nothing: it leaves out questions to which the Python callback would answer "no". Without a compiler the
Python callback is asked about every node, which costs a few microseconds each, and much more beside a busy thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae.native.build import BuildError, build

from .symbols import NAME_OFFSET

SOURCE = Path(__file__).with_name("ask.c")
NAME_BYTES, MAX_NAMES = 64, 256  # as in ask.c
PYTHON_EVERY = 64  # nodes between two looks at Python, where signals are noticed
_P = ctypes.c_void_p


class AskFilter(ctypes.Structure):
    """`struct filter` of ask.c; `function` is what llama.cpp calls, with this structure's address as user data."""

    _fields_ = (
        ("python", _P),
        ("name_offset", ctypes.c_size_t),
        ("always", ctypes.c_int),
        ("every", ctypes.c_int),
        ("asked", ctypes.c_int),
        ("count", ctypes.c_int),
        ("names", (ctypes.c_char * NAME_BYTES) * MAX_NAMES),
    )

    def __init__(self, python: Any) -> None:
        super().__init__(python=ctypes.cast(python, _P).value, name_offset=NAME_OFFSET, always=1, every=PYTHON_EVERY)

    def watch(self, names: Iterable[bytes]) -> bool:
        """Ask Python about nodes of these names; False where they are too many to tell apart here."""
        wanted = {name for name in names if name}
        self.count = min(len(wanted), MAX_NAMES)
        for place, name in zip(self.names, wanted, strict=False):
            place.value = name
        return len(wanted) <= MAX_NAMES


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
