"""On a Ray cluster: an actor for each worker, on whichever node has room; activations never pass through Ray.

Without `executor.address` a cluster is made on this machine and taken down again. It writes nothing into the home
folder: its files lie in a short temporary folder (socket paths have 107 bytes at most), its token in the environment.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.exceptions

from sae.errors import ConfigError

from ..config import ExecutorConfig
from ..cores import usable_cores
from .base import Placement, Progress, Work, attempt
from .crew import Crew, CrewExecutor, Event
from .placement import thread_count, worker_count
from .processes import portable

WAIT_SECONDS = 0.5
CONNECT_SECONDS = 10.0
PLACING_SECONDS = 60.0  # how long actors that die before they begin are made anew
NOTES_FILE = "ray.log"  # in the run folder: what Ray says of dead workers
OBJECT_STORE_BYTES = 80 << 20  # what Ray takes at least; only shard numbers and errors pass through it
SOCKET_FOLDER_CHARS = 40  # Ray adds about 60 to it, of 107
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without a GPU of its own keeps the node's setting
}


class RayExecutor(CrewExecutor):
    """Actors of `threads_per_worker` CPUs and `gpus_per_worker` GPUs; one that dies is made anew, where there is room."""

    def crew(self, work: Work, shards: int) -> Crew:
        return RayCrew(self.config, work, shards)

    def run(self, work: Work, *, progress: Progress | None = None) -> None:
        with contextlib.redirect_stdout(_Notes(sys.stdout, self.folder / NOTES_FILE)):
            super().run(work, progress=progress)


class RayCrew(Crew):
    def __init__(self, config: ExecutorConfig, work: Work, shards: int) -> None:
        self._config = config
        self._work = pickle.dumps(work)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, list[int]]] = {}
        self._begun: dict[int, Any] = {}  # a worker's first call: answered once its actor has a process
        self._unplaced: dict[int, float] = {}  # since when a worker's actors die before they begin
        with ExitStack() as stack:
            if not ray.is_initialized():
                stack.enter_context(cluster(config))
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            wanted, self._n_threads = shape(config, nodes)
            self.n_workers = min(wanted, shards)
            self._stack = stack.pop_all()

    def start(self, tasks: dict[int, list[int]]) -> None:
        for number, shards in tasks.items():
            if number not in self._actors:
                self._actors[number] = self._hire(number)
                self._begun[number] = self._actors[number].begin.remote()
            self._calls[self._actors[number].capture.remote(shards)] = (number, shards)

    def wait(self) -> list[Event]:
        ready, _ = ray.wait(list(self._calls), timeout=WAIT_SECONDS)
        events = [self._read(call, *self._calls.pop(call)) for call in ready]
        return [event for event in events if event is not None]

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._stack.close()

    def _hire(self, number: int) -> Any:
        options: dict[str, Any] = {"num_cpus": self._n_threads, "max_restarts": 0, "max_task_retries": 0}
        if self._config.gpus_per_worker:
            options["num_gpus"] = self._config.gpus_per_worker
        return ray.remote(**options)(RayWorker).remote(self._work, number, self._n_threads)

    def _read(self, call: Any, number: int, shards: list[int]) -> Event | None:
        try:
            error: Any = ray.get(call)
        except ray.exceptions.RayTaskError as failed:
            return Event(worker=number, error=failed.cause)
        except ray.exceptions.RayError as death:
            ray.kill(self._actors.pop(number))
            if self._place_again(number, shards):
                return None
            return Event(worker=number, died=f"its Ray worker died ({type(death).__name__})")
        self._unplaced.pop(number, None)
        return Event(worker=number, ended=error is None, error=error)

    def _place_again(self, number: int, shards: list[int]) -> bool:
        """Whether a dead actor never began, and another was made: on a lost node that Ray still counts, for a while.

        Such a death says nothing of the shards.
        """
        if self._has_begun(number):
            self._unplaced.pop(number, None)
            return False
        if time.monotonic() - self._unplaced.setdefault(number, time.monotonic()) > PLACING_SECONDS:
            return False
        time.sleep(WAIT_SECONDS)
        self.start({number: shards})
        return True

    def _has_begun(self, number: int) -> bool:
        try:
            ray.get(self._begun[number])
        except ray.exceptions.RayError:
            return False
        return True

    def release(self, worker: int) -> None:
        if worker in self._actors:
            ray.kill(self._actors.pop(worker))


def shape(config: ExecutorConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """Workers and threads of each on nodes of these resources: one worker a node, or a GPU share, unless said otherwise.

    Raises ConfigError when they do not fit.
    """
    each = config.gpus_per_worker
    slots = [int(node.get("GPU", 0) / each + 1e-9) if each else sys.maxsize for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    workers = config.workers or (sum(slots) if each else len(nodes))

    def room(threads: int) -> int:
        return sum(min(slot, cpu // threads) for slot, cpu in zip(slots, cpus, strict=True))

    threads = config.threads_per_worker or next((t for t in range(max(cpus), 1, -1) if room(t) >= workers), 1)
    if not workers or room(threads) < workers:
        raise ConfigError(
            f"the Ray cluster has nodes of {cpus} CPUs and {sum(node.get('GPU', 0) for node in nodes):g} GPUs in all, "
            f"no room for executor.workers={workers} of {threads} threads and {each:g} GPUs; lower one of them"
        )
    return workers, threads


class RayWorker:
    """The actor: opens the model with the first shards it gets and keeps it."""

    def __init__(self, work: bytes, number: int, n_threads: int) -> None:
        self._pickled, self._number, self._n_threads = work, number, n_threads
        self._work: Work | None = None

    def begin(self) -> None:
        """Answered by every actor that got as far as a process."""

    def capture(self, shards: Sequence[int]) -> BaseException | None:
        """Returns the error of the work; Ray has set CUDA_VISIBLE_DEVICES by now, before llama.cpp is imported."""
        if self._work is None:
            self._work = pickle.loads(self._pickled)
        assert self._work is not None
        gpus = ray.get_gpu_ids()
        place = Placement(worker=self._number, n_threads=self._n_threads, gpu=int(gpus[0]) if gpus else None)
        error = attempt(self._work, shards, place=place, done=lambda rows: None)
        return None if error is None else portable(error)


@contextmanager
def cluster(config: ExecutorConfig) -> Iterator[None]:
    """A connection to the cluster at `executor.address`, or one of our own on this machine.

    Raises ConfigError when there is none at the address.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    with ExitStack() as stack:
        with _handler_kept():
            if config.address:
                _connect(config.address)
            else:
                _make(config, stack)
        stack.callback(ray.shutdown)
        yield


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # Ray itself tries a dead address for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"no Ray cluster at executor.address={address} ({reason}); start one with `ray start --head`"
        ) from None


def _make(config: ExecutorConfig, stack: ExitStack) -> None:
    workers = worker_count(config, [])
    root = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="gg", dir=root if len(root) <= SOCKET_FOLDER_CHARS - 10 else "/tmp")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    ray.init(
        address="local",
        num_cpus=max(usable_cores(), workers * thread_count(config, workers)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(Path(folder).resolve()),
    )


@contextmanager
def _handler_kept() -> Iterator[None]:
    """`ray.init` takes SIGTERM for itself (in C++ too, which prints a stack and exits): ours comes back after it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Notes(io.TextIOBase):
    """Stands for stdout while Ray runs: its threads print there whatever they are told, a page for a lost node."""

    def __init__(self, stdout: TextIO, path: Path) -> None:
        self._stdout, self._path, self._owner = stdout, path, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._owner:
            return self._stdout.write(text)
        with self._path.open("a", encoding="utf-8") as file:
            return file.write(text)

    def flush(self) -> None:
        self._stdout.flush()
