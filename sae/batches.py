"""Where a trainer's rows come from, and reading them ahead. numpy only.

Shape letters: B rows of a batch, D d_in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

POLL_SECONDS = 0.1


class BatchSource(Protocol):
    """An endless stream of batches that can be put back to where it was."""

    @property
    def d_in(self) -> int: ...

    def next(self) -> np.ndarray:
        """The next batch, float32 (B, D); it must not be written to later."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the stream is: plain JSON values, a snapshot. The batch after `load_state(state())` is the next one."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        ...


class Peeked:
    """A source whose first batch was looked at; it still comes first, unless `load_state` goes elsewhere."""

    def __init__(self, source: BatchSource) -> None:
        self._source, self._before = source, source.state()
        self.first: np.ndarray = source.next()
        self._waiting = True

    @property
    def d_in(self) -> int:
        return self._source.d_in

    def next(self) -> np.ndarray:
        if self._waiting:
            self._waiting = False
            return self.first
        return self._source.next()

    def state(self) -> dict[str, Any]:
        return self._before if self._waiting else self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._waiting = False
        self._source.load_state(state)


class Prefetcher:
    """Hands out (batch, source state after it), reading up to `ahead` batches in a thread; 0 reads in place.

    `batches`: how many are wanted in all; no more are read. A context manager; an exception of the source is raised
    by `next`. Left by an exception, it does not wait for the read that is under way.
    """

    def __init__(self, source: BatchSource, ahead: int, batches: int) -> None:
        self._source, self._ahead, self._wanted = source, ahead, batches
        self._pool = ThreadPoolExecutor(1, "read-ahead") if ahead else None
        self._reads: deque[Future[tuple[np.ndarray, dict[str, Any]]]] = deque()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def next(self, give_up: Callable[[], bool] = lambda: False) -> tuple[np.ndarray, dict[str, Any]] | None:
        """The next batch, and the state that leads to the one after it. None: `give_up` said so while it waited."""
        if self._pool is None:
            return self._read()
        while len(self._reads) <= self._ahead and self._wanted:
            self._reads.append(self._pool.submit(self._read))
            self._wanted -= 1
        while not self._reads[0].done() and not wait([self._reads[0]], POLL_SECONDS).done:
            if give_up():
                return None
        return self._reads.popleft().result()

    def _read(self) -> tuple[np.ndarray, dict[str, Any]]:
        return self._source.next(), self._source.state()
