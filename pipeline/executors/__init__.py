"""Where shards are captured: in this process, in several, on a Ray cluster, as SLURM jobs."""

from __future__ import annotations

import importlib
from pathlib import Path

from sae.errors import ConfigError

from ..config import ExecutorConfig
from .base import Executor, Placement, Work

__all__ = ["Executor", "Placement", "Work", "open_executor"]

# kind -> module, class, the extra that brings its package, the package
KINDS = {
    "local": ("local", "LocalExecutor", "", ""),
    "pool": ("pool", "PoolExecutor", "", ""),
    "ray": ("ray", "RayExecutor", "ray", "ray"),
    "submitit": ("submitit", "SubmititExecutor", "slurm", "submitit"),
}


def open_executor(config: ExecutorConfig, folder: Path) -> Executor:
    """The executor of `executor.kind`; its package is imported only now. `folder`: the run folder.

    Raises ConfigError for a kind that is unknown or whose package is not installed.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"executor.kind={config.kind!r} is unknown; use one of {', '.join(KINDS)}")
    module, name, extra, package = KINDS[config.kind]
    try:
        executor = getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if not package or (error.name or "").split(".")[0] != package:
            raise
        raise ConfigError(
            f"executor.kind={config.kind} needs the package {package}; pip install 'ggscope[{extra}]'"
        ) from None
    return executor(config, folder)
