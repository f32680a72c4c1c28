"""As SLURM jobs (or, to try it, as processes of this machine): one job for each worker, over its share of the shards.

The job files lie in `executor.folder`, by default `submitit/` in the run folder. A job that dies (killed, out of memory
or time) is submitted again for the shards it left.
"""

from __future__ import annotations

import fcntl
import math
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import submitit
import submitit.core.utils

from sae.errors import ConfigError

from ..config import ExecutorConfig
from .base import Placement, Work, attempt, even_tasks
from .crew import Crew, CrewExecutor, Event
from .placement import VISIBLE, gpus_of, show_only, thread_count, visible_gpus, worker_count
from .processes import die_with_parent, held_interrupts, portable

LOCAL_POLL_SECONDS, SLURM_POLL_SECONDS = 0.2, 5.0
SACCT_SECONDS = 60.0
PATIENCE_SECONDS = 5.0
SLURM_THREADS = 4
DRIVER_LOCK = "driver.lock"
JOBS_FILE = "jobs.txt"


class SubmititExecutor(CrewExecutor):
    """A job array of `executor.workers`; in a queue a task of its own for every few shards would only wait."""

    def crew(self, work: Work, shards: int) -> Crew:
        folder = Path(self.config.folder) if self.config.folder else self.folder / "submitit"
        return SubmititCrew(self.config, work, shards, folder.expanduser().resolve())

    def tasks(self, missing: Sequence[int], n_workers: int) -> list[list[int]]:
        return even_tasks(missing, n_workers)


class SubmititCrew(Crew):
    def __init__(self, config: ExecutorConfig, work: Work, shards: int, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._local = chosen_cluster(config) == "local"
        if not self._local and not config.workers:
            raise ConfigError("executor.workers is 0; say how many SLURM jobs there are to be, as executor.workers=8")
        self._gpus = visible_gpus() if self._local else []
        wanted = worker_count(config, self._gpus)
        self.n_workers = min(wanted, shards)
        self._n_threads = thread_count(config, wanted) if self._local else config.threads_per_worker or SLURM_THREADS
        self._work = pickle.dumps(work)
        self._jobs: dict[int, Any] = {}
        self._asked = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _driver_lock(folder)
        self._executor = self._open()
        if not self._local:
            _cancel_left(folder)

    def start(self, tasks: dict[int, list[int]]) -> None:
        try:
            with held_interrupts(), self._executor.batch():
                jobs = {number: self._submit(number, shards) for number, shards in tasks.items()}
        except submitit.core.utils.FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"SLURM took no job ({reason}); see executor.partition, account, memory_gb") from None
        self._jobs.update(jobs)
        with (self._folder / JOBS_FILE).open("a", encoding="utf-8") as file:
            file.writelines(f"{job.job_id}\n" for job in jobs.values())

    def wait(self) -> list[Event]:
        time.sleep(LOCAL_POLL_SECONDS if self._local else SLURM_POLL_SECONDS)
        ask = time.monotonic() - self._asked > SACCT_SECONDS  # else submitit asks every ten minutes at most
        if ask:
            self._asked = time.monotonic()
        ended = [number for number, job in self._jobs.items() if job.done(force_check=ask)]
        return [self._read(number, self._jobs.pop(number)) for number in ended]

    def close(self) -> None:
        self._lock.close()  # first: a local job that starts just now finds it free and leaves
        for job in self._jobs.values():
            if self._local:
                job._process.terminate()  # its controller, which passes SIGTERM on; `cancel` would print a traceback
            else:
                job.cancel(check=False)
        for job in self._jobs.values() if self._local else ():
            try:
                job._process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                job._process.kill()
                job._process.wait()
        self._jobs.clear()

    def _open(self) -> submitit.AutoExecutor:
        config = self._config
        executor = submitit.AutoExecutor(self._folder, cluster="local" if self._local else "slurm")
        executor.update_parameters(
            name="ggscope-extract",
            timeout_min=config.timeout_minutes,
            mem_gb=config.memory_gb,
            cpus_per_task=self._n_threads,
            gpus_per_node=math.ceil(config.gpus_per_worker) or None,
            slurm_partition=config.partition or None,
            slurm_account=config.account or None,
        )
        return executor

    def _submit(self, number: int, shards: list[int]) -> Any:
        places = gpus_of(number, self._gpus, self._config.gpus_per_worker)
        place = Placement(worker=number, n_threads=self._n_threads, gpu=places[0] if places else None)
        environment: dict[str, str] = {}
        show_only(environment, self._gpus, places)
        lock = str(self._folder / DRIVER_LOCK) if self._local else ""
        return self._executor.submit(run_job, self._work, shards, place, environment, lock)

    def _read(self, number: int, job: Any) -> Event:
        if self._local:
            job._results_timeout_s = 0  # on this disk a result that is not there will not come
        try:
            error = job.result()
        except submitit.core.utils.UncompletedJobError:
            return Event(worker=number, died=f"job {job.job_id} died ({job.state}; its log is in {self._folder})")
        return Event(worker=number, ended=error is None, error=error)


def chosen_cluster(config: ExecutorConfig) -> str:
    """`slurm` or `local`. Raises ConfigError where SLURM is meant and not there."""
    if config.cluster not in ("", "local", "slurm"):
        raise ConfigError(f"executor.cluster={config.cluster!r} is unknown; use slurm or local")
    if config.cluster != "local" and not shutil.which("sbatch"):
        raise ConfigError("no SLURM on this machine (sbatch is not found); set executor.cluster=local or executor=pool")
    return config.cluster or "slurm"


def _driver_lock(folder: Path) -> IO[bytes]:
    """Held while the driver lives, so that jobs of this machine see when it is gone, even by SIGKILL."""
    file = (folder / DRIVER_LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(
            f"another run has its jobs in {folder}, or it cannot be locked; set executor.folder"
        ) from None
    return file


def _driver_gone(lock: str) -> bool:
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _cancel_left(folder: Path) -> None:
    """Take back the jobs of an earlier driver that was killed: two may not write one shard at the same time."""
    jobs = folder / JOBS_FILE
    if jobs.exists():
        for job_id in jobs.read_text("utf-8").split():
            submitit.SlurmJob(folder, job_id).cancel(check=False)
        jobs.unlink()


def run_job(
    work: bytes, shards: Sequence[int], place: Placement, environment: dict[str, str], lock: str
) -> BaseException | None:
    """What a job does; returns the error of the work. `lock`: that of the driver on this machine, else empty."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # submitit ignores SIGTERM
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # its word that time is running out: every shard until then counts
    if lock:
        die_with_parent(os.getppid())

    def done(_rows: int) -> None:
        if lock and _driver_gone(lock):
            os._exit(1)

    done(0)
    os.environ.update(environment)
    if not lock and os.environ.get(VISIBLE):
        place = replace(place, gpu=0)  # the first of those SLURM gave the job
    # ORDER: unpickled after CUDA_VISIBLE_DEVICES is set, because it imports llama.cpp.
    error = attempt(pickle.loads(work), shards, place=place, done=done)
    return None if error is None else portable(error)
