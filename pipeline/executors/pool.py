"""Several processes of this machine, a GPU each where there are some.

Processes are started anew ('spawn'), never forked, for llama.cpp and CUDA do not survive a fork. A process that
dies costs its task only: every worker has its own process and pipe, so there is no shared queue to break.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..config import ExecutorConfig
from ..log_lines import show_warnings
from .base import Placement, Work, attempt
from .crew import Crew, CrewExecutor, Event
from .placement import gpus_of, show_only, thread_count, visible_gpus, worker_count
from .processes import die_with_parent, held_interrupts, leave_orphaned, portable

WAIT_SECONDS = 0.5
PATIENCE_SECONDS = 5.0  # for a worker to leave by itself, then for it to obey SIGTERM


class PoolExecutor(CrewExecutor):
    """A process for each of `executor.workers`; they keep the model between tasks."""

    def crew(self, work: Work, shards: int) -> Crew:
        return PoolCrew(self.config, work, shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class PoolCrew(Crew):
    reports_rows = True

    def __init__(self, config: ExecutorConfig, work: Work, shards: int) -> None:
        self._gpus = visible_gpus()
        wanted = worker_count(config, self._gpus)
        self._config, self.n_workers = config, min(wanted, shards)
        self._n_threads = thread_count(config, wanted)  # not those of an idle worker: a row depends on the number
        self._work = pickle.dumps(work)
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}

    def start(self, tasks: dict[int, list[int]]) -> None:
        for number, shards in tasks.items():
            if number not in self._workers:
                self._workers[number] = self._hire(number)
            try:
                self._workers[number].pipe.send(shards)
            except OSError:  # it died between two tasks: `wait` finds the closed pipe
                continue

    def wait(self) -> list[Event]:
        numbers = {worker.pipe: number for number, worker in self._workers.items()}
        events = []
        for pipe in wait(list(numbers), WAIT_SECONDS):
            assert isinstance(pipe, Connection)
            events.append(self._read(numbers[pipe], pipe))
        return events

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(PATIENCE_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers.clear()

    def _hire(self, number: int) -> _Worker:
        places = gpus_of(number, self._gpus, self._config.gpus_per_worker)
        place = Placement(worker=number, n_threads=self._n_threads, gpu=places[0] if places else None)
        environment: dict[str, str] = {}
        show_only(environment, self._gpus, places)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self._work, place, environment, os.getpid()), daemon=True
        )
        resource_tracker.ensure_running()  # ORDER: `start` would do it, and unblock SIGINT in doing so
        with held_interrupts():
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Worker(process=process, pipe=ours)

    def _read(self, number: int, pipe: Connection) -> Event:
        try:
            message: Any = pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            worker = self._workers.pop(number)
            pipe.close()
            worker.process.join()
            code = worker.process.exitcode
            worker.process.close()
            return Event(worker=number, died=_cause(code))
        return Event(worker=number, **message)


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def serve(pipe: Connection, work: bytes, place: Placement, environment: dict[str, str], parent: int) -> None:
    """A worker's life: tasks come through the pipe, rows, ends and errors go back."""
    show_warnings()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    os.environ.update(environment)

    def done(rows: int) -> None:
        leave_orphaned(parent)
        pipe.send({"rows": rows})

    loaded: Work | None = None
    while True:
        try:
            shards: Sequence[int] = pipe.recv()
        except EOFError:
            return
        # ORDER: unpickled after CUDA_VISIBLE_DEVICES is set, because it imports llama.cpp.
        error, loaded = _load(work) if loaded is None else (None, loaded)
        if loaded is not None:
            error = attempt(loaded, shards, place=place, done=done)
        pipe.send({"ended": True} if error is None else {"error": portable(error)})


def _load(work: bytes) -> tuple[Exception | None, Work | None]:
    try:
        return None, pickle.loads(work)
    except Exception as error:  # noqa: BLE001  a class that cannot be imported here, say: the parent's to raise
        return error, None
