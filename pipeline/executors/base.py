"""What an executor is: something that has the missing shards of a store captured, here or elsewhere.

The store's commits are the only truth. Work is idempotent: whoever captures a shard writes the same bytes, so
a worker that dies costs the shard it was at, and every engine does no more than start workers and notice deaths.
"""

from __future__ import annotations

import itertools
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..config import ExecutorConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where work runs: number of the worker, its threads (0: as `model.n_threads` says), its GPU or None.

    `gpu` numbers the GPUs this machine lets us see. In a worker process CUDA_VISIBLE_DEVICES names only its
    own by then, so llama.cpp finds it as device 0.
    """

    worker: int = 0
    n_threads: int = 0
    gpu: int | None = None


class Work(Protocol):
    """Shards to capture: picklable, and the same in every process."""

    def missing(self) -> list[int]:
        """Shards without a commit, ascending, asked of the store."""
        ...

    def rows(self, shards: Sequence[int]) -> int:
        """Rows of these shards together."""
        ...

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        """Capture and commit these shards in order, skipping committed ones; `done(rows)` after each batch."""
        ...


class Executor(ABC):
    """Runs work where its configuration says. `folder` is the run folder: for job files, never for results."""

    def __init__(self, config: ExecutorConfig, folder: Path) -> None:
        self.config = config
        self.folder = Path(folder)

    @abstractmethod
    def run(self, work: Work, *, progress: Progress | None = None) -> None:
        """Have every missing shard captured; `progress(rows done, rows in all)` counts those missing at the start.

        The rows of a shard that was lost with its worker are taken back from the count.
        Raises what the work raises, as raised (the other workers are stopped), StoreError for a shard whose
        worker died more than `retries` times, ConfigError for an engine that is not there, KeyboardInterrupt.
        Committed shards are safe whatever happens, and no worker outlives this process on this machine.
        """


def guided_tasks(missing: Sequence[int], workers: int) -> list[list[int]]:
    """The missing shards cut, in order, into tasks that shrink towards the end.

    Every task takes 1 / (2 workers) of what is left: few cuts, each of which may have a batch across a shard
    border computed twice, and small tasks last, so that the workers end together.
    Source: Polychronopoulos, Kuck 1987, "Guided self-scheduling".
    """
    if workers == 1:
        return [list(missing)] if missing else []
    tasks, start = [], 0
    while start < len(missing):
        size = -(-(len(missing) - start) // (2 * workers))
        tasks.append(list(missing[start : start + size]))
        start += size
    return tasks


def even_tasks(missing: Sequence[int], workers: int) -> list[list[int]]:
    """The missing shards cut, in order, into one task a worker, as long as each other to one shard."""
    count = min(workers, len(missing))
    borders = [len(missing) * i // count for i in range(count + 1)] if count else [0]
    return [list(missing[a:b]) for a, b in itertools.pairwise(borders)]


def attempt(
    work: Work, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]
) -> BaseException | None:
    """Capture in a worker process; returns what went wrong, for the parent to raise."""
    try:
        work.capture(shards, place=place, done=done)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the parent's to raise
        error.add_note(f"in worker {place.worker} (process {os.getpid()}):\n{traceback.format_exc()}")
        return error
    return None
