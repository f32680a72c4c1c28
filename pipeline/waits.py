"""How the threads of torch and of llama.cpp wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "GOMP_SPINCOUNT"
SHORT = "3000"  # with 1000 a quiet machine loses 2 to 3 %, with 10000 a busy one twice the time


@contextmanager
def asleep() -> Iterator[None]:
    """Import torch or llama_cpp in here for the first time, and its OpenMP threads soon sleep where they wait; the user's
    own settings are left alone.

    By default they spin for long, and beside a busy process they take the core from the thread they wait for: a training
    step then takes several times as long as on one thread, a token of a small model a thousand times as long as on a
    quiet machine. GNU's OpenMP reads the variable when it is loaded. Child processes do not inherit it: what they import
    is not known here.
    """
    if SPINS in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[SPINS] = SHORT
    try:
        yield
    finally:
        del os.environ[SPINS]
