"""What the trainer's process and the capturing child tell each other, and the memory they share. No torch, no llama.cpp.

The parent asks for blocks (a block is a decoded batch of the plan) one slot each; the child answers when the slot
holds the block's rows. A slot that the parent has not given back is not written to, so the slots are the queue and
their number bounds it. Letters: D width, n rows of a block without flags.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..store.checks import of_kind
from ..store.schema import STORED_DTYPES, HookInfo

NAMED_WINDOWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Pilot:
    """Mean and E||x - mean||^2 over `rows` calibration rows: what a training starts from."""

    rows: int
    mean_D: np.ndarray
    variance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What the first start measured; a resumed run goes on with it."""

    hook: HookInfo
    pilot: Pilot
    corpus_hash: str
    config_hash: str  # of the plan
    model_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats come back to the bit."""
        hook, pilot = self.hook, self.pilot
        return {
            "hook": {name: getattr(hook, name) for name in ("name", "width", "dtype", "outlier_threshold")},
            "pilot": {"rows": pilot.rows, "mean": pilot.mean_D.tolist(), "variance": pilot.variance},
            "corpus_hash": self.corpus_hash,
            "config_hash": self.config_hash,
            "model_sha256": self.model_sha256,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """Raises LookupError, TypeError or ValueError for what `as_dict` did not give."""
        pilot = data["pilot"]
        mean_D = np.array(pilot["mean"], np.float64)
        return cls(
            hook=HookInfo.from_dict(of_kind(data["hook"], dict, "hook")),
            pilot=Pilot(rows=pilot["rows"], mean_D=mean_D, variance=pilot["variance"]),
            corpus_hash=data["corpus_hash"],
            config_hash=data["config_hash"],
            model_sha256=data["model_sha256"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """Rows that were left out because a value of theirs is not finite, and where the first few are."""

    rows: int = 0
    windows: tuple[tuple[str, int], ...] = ()  # document and window, at most NAMED_WINDOWS

    def plus(self, other: NotFinite) -> NotFinite:
        windows = tuple(dict.fromkeys(self.windows + other.windows))[:NAMED_WINDOWS]
        return NotFinite(rows=self.rows + other.rows, windows=windows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the child says before the first block."""

    calibration: Calibration
    block_starts: np.ndarray  # int64: block b is rows block_starts[b] : block_starts[b + 1] of the corpus
    unflagged_rows: int  # by the corpus alone; outliers are found while capturing
    model: dict[str, Any]  # ModelId.as_dict()
    documents: int
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # for the run's manifest

    @property
    def slot_bytes(self) -> int:
        """A slot: sum_D, centred_D (float64), then the rows."""
        width, itemsize = self.calibration.hook.width, np.dtype(STORED_DTYPES[self.calibration.hook.dtype]).itemsize
        most = int(np.diff(self.block_starts).max())
        return -(-(16 * width + most * width * itemsize) // mmap.PAGESIZE) * mmap.PAGESIZE


def shared_file() -> int:
    """A file without a name whose memory both processes map: it is gone when both are, however they end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ggscope-stream")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Slots:
    """The shared memory as arrays; `descriptor` is a `shared_file`."""

    def __init__(self, descriptor: int, header: Header, count: int) -> None:
        self.header, self.count = header, count
        size = header.slot_bytes * count
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._memory = mmap.mmap(descriptor, size)

    def sums(self, slot: int) -> np.ndarray:
        """(2, D) float64: the sum of the rows, and the sum of their squared distances from their mean."""
        width = self.header.calibration.hook.width
        return np.frombuffer(self._memory, np.float64, 2 * width, slot * self.header.slot_bytes).reshape(2, width)

    def rows(self, slot: int, count: int) -> np.ndarray:
        """(count, D) in the store's format."""
        hook = self.header.calibration.hook
        start = slot * self.header.slot_bytes + 16 * hook.width
        dtype = np.dtype(STORED_DTYPES[hook.dtype])
        return np.frombuffer(self._memory, dtype, count * hook.width, start).reshape(count, hook.width)
