"""What `python -m bench.live` times: a token's decode, bare, with a callback, or with a reading; turns of them.

All run on one thread of Python, so ggml's threads are the same ones, and each passes over the whole model between two
turns of another: nothing small stays in the cache.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import models
from bench.common import BenchError
from pipeline.llama.batches import Batch
from pipeline.llama.model import Model
from pipeline.llama.session import Session
from pipeline.llama.symbols import lc
from pipeline.readout import Reader, Reading
from sae.native.build import build

TYPES = ("F16", "Q8_0", "Q4_0")
SUM_BYTES = 1 << 30
WARM_TOKENS = 4
SHARED_TOKENS = 512  # of the context that all readings share
SHAPE_1B = models.Shape(d=2048, blocks=16, heads=32, kv_heads=8, ff=8192)

Say = Callable[[str], None]
Step = Callable[[int, int], None]  # decode token t at position p
Meter = Callable[[], float]  # seconds of a part of the step just done


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes; the defaults are the full run on a 1B shape."""

    shape: models.Shape = SHAPE_1B
    threads: int = 2
    prompt: int = 16
    tokens: int = 128
    busy_tokens: int = 128
    peer_tokens: int = 128
    latents: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    types: tuple[str, ...] = TYPES
    k: int = 32
    sum_bytes: int = SUM_BYTES
    limits: bool = True
    numpy_latents: int = 8192  # the general path beside it, for one size
    seed: int = 1

    @classmethod
    def quick(cls) -> Self:
        return cls(shape=replace(SHAPE_1B, blocks=4), tokens=256, busy_tokens=96, peer_tokens=64, latents=(4096, 32768))

    def for_demo(self) -> Settings:
        """The demo model: reported without limits."""
        return replace(self, latents=(2048,), numpy_latents=2048, limits=False)


def in_step(
    groups: Sequence[Mapping[str, Step]],
    settings: Settings,
    count: int,
    *,
    opening: Step | None = None,
    meters: Mapping[str, Meter] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every side in each of `count` rounds; the order of the groups turns with every round.

    The sides of a group follow each other. A side decodes two tokens in its turn, of which the second is timed: as it
    goes on generating. `opening` opens every round, timed as "sum". `meters`: of some sides, `inside` their step.
    """
    meters = meters or {}
    token_T2 = np.random.default_rng(settings.seed).integers(3, 500, (WARM_TOKENS + count, 2))
    names = [name for group in groups for name in group]
    seconds: dict[str, list[float]] = {
        name: [] for name in (*names, *map(inside, meters), *(["sum"] if opening else []))
    }
    for group in groups:
        for step in group.values():
            for pos in range(settings.prompt):
                step(3 + pos, pos)
    for t, (before, token) in enumerate(token_T2.tolist()):
        warm = t >= WARM_TOKENS
        if opening is not None:
            started = time.perf_counter()
            opening(0, 0)
            if warm:
                seconds["sum"].append(time.perf_counter() - started)
        for i in range(len(groups)):
            for name, step in groups[(t + i) % len(groups)].items():
                step(before, settings.prompt + 2 * t)
                started = time.perf_counter()
                step(token, settings.prompt + 2 * t + 1)
                if warm:
                    seconds[name].append(time.perf_counter() - started)
                    if name in meters:
                        seconds[inside(name)].append(meters[name]())
    return seconds


def inside(name: str) -> str:
    """The name of what a meter says of a side."""
    return f"{name}, inside"


def in_rotation(steps: Sequence[Step]) -> Step:
    """Two tokens of the first step, then of the next one: each has a text of its own, begun anew at position 0."""
    places = [0] * len(steps)
    turn = itertools.count()

    def step(token: int, pos: int) -> None:
        if pos == 0:
            places[:] = [0] * len(steps)
        at = next(turn) // 2 % len(steps)
        steps[at](token, places[at])
        places[at] += 1

    return step


def timed(step: Step, token_T: Sequence[int], start: int) -> list[float]:
    """Seconds of each token of one side."""
    seconds = []
    for t, token in enumerate(token_T):
        began = time.perf_counter()
        step(token, start + t)
        seconds.append(time.perf_counter() - began)
    return seconds


def session_of(model: Model, n_ctx: int, settings: Settings) -> Session:
    return Session(model, n_ctx=n_ctx, n_batch=min(n_ctx, 32), n_threads=settings.threads)


def session_step(
    session: Session, reader: Reader | None, keep: list[Reading] | None = None, *, goes_on: bool = False
) -> Step:
    """Decode a token and take its reading; the last one stays in `keep`.

    `goes_on`: the token comes after whatever the session holds, and first in one that is full.
    """
    hooks = [reader.hook()] if reader is not None else []
    seq_N = np.zeros(1, np.int32)

    def step(token: int, pos: int) -> None:
        if goes_on:
            pos = int(session.n_past[0]) % session.n_ctx
        if pos == 0:
            session.clear(wipe=False)
        session.decode(np.array([token]), seq_N, np.array([pos]), hooks=hooks, logits="last")
        if reader is not None:
            (reading,) = reader.take(0, [pos])
            if keep is not None:
                keep[:] = [reading]

    return step


def bare_context(model: Model, n_ctx: int, threads: int) -> Any:
    """A context like a Session's, without a callback."""
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, min(n_ctx, 32), min(n_ctx, 32)
    params.n_threads = params.n_threads_batch = threads
    params.swa_full = params.no_perf = True
    found = lc.llama_init_from_model(model.handle, params)
    if not found:
        raise BenchError(f"no context of {n_ctx} tokens")
    return found


def bare_step(context: Any) -> Step:
    def step(token: int, pos: int) -> None:
        if pos == 0:
            lc.llama_memory_clear(lc.llama_get_memory(context), True)
        batch = Batch(np.array([token]), np.zeros(1), np.array([pos]), np.ones(1))
        if code := lc.llama_decode(context, batch.c):
            raise BenchError(f"llama_decode gave {code}")
        lc.llama_synchronize(context)

    return step


def sum_step(settings: Settings) -> Step:
    values = np.ones(settings.sum_bytes // 4, np.float32)
    # not -ffast-math: a library linked with it makes the whole process flush small numbers to zero
    flags = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fopenmp")
    library = ctypes.CDLL(str(build("bandwidth", [Path(__file__).with_name("bandwidth.c")], [flags])))
    sum_of = library.ggscope_bench_sum
    sum_of.restype = ctypes.c_float
    sum_of.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]

    def step(token: int, pos: int) -> None:
        if sum_of(values.ctypes.data, values.size, settings.threads) <= 0:
            raise BenchError("the sum of ones is not positive")

    return step
