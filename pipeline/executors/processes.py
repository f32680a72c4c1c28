"""Worker processes on this machine: they leave Ctrl-C to their parent and do not outlive it."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Processes started inside are born with SIGINT blocked.

    A Ctrl-C goes to the whole process group, but is the parent's to answer; one of this moment comes after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux; elsewhere `leave_orphaned` has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    leave_orphaned(parent)  # it may have ended before


def ends_with_parent() -> Callable[[], None]:
    """A `preexec_fn` for a process that keeps state: the kernel sends it SIGTERM when ours ends (Linux).

    It also starts without blocked signals, which a worker's children would inherit.
    """
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def before_exec() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            leave_orphaned(parent)  # it may have ended before

    return before_exec


def leave_orphaned(parent: int) -> None:
    """End this process if its parent has ended."""
    if os.getppid() != parent:
        os._exit(1)


def portable(error: BaseException) -> BaseException:
    """The error, or where it cannot be pickled and read again, one of the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  pickling runs the error's own code
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
