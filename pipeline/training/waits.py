"""How torch's threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "GOMP_SPINCOUNT"
SHORT = "3000"  # with 1000 a quiet machine loses 3 %, with 10000 a busy one twice the time


@contextmanager
def asleep() -> Iterator[None]:
    """Import torch in here for the first time, and its OpenMP threads soon sleep where they wait; the user's own
    settings are left alone.

    By default they spin for long, and beside busy processes they take the core from the thread they wait for: a step
    then takes several times as long as on one thread. GNU's OpenMP reads the variable when torch loads it. Child
    processes do not inherit it: llama.cpp's threads wait for each other far more often.
    """
    if SPINS in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[SPINS] = SHORT
    try:
        yield
    finally:
        del os.environ[SPINS]
