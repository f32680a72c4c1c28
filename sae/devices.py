"""Which device trains, and what running out of its memory looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import ConfigError, OutOfMemoryError

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError with these words where malloc fails


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU.

    Raises:
        ConfigError: an unknown device, or CUDA asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA GPU here; use device=cpu or auto")
    return torch.device(name)


@contextmanager
def memory_failures_named(when: str, advice: str) -> Iterator[None]:
    """Turn every kind of "out of memory" into one OutOfMemoryError: when it was, and what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        reason = (str(error).splitlines() or ["no more to be had"])[0].removesuffix(".")
        raise OutOfMemoryError(f"out of memory {when} ({reason}); lower {advice}") from error
