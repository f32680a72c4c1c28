"""How many workers a machine takes, with how many threads, on which GPU. Counted without torch or CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from ..config import ExecutorConfig
from ..cores import usable_cores

CORES_PER_WORKER = 2
VISIBLE = "CUDA_VISIBLE_DEVICES"
SMI_SECONDS = 20


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here: its own entries where it is set, else the numbers of all GPUs."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(_count_gpus())]


def _count_gpus() -> int:
    devices = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if devices or not (smi := shutil.which("nvidia-smi")):
        return len(devices)
    try:
        done = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", done.stdout, re.M)) if done.returncode == 0 else 0


def gpus_of(worker: int, gpus: Sequence[str], per_worker: float) -> list[int]:
    """Places in `gpus` that a worker has: round and round, a whole one each where `per_worker` is 1 or less."""
    if not gpus:
        return []
    count = min(len(gpus), max(1, int(per_worker)))
    if 0 < per_worker < 1:  # neighbours share one
        return [int(worker * per_worker + 1e-9) % len(gpus)]
    return [(worker * count + i) % len(gpus) for i in range(count)]


def show_only(environment: MutableMapping[str, str], gpus: Sequence[str], places: Sequence[int]) -> None:
    """Let CUDA see only these GPUs. ORDER: before llama.cpp is loaded into the process."""
    if places:
        environment[VISIBLE] = ",".join(gpus[place] for place in places)


def worker_count(config: ExecutorConfig, gpus: Sequence[str]) -> int:
    """`executor.workers`, or as many as the GPUs, else the cores, of this machine take."""
    if config.workers:
        return config.workers
    if gpus:
        return max(1, int(len(gpus) / (config.gpus_per_worker or 1)))
    return max(1, usable_cores() // (config.threads_per_worker or CORES_PER_WORKER))


def thread_count(config: ExecutorConfig, workers: int) -> int:
    """`executor.threads_per_worker`, or this machine's cores shared out."""
    return config.threads_per_worker or max(1, usable_cores() // workers)
