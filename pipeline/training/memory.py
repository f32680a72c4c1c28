"""Whether the batches that the settings ask for can be trained on at all, said before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sae.errors import ConfigError

from ..config import TrainerConfig

if TYPE_CHECKING:
    from sae.trainer import TrainConfig

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
ROW_COPIES = 4  # float32 arrays of all rows that every step holds at least: two batches, the reconstruction, its error
PAIR_FLOATS = 3  # a value and an index of 8 bytes


def check_batch(trainer: TrainerConfig) -> None:
    """ConfigError for a batch of more rows than are trained on in all."""
    if trainer.batch_tokens > trainer.tokens:
        raise ConfigError(
            f"trainer.batch_tokens={trainer.batch_tokens} is more than trainer.tokens={trainer.tokens}, "
            "the rows trained on in all; lower one or raise the other"
        )


def check_memory(configs: Mapping[str, TrainConfig], d_in: int) -> None:
    """ConfigError for a batch whose rows alone are more than the memory there is: Linux would end the process without a word."""
    batch, k = (max(getattr(config, key) for config in configs.values()) for key in ("batch_tokens", "k"))
    needed, free = 4 * batch * (ROW_COPIES * d_in + PAIR_FLOATS * k), available_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"a step on trainer.batch_tokens={batch} rows of width {d_in} needs at least {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB of memory are free; lower trainer.batch_tokens"
        )


def available_memory() -> int | None:
    """Bytes that this process can still have, None where the system does not say."""
    found = [memory_free(), cgroup_limit()]
    return min((size for size in found if size is not None), default=None)


def memory_free() -> int | None:
    try:
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:  # not Linux
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def cgroup_limit() -> int | None:
    try:
        text = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
