"""Checks of what a session is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae.errors import ConfigError, ShapeError


def integers(name: str, values: Any) -> np.ndarray:
    """A 1-D array of integers as int64; ShapeError for anything else."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ShapeError(f"{name} must be a 1-D array of integers; got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def between(name: str, value: int, low: int, high: int) -> int:
    """The value; ConfigError outside low..high."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}; expected {low} to {high}")
    return value


def choice(name: str, value: str, choices: dict[str, int]) -> int:
    """What the value stands for; ConfigError for another one."""
    if value not in choices:
        raise ConfigError(f"{name}='{value}'; expected {', '.join(choices)}")
    return choices[value]
