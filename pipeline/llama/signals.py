"""Ctrl-C while llama.cpp computes.

Python runs signal handlers between two bytecodes of the main thread, so an exception of theirs can strike at the
very first line of a ctypes callback, outside every `try`: ctypes prints it, drops it and returns garbage. While a
decode runs, signals are therefore only noted; what they were meant to do is done when llama.cpp is out of the way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred_signals(noted: Callable[[], None]) -> Iterator[None]:
    """Call `noted` when a signal comes, and its real handler after the block (main thread only; elsewhere a no-op)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        noted()

    before = {number: signal.getsignal(number) for number in DEFERRED}
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for number in received:
            ours[signal.Signals(number)](number, None)
