"""The measurements of `python -m bench.live`: every side decodes the same tokens before the next turn.

All run on one thread of Python, so ggml's threads are the same ones, and each passes over the whole model between two
turns of another: nothing small stays in the cache. What a reading adds is the median over the rounds of the difference
to the token without one just before it: a token's time drifts, and a small reading is a hundredth of it.

Shape letters: D width of the hook point, F latents.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import live_ask, models
from bench.common import ROOT, BenchError, Row
from bench.ours import beside
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from convert.stored_rows import StoredRows
from pipeline.llama.batches import Batch
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.placement import device_at
from pipeline.llama.session import Session
from pipeline.llama.symbols import lc
from pipeline.readout import Reader, Reading
from sae.encoders import NumpyEncoder
from sae.native.build import build
from sae.weights import SAEWeights

TYPES = ("F16", "Q8_0", "Q4_0")
SUM_BYTES = 1 << 30
SPEED_SPREAD = 0.15  # of the time of a sum, among rounds at one speed of memory
CACHED_BYTES = 64 << 20  # encoders below are allowed SMALL_MS more
FLOOR_FACTOR, SMALL_MS = 1.25, 0.1
TOKEN_SHARE, CALLBACK_SHARE, BUSY_SHARE = 0.08, 0.03, 0.10
NUMPY, SAME = "numpy-f32", "same context"
SHARED_TOKENS = 512
SHARE_OF = (32768, "Q8_0")  # the encoder that is held against the token's time
WARM_TOKENS = 4
MEDIAN_ERROR = 1.2533 / 1.349  # of a normal distribution, in interquartile ranges over the root of the count
CONTEXTS = 8  # whose buffers lie in as many places
SHAPE_1B = models.Shape(d=2048, blocks=16, heads=32, kv_heads=8, ff=8192)

Say = Callable[[str], None]
Step = Callable[[int, int], None]  # decode token t at position p


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes; the defaults are the full run on a 1B shape."""

    shape: models.Shape = SHAPE_1B
    threads: int = 2
    prompt: int = 16
    tokens: int = 128
    busy_tokens: int = 64
    latents: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    types: tuple[str, ...] = TYPES
    k: int = 32
    sum_bytes: int = SUM_BYTES
    limits: bool = True
    numpy_latents: int = 8192  # the general path beside it, for one size
    seed: int = 1

    @classmethod
    def quick(cls) -> Self:
        return cls(shape=replace(SHAPE_1B, blocks=4), tokens=256, busy_tokens=32, latents=(4096, 32768))

    def for_demo(self) -> Settings:
        """The demo model: reported without limits."""
        return replace(self, latents=(2048,), numpy_latents=2048, limits=False)


def prepare(name: str, folder: Path, settings: Settings, say: Say) -> Path:
    """The model's file, made where it is missing."""
    if name == "demo":
        return ROOT / "pipeline" / "data" / "pylm.gguf"
    path = folder / settings.shape.name / "Q8_0.gguf"
    if not path.exists():
        say(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        models.write_gguf(path, settings.shape, "Q8_0")
    return path


def measure(name: str, path: Path, settings: Settings, say: Say) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one model, and what they rest on."""
    with Model(path) as model, _sides(model, settings, say) as (hooks, pairs, sizes):
        say(f"{name}: {settings.tokens} rounds, {len(pairs)} readings")
        apart = [key for key in pairs if key.endswith(NUMPY)]  # numpy's threads spin on for a while, into the next side
        together = [hooks, *(pair for key, pair in pairs.items() if key not in apart)]
        sum_step = _sum_step(settings)
        if settings.limits:
            quiet = in_step(together, settings, settings.tokens, meter=sum_step)
        else:  # a small model: what the sum throws out of the caches would not come back with one token
            quiet = in_step(together, settings, settings.tokens)
            quiet["sum"] = timed(sum_step, range(settings.tokens), 0)
        for key in apart:
            quiet |= in_step([pairs[key]], settings, settings.tokens)
        say(f"{name}: {settings.busy_tokens} tokens beside a busy Python thread")
        with beside(busy=True):
            busy = in_step([hooks], settings, settings.busy_tokens)
        token_ms = 1e3 * statistics.median(quiet["callback"])
        asked = live_ask.rows(name, model, turns=settings.busy_tokens, threads=settings.threads, token_ms=token_ms)
    kept = same_speed(quiet["sum"])
    seconds = settings.sum_bytes / 1e9
    facts = {
        f"{name} bandwidth_gb_s": round(seconds / statistics.median(quiet["sum"]), 1),
        f"{name} rounds at that bandwidth": f"{len(kept)} of {len(quiet['sum'])}",
        f"{name} ms_per_token": round(token_ms, 3),
        f"{name} model_mb": round(path.stat().st_size / 1e6),
    }
    rows = [*_callback_rows(name, quiet, busy, settings), *asked, *_reading_rows(name, quiet, sizes, settings)]
    return rows, facts


def same_speed(sum_T: Sequence[float]) -> list[int]:
    """The most rounds whose sums took about as long. A virtual machine's processors move: memory then runs at another
    speed for seconds, and rounds at one speed cannot be held against a floor at another."""
    near = [[t for t, other in enumerate(sum_T) if abs(other - one) <= SPEED_SPREAD * one] for one in sum_T]
    return max(near, key=len)


def in_step(
    groups: Sequence[Mapping[str, Step]], settings: Settings, count: int, *, meter: Step | None = None
) -> dict[str, list[float]]:
    """Seconds of every side in each of `count` rounds; the order of the groups turns with every round.

    The sides of a group follow each other. A side decodes two tokens in its turn, of which the second is timed: as it
    goes on generating. `meter` opens every round, timed as "sum".
    """
    token_T2 = np.random.default_rng(settings.seed).integers(3, 500, (WARM_TOKENS + count, 2))
    names = [name for group in groups for name in group]
    seconds: dict[str, list[float]] = {name: [] for name in (*names, *(["sum"] if meter else []))}
    for group in groups:
        for step in group.values():
            for pos in range(settings.prompt):
                step(3 + pos, pos)
    for t, (before, token) in enumerate(token_T2.tolist()):
        warm = t >= WARM_TOKENS
        if meter is not None:
            started = time.perf_counter()
            meter(0, 0)
            if warm:
                seconds["sum"].append(time.perf_counter() - started)
        for i in range(len(groups)):
            for name, step in groups[(t + i) % len(groups)].items():
                step(before, settings.prompt + 2 * t)
                started = time.perf_counter()
                step(token, settings.prompt + 2 * t + 1)
                if warm:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def without(key: str) -> str:
    """The name of the token without a reading that is timed just before one with it."""
    return f"{key}, {SAME}"


def added_ms(seconds: Mapping[str, Sequence[float]], key: str, kept: Sequence[int]) -> tuple[float, float]:
    """Milliseconds that a reading adds to a token, and their standard error: of the median over these rounds, from the
    middle half of them."""
    gap_T = 1e3 * (np.array(seconds[key]) - np.array(seconds[without(key)]))[kept]
    low, median, high = np.percentile(gap_T, [25, 50, 75]).tolist()
    return median, MEDIAN_ERROR * (high - low) / len(gap_T) ** 0.5


@contextmanager
def _sides(
    model: Model, settings: Settings, say: Say
) -> Iterator[tuple[dict[str, Step], dict[str, dict[str, Step]], dict[str, tuple[int, str, int]]]]:
    """ "bare" and "callback"; of every reading the token without it and with it, and (F, type, bytes of the encoder).

    Where a context's buffers happen to lie is worth as much as a small reading, and more than a callback. So the readings
    and the tokens without have one context and go on in one text; "bare" and "callback" are several contexts each, a
    token in turn.
    """
    n_ctx = (settings.prompt + 2 * (WARM_TOKENS + max(settings.tokens, settings.busy_tokens))) // CONTEXTS + 2
    bare = [_bare_context(model, n_ctx, settings.threads) for _ in range(CONTEXTS)]
    hooks: dict[str, Step] = {"bare": in_rotation([_bare_step(context) for context in bare])}
    pairs: dict[str, dict[str, Step]] = {}
    sizes: dict[str, tuple[int, str, int]] = {}
    try:
        sessions = [session_of(model, n_ctx, settings) for _ in range(CONTEXTS)]
        hooks["callback"] = in_rotation([session_step(session, None) for session in sessions])
        session = session_of(model, SHARED_TOKENS, settings)
        for latents in settings.latents:
            say(f"encoders of {model.n_embd} x {latents}")
            for label, reader, n_bytes in readers(model, latents, settings):
                key = f"{latents} {label}"
                pairs[key] = pair(session, key, reader)
                sizes[key] = (latents, label, n_bytes)
        yield hooks, pairs, sizes
    finally:
        for context in bare:
            lc.llama_free(context)


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


def random_sae(model: Model, latents: int, settings: Settings) -> SAEWeights:
    """An SAE without biases at the middle block, encoder and decoder the same rows of norm 1."""
    rng = np.random.default_rng(settings.seed)
    W_FD = rng.standard_normal((latents, model.n_embd), np.float32) / np.float32(np.sqrt(model.n_embd))
    mean_D = np.zeros(model.n_embd, np.float32)
    return SAEWeights(
        W_enc_FD=W_FD, b_enc_F=np.zeros(latents), W_dec_FD=W_FD, b_dec_D=mean_D, mean_D=mean_D, variance=1.0,
        k=settings.k, hook=f"blocks.{model.n_layer // 2}.hook_resid_post",
    )  # fmt: skip


def timed(step: Step, token_T: Sequence[int], start: int) -> list[float]:
    """Seconds of each token of one side."""
    seconds = []
    for t, token in enumerate(token_T):
        began = time.perf_counter()
        step(token, start + t)
        seconds.append(time.perf_counter() - began)
    return seconds


def readers(model: Model, latents: int, settings: Settings) -> Iterator[tuple[str, Reader, int]]:
    """A random SAE's reader for every type of its encoder, from a file as `ggscope convert` writes it, and numpy's for one
    size."""
    weights = random_sae(model, latents, settings)
    device = device_at(model, HookPoint.parse(weights.hook))
    for label in settings.types:
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays when the file has no name any more
            path = write_sae_gguf(Path(folder) / "sae.gguf", weights, encoder_type=label)
            stored = read_sae_gguf(path, stored=True)
            encoder = GgmlEncoder(stored, n_threads=settings.threads, device=device)
        assert isinstance(stored.W_enc_FD, StoredRows)
        yield label, Reader(stored, top=settings.k, encoder=encoder), stored.W_enc_FD.raw_FB.nbytes
    if latents == settings.numpy_latents:
        yield NUMPY, Reader(weights, top=settings.k, encoder=NumpyEncoder(weights)), weights.W_enc_FD.nbytes


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


def pair(session: Session, key: str, reader: Reader) -> dict[str, Step]:
    """A token without the reading, then one with it, in the session's one text."""
    return {without(key): session_step(session, None, goes_on=True), key: session_step(session, reader, goes_on=True)}


def _bare_context(model: Model, n_ctx: int, threads: int) -> Any:
    """A context like a Session's, without a callback."""
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, min(n_ctx, 32), min(n_ctx, 32)
    params.n_threads = params.n_threads_batch = threads
    params.swa_full = params.no_perf = True
    found = lc.llama_init_from_model(model.handle, params)
    if not found:
        raise BenchError(f"no context of {n_ctx} tokens")
    return found


def _bare_step(context: Any) -> Step:
    def step(token: int, pos: int) -> None:
        if pos == 0:
            lc.llama_memory_clear(lc.llama_get_memory(context), True)
        batch = Batch(np.array([token]), np.zeros(1), np.array([pos]), np.ones(1))
        if code := lc.llama_decode(context, batch.c):
            raise BenchError(f"llama_decode gave {code}")
        lc.llama_synchronize(context)

    return step


def _sum_step(settings: Settings) -> Step:
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


def _callback_rows(name: str, quiet: Mapping, busy: Mapping, settings: Settings) -> list[Row]:
    rows = []
    for case, seconds, share in (("callback", quiet, CALLBACK_SHARE), ("callback, busy", busy, BUSY_SHARE)):
        ratio = statistics.median(b / a for a, b in zip(seconds["callback"], seconds["bare"], strict=True))
        ours, theirs = (1e3 * statistics.median(seconds[side]) for side in ("callback", "bare"))
        target = 1 / (1 + share) if settings.limits else 0.0
        rows.append(
            Row(
                case=f"{name} {case}",
                peer="llama.cpp",
                unit="ms/token",
                ours=ours,
                theirs=theirs,
                ratio=ratio,
                target=target,
            )
        )
    return rows


def _reading_rows(
    name: str, seconds: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, str, int]], settings: Settings
) -> list[Row]:
    """Added time of each reading against the time its encoder's bytes take to be read once. Of the rounds at one speed of
    memory (`same_speed`); a reading that was timed apart: of all."""
    kept = same_speed(seconds["sum"]) if settings.limits else list(range(len(seconds["sum"])))
    ms_per_byte = 1e3 * statistics.median(seconds["sum"][t] for t in kept) / settings.sum_bytes
    rows = []
    for key, (latents, label, n_bytes) in sizes.items():
        rounds = list(range(len(seconds[key]))) if key.endswith(NUMPY) else kept
        added, error = added_ms(seconds, key, rounds)
        token_ms = 1e3 * statistics.median(seconds[without(key)][t] for t in rounds)
        floor = n_bytes * ms_per_byte
        allowed = FLOOR_FACTOR * floor + (SMALL_MS if n_bytes < CACHED_BYTES else 0.0)
        limited = settings.limits and label in TYPES
        rows.append(
            Row(
                case=f"{name} read n{latents} k{settings.k} {label}",
                peer="byte floor",
                unit="ms added",
                ours=added,
                theirs=floor,
                ratio=floor / added,
                target=floor / allowed if limited else 0.0,
                note=f"± {error:.3f} ms; {n_bytes / 1e6:.0f} MB, {100 * added / token_ms:.1f} % of the token",
            )
        )
        if (latents, label) == SHARE_OF and limited:
            with_reading = token_ms + added
            # a share of the whole model's token: with a quarter of its blocks the byte floor alone is more
            target = 1 / (1 + TOKEN_SHARE) if settings.shape == SHAPE_1B else 0.0
            rows.append(
                Row(
                    case=f"{name} token with n{latents} {label}",
                    peer="without",
                    unit="ms/token",
                    ours=with_reading,
                    theirs=token_ms,
                    ratio=token_ms / with_reading,
                    target=target,
                )
            )
    return rows
