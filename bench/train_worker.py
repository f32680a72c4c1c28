"""What a worker process of `bench.train` answers, on either side: load, run, advance, fvu, memory.

A side is a trainer of some library on the toy rows. It keeps its state between requests. Rows are made outside of
what is timed, by the same code everywhere; `load` returns a checksum of the first batch, equal on all sides.
"""

from __future__ import annotations

import gc
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.common import BenchError, forget_peak, peak_bytes, resident_bytes, serve
from bench.superposition import HELD_OUT, Superposition

RING = 8  # batches held in memory, trained on in turns while speed is measured
STATISTICS_ROWS = 8192
TRUTHS_PER_LATENT = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is trained: sizes, the rows' mean and E||x - mean||^2, the learning rate (None: the library's own)."""

    d_in: int
    num_latents: int
    k: int
    batch: int
    steps: int  # of the whole training, for schedules
    lr: float | None
    seed: int
    mean_D: torch.Tensor
    variance: float
    warmup_steps: int = 0
    decay_steps: int = 0  # the last ones, linear to zero
    dead_after_tokens: int = 10_000_000  # for AuxK, where the side has it on
    device: str = "cpu"  # or cuda; mean_D is on the CPU


class TrainSide(ABC):
    """One trainer. `step` is everything the library does for a batch, counters included."""

    @abstractmethod
    def step(self, x_ND: torch.Tensor) -> None: ...

    @abstractmethod
    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_hat_ND of rows it is not trained on."""


class Served:
    """The operations, over the sides that `builders` make."""

    def __init__(self, builders: Mapping[str, Callable[..., TrainSide]]) -> None:
        self._builders = builders
        self._sides: list[TrainSide] = []
        self._number = 0
        self._imports = resident_bytes()

    def operations(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "load": self.load, "beside": self.beside, "choose": self.choose, "run": self.run, "advance": self.advance,
            "fvu": self.fvu, "memory": self.memory,
        }  # fmt: skip

    def load(
        self,
        side: str,
        shape: dict[str, Any],
        threads: int,
        steps: int,
        lr: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Build a side; the one before is dropped. `shape`: d_in, num_latents, k, batch."""
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self._sides = []
        gc.collect()
        self._device = torch.device(device)
        self._forget_peak()
        self._rows = Superposition(shape["d_in"], int(shape["num_latents"] * TRUTHS_PER_LATENT), seed=seed)
        statistics_ND = torch.from_numpy(self._rows.batch(HELD_OUT + 1, STATISTICS_ROWS))
        mean_D = statistics_ND.double().mean(0)
        variance = float((statistics_ND - mean_D).pow(2).sum(1).mean())
        self._problem = problem = Problem(
            **shape, steps=steps, lr=lr, seed=seed, mean_D=mean_D.float(), variance=variance, device=device
        )  # fmt: skip
        self.batch, self.done = shape["batch"], 0
        self._ring = [self._on_device(self._rows.batch(number, self.batch)) for number in range(RING)]
        self._sides, self._number = [self._builders[side](problem, **options or {})], 0
        return {"checksum": zlib.crc32(self._ring[0].cpu().numpy().tobytes())}

    def beside(self, side: str, options: dict[str, Any]) -> dict[str, Any]:
        """Build another side on the same rows, to be chosen and run; `advance` counts the steps of the first."""
        self._sides.append(self._builders[side](self._problem, **options))
        return {"number": len(self._sides) - 1}

    def choose(self, number: int) -> dict[str, Any]:
        """Which side the other operations are of; 0: what was loaded."""
        self._number = number
        return {}

    def run(self, steps: int) -> dict[str, Any]:
        """Steps on the batches in memory, one after the other, after a quarter as many that are not timed."""
        side = self.loaded()
        for number in range(steps // 4):  # caches and clocks have been another side's: fast steps show it
            side.step(self._ring[number % RING])
        self._wait()
        started = time.perf_counter()
        for number in range(steps):
            side.step(self._ring[number % RING])
        self._wait()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens_per_s": steps * self.batch / seconds}

    def advance(self, to_step: int) -> dict[str, Any]:
        """Steps on new batches up to this number of them; making the batches is not timed."""
        side, seconds = self.loaded(), 0.0
        for number in range(self.done, to_step):
            x_ND = self._on_device(self._rows.batch(number, self.batch))
            self._wait()
            started = time.perf_counter()
            side.step(x_ND)
            self._wait()
            seconds += time.perf_counter() - started
        self.done = max(self.done, to_step)
        return {"seconds": seconds}

    @torch.no_grad()
    def fvu(self, rows: int) -> dict[str, Any]:
        """sum ||x - x_hat||^2 / sum ||x - mean||^2 of held-out rows, float64."""
        x_ND = self.held_out(rows)
        error = sum(
            float((part_ND - self.loaded().reconstruct(part_ND)).double().pow(2).sum())
            for part_ND in x_ND.split(self.batch)
        )
        return {"fvu": error / float((x_ND.double() - x_ND.double().mean(0)).pow(2).sum())}

    def held_out(self, rows: int) -> torch.Tensor:
        """x_ND of rows that no batch has."""
        return self._on_device(self._rows.held_out(rows))

    def memory(self) -> dict[str, Any]:
        """Peak bytes since `load`: resident ones less those of the imports, or what torch held on the GPU. The batches
        held are in it, on every side."""
        if self._device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_allocated()}
        return {"bytes": peak_bytes() - self._imports}

    def _forget_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        forget_peak()

    def _on_device(self, x_ND: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x_ND).to(self._device)

    def _wait(self) -> None:
        """Until the device has done what it was given: a clock read before that shows the queueing only."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def loaded(self) -> TrainSide:
        if not self._sides:
            raise BenchError("nothing is loaded")
        return self._sides[self._number]


def serve_sides(served: Served, **more: Callable[..., dict[str, Any]]) -> None:
    """Answer requests until the input ends; `more` are further operations."""
    serve(served.operations() | more)
