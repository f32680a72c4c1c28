"""Several workers over one list of tasks: who gets what, what a death costs, how far it has come.

An engine offers a Crew; what follows from its events is the same for all of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from sae.errors import StoreError

from .base import Executor, Progress, Work, even_tasks, guided_tasks

POLL_SECONDS = 2.0  # how often commits are looked up where workers do not report rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """From a worker: rows of a batch, or that its task ended: well, with an error of the work, or by death."""

    worker: int
    rows: int = 0
    ended: bool = False
    error: BaseException | None = None
    died: str = ""  # what is known of the death, as a phrase: "killed by SIGKILL"


class Crew(ABC):
    """`n_workers` workers for one piece of work, as a context manager; leaving it stops them at once."""

    n_workers: int
    reports_rows = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def start(self, tasks: dict[int, list[int]]) -> None:
        """Give idle workers their shards; one that died or never was is made first."""

    @abstractmethod
    def wait(self) -> list[Event]:
        """What happened since the last call; waits a second at most for something to happen."""

    def release(self, worker: int) -> None:  # noqa: B027
        """There is no task left for this idle worker; one that dies may make work for it again."""

    @abstractmethod
    def close(self) -> None:
        """Stop every worker."""


class CrewExecutor(Executor):
    """An executor whose engine is a crew."""

    @abstractmethod
    def crew(self, work: Work, shards: int) -> Crew:
        """The crew for that many missing shards: no more workers than those."""

    def tasks(self, missing: Sequence[int], n_workers: int) -> list[list[int]]:
        """How the shards are shared out."""
        return guided_tasks(missing, n_workers)

    def run(self, work: Work, *, progress: Progress | None = None) -> None:
        missing = work.missing()
        if not missing:
            return
        ledger = Ledger(work, missing, self.config.retries, progress or (lambda done, total: None))
        with self.crew(work, len(missing)) as crew:
            while missing:
                drive(crew, ledger, self.tasks(missing, crew.n_workers))
                missing = ledger.missing()
                if missing:  # a task ended without a commit of its shards
                    ledger.lost(missing, "it ended without a commit")


@dataclass(slots=True)
class _Task:
    shards: list[int]
    rows: int = 0


@dataclass(slots=True)
class Ledger:
    """Who works at what, what is done, and how often a shard was lost."""

    work: Work
    wanted: list[int]
    retries: int
    progress: Progress
    busy: dict[int, _Task] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)
    settled_rows: int = 0
    looked: float = field(default_factory=time.monotonic)
    wanted_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.wanted_rows = self.work.rows(self.wanted)

    def missing(self) -> list[int]:
        """The wanted shards without a commit; the others are settled, unless their task is in flight."""
        missing = set(self.work.missing())
        flying = {shard for task in self.busy.values() for shard in task.shards}
        self.settled_rows = self.work.rows([s for s in self.wanted if s not in missing and s not in flying])
        return [shard for shard in self.wanted if shard in missing]

    def lost(self, shards: list[int], why: str) -> None:
        """A worker died with these shards of its task uncommitted: it was at the first of them.

        Raises StoreError when that happened to the shard more than `retries` times.
        """
        shard = shards[0]
        self.losses[shard] += 1
        if self.losses[shard] > self.retries:
            raise StoreError(
                f"shard {shard} was lost {self.losses[shard]} times, last because {why}; the committed shards are "
                f"safe: give each worker more memory (fewer executor.workers, a smaller extract.batch_tokens) and resume"
            )

    def look(self) -> None:
        """Count the commits of tasks in flight."""
        if time.monotonic() - self.looked < POLL_SECONDS:
            return
        missing = set(self.work.missing())
        for task in self.busy.values():
            task.rows = self.work.rows([shard for shard in task.shards if shard not in missing])
        self.looked = time.monotonic()

    def report(self) -> None:
        flying = sum(task.rows for task in self.busy.values())
        self.progress(self.settled_rows + flying, self.wanted_rows)


def drive(crew: Crew, ledger: Ledger, tasks: list[list[int]]) -> None:
    """Have every task worked at until it ended well; those of dead workers go back to the head of the queue.

    Raises the error of a work, StoreError from `Ledger.lost`.
    """
    waiting = deque(tasks)
    ledger.report()
    while waiting or ledger.busy:
        idle = [worker for worker in range(crew.n_workers) if worker not in ledger.busy]
        fresh = {worker: waiting.popleft() for worker in idle[: len(waiting)]}
        ledger.busy.update((worker, _Task(shards)) for worker, shards in fresh.items())
        if fresh:
            crew.start(fresh)
        for worker in idle[len(fresh) :]:
            crew.release(worker)
        for event in crew.wait():
            settle(event, ledger, waiting, crew.n_workers)
        if not crew.reports_rows:
            ledger.look()
        ledger.report()


def settle(event: Event, ledger: Ledger, waiting: deque[list[int]], n_workers: int) -> None:
    """Write an event down. Raises the error it carries."""
    if event.error is not None:
        raise event.error
    if event.rows:
        ledger.busy[event.worker].rows += event.rows
    if event.ended:
        ledger.settled_rows += ledger.work.rows(ledger.busy.pop(event.worker).shards)
    if event.died:
        shards = set(ledger.busy.pop(event.worker).shards)
        left = [shard for shard in ledger.missing() if shard in shards]
        if left:
            ledger.lost(left, event.died)
            idle = n_workers - len(ledger.busy) - len(waiting)
            waiting.extendleft(reversed(even_tasks(left, max(1, idle))))
