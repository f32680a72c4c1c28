"""How long training took, and how much of it was waiting for rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training and of waiting in it; it is stopped while logs and checkpoints are written."""

    def __init__(self) -> None:
        self._seconds = self._waited = self._all_seconds = self._all_waited = 0.0
        self._since: float | None = None
        self._first: float | None = None

    @property
    def wait_share(self) -> float:
        """Waiting over everything so far, `take`n or not, without the first wait: a reader's buffer fills but once."""
        seconds = self._all_seconds + self._seconds - (self._first or 0.0)
        return (self._all_waited + self._waited - (self._first or 0.0)) / seconds if seconds else 0.0

    @property
    def seconds(self) -> float:
        """All of it so far, `take`n or not."""
        return self._all_seconds + self._seconds

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        """ORDER: after the device was waited for, else its work is counted to what comes next."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting."""
        started = time.perf_counter()
        yield
        waited = time.perf_counter() - started
        self._waited += waited
        if self._first is None:
            self._first = waited

    def take(self) -> tuple[float, float]:
        """Seconds, and seconds waited, since the last call."""
        taken = self._seconds, self._waited
        self._all_seconds += self._seconds
        self._all_waited += self._waited
        self._seconds = self._waited = 0.0
        return taken
