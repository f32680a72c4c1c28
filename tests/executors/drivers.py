"""Runs in a process of their own, to be interrupted or killed."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

from tests.executors.file_work import FileWork, alive, wait_until

ROOT = Path(__file__).parents[2]
DRIVER = """
import pickle, signal, sys
from pathlib import Path
from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor

def terminate(number, frame):
    raise KeyboardInterrupt

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    work = pickle.loads(bytes.fromhex(sys.argv[2]))
    config = ExecutorConfig(kind=sys.argv[1], workers=2, threads_per_worker=1, cluster="local")
    try:
        open_executor(config, work.folder / "run").run(work)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_driver(work, kind, **options):
    (work.folder / "run").mkdir()
    command = [sys.executable, "-c", DRIVER, kind, pickle.dumps(work).hex()]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def stop_the_parent(folder, kind, number):
    """Send a signal to a run whose worker is at shard 2 while the other has done something; its workers must go.

    Returns the work and the exit code.
    """
    work = FileWork(folder=folder, n_shards=6, holds=2)
    driver = start_driver(work, kind)
    wait_until(lambda: bool(work.logged("held")) and len(work.missing()) < 6)
    driver.send_signal(number)
    code = driver.wait(60)
    pids = [int(words[0]) for words in work.logged("task")]
    wait_until(lambda: not any(map(alive, pids)), 20)
    return work, code


def kill_the_driver(work, kind):
    """SIGKILL a run at work; returns the processes of its workers, which must go by themselves."""
    driver = start_driver(work, kind)
    wait_until(lambda: len({words[0] for words in work.logged("shard")}) == 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    pids = {int(words[0]) for words in work.logged("task")}
    wait_until(lambda: not any(map(alive, pids)), 20)
    return pids
