"""What a reading adds to a generated token: random SAEs, their readings in turns with tokens without, and the estimate.

A token of 14 ms varies by a millisecond, a reading of 4,096 latents takes a fifth of one. So every token with a reading
follows one without (`side`), and the reading's own time inside llama.cpp's callback is measured by itself (`metered`). What
else it costs, the row's copy, a graph in two parts, Python, what the model misses in the caches then, is not a matter of
the SAE: that is taken of all readings together.

Shape letters: D width of the hook point, F latents.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Row
from bench.live_steps import SHAPE_1B, TYPES, Meter, Settings, Step, inside, session_step
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from convert.stored_rows import StoredRows
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.placement import device_at
from pipeline.llama.session import Session
from pipeline.readout import Reader
from sae.encoders import NumpyEncoder
from sae.native.build import build
from sae.weights import SAEWeights

CACHED_BYTES = 64 << 20  # encoders below are allowed SMALL_MS more
FLOOR_FACTOR, SMALL_MS, TOKEN_SHARE = 1.25, 0.1, 0.08
NUMPY = "numpy-f32"
SHARE_OF = (32768, "Q8_0")  # the encoder that is held against the token's time
MEDIAN_ERROR = 1.2533 / 1.349  # of a normal distribution, in interquartile ranges over the root of the count
_P = ctypes.c_void_p


class ReadingMeter(ctypes.Structure):
    """`struct reading_meter` of reading_meter.c."""

    _fields_ = (("inner", _P), ("argument", _P), ("nanoseconds", ctypes.c_int64))


@dataclass(frozen=True, slots=True)
class Side:
    """A reading beside the token without it."""

    latents: int
    label: str
    n_bytes: int  # of the encoder
    steps: dict[str, Step]  # without it, with it
    meter: Meter | None

    @property
    def apart(self) -> bool:
        """Whether it has rounds of its own: numpy's threads spin on for a while, into the next side."""
        return self.label == NUMPY


def side(session: Session, key: str, reader: Reader, latents: int, label: str, n_bytes: int) -> Side:
    """Both go on in the session's one text: where a context's buffers happen to lie is worth as much as a small reading."""
    meter = metered(reader)
    steps = {without(key): session_step(session, None, goes_on=True), key: session_step(session, reader, goes_on=True)}
    return Side(latents, label, n_bytes, steps, meter)


def metered(reader: Reader) -> Meter | None:
    """Has the reading timed inside the callback; None where it is not read there."""
    place: Any = reader.hook().place
    if place is None or not place.call[0]:
        return None
    library = ctypes.CDLL(str(build("reading_meter", [Path(__file__).with_name("reading_meter.c")], [("-O2",)])))
    function = ctypes.cast(library.ggscope_bench_reading, _P).value or 0
    meter = ReadingMeter(*place.call)
    place.call = function, ctypes.addressof(meter)
    return lambda: 1e-9 * meter.nanoseconds


def random_sae(model: Model, latents: int, settings: Settings) -> SAEWeights:
    """An SAE without biases at the middle block, encoder and decoder the same rows of norm 1."""
    rng = np.random.default_rng(settings.seed)
    W_FD = rng.standard_normal((latents, model.n_embd), np.float32) / np.float32(np.sqrt(model.n_embd))
    mean_D = np.zeros(model.n_embd, np.float32)
    return SAEWeights(
        W_enc_FD=W_FD, b_enc_F=np.zeros(latents), W_dec_FD=W_FD, b_dec_D=mean_D, mean_D=mean_D, variance=1.0,
        k=settings.k, hook=f"blocks.{model.n_layer // 2}.hook_resid_post",
    )  # fmt: skip


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


def without(key: str) -> str:
    """The name of the token without a reading that is timed just before one with it."""
    return f"{key}, without"


@dataclass(frozen=True, slots=True)
class Added:
    """Milliseconds that a reading adds to a token, and their standard error; those inside the callback; and what the
    difference of two tokens alone says."""

    ms: float
    error: float
    own_ms: float  # 0: not measured
    plain_ms: float
    plain_error: float


def added(seconds: Mapping[str, Sequence[float]], keys: Sequence[str], rounds: Sequence[int]) -> dict[str, Added]:
    """Of readings timed in the same rounds: medians over these, errors from the middle half."""
    gap_T = {key: 1e3 * (np.array(seconds[key]) - np.array(seconds[without(key)]))[rounds] for key in keys}
    own_T = {key: 1e3 * np.array(seconds[inside(key)])[rounds] for key in keys if inside(key) in seconds}
    rest, rest_error = median(np.concatenate([gap_T[key] - own_T[key] for key in own_T])) if own_T else (0.0, 0.0)
    found = {}
    for key in keys:
        plain_ms, plain_error = median(gap_T[key])
        if key in own_T:
            own_ms, own_error = median(own_T[key])
            found[key] = Added(own_ms + rest, float(np.hypot(own_error, rest_error)), own_ms, plain_ms, plain_error)
        else:
            found[key] = Added(plain_ms, plain_error, 0.0, plain_ms, plain_error)
    return found


def median(values_T: np.ndarray) -> tuple[float, float]:
    """And its standard error, from the middle half."""
    low, middle, high = np.percentile(values_T, [25, 50, 75]).tolist()
    return middle, MEDIAN_ERROR * (high - low) / len(values_T) ** 0.5


def reading_rows(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    sides: Mapping[str, Side],
    settings: Settings,
    kept: Sequence[int],
) -> list[Row]:
    """Added time of each reading against the time its encoder's bytes take to be read once, both of the rounds `kept`; a
    reading that was timed apart: of all."""
    ms_per_byte = 1e3 * statistics.median(seconds["sum"][t] for t in kept) / settings.sum_bytes
    every_round = range(settings.tokens)
    found = added(seconds, [key for key, one in sides.items() if not one.apart], kept)
    found |= added(seconds, [key for key, one in sides.items() if one.apart], every_round)
    rows = []
    for key, one in found.items():
        latents, label, n_bytes = sides[key].latents, sides[key].label, sides[key].n_bytes
        rounds = every_round if sides[key].apart else kept
        token_ms = 1e3 * statistics.median(seconds[without(key)][t] for t in rounds)
        floor = n_bytes * ms_per_byte
        allowed = FLOOR_FACTOR * floor + (SMALL_MS if n_bytes < CACHED_BYTES else 0.0)
        limited = settings.limits and label in TYPES
        rows.append(
            Row(
                case=f"{name} read n{latents} k{settings.k} {label}", peer="byte floor", unit="ms added",
                ours=one.ms, theirs=floor, ratio=floor / one.ms, target=floor / allowed if limited else 0.0,
                note=f"± {one.error:.3f} ms, {one.own_ms:.3f} inside, plain {one.plain_ms:.3f} ± {one.plain_error:.3f}; "
                f"{n_bytes / 1e6:.0f} MB, {100 * one.ms / token_ms:.1f} % of the token",
            )
        )  # fmt: skip
        if (latents, label) == SHARE_OF and limited:
            # a share of the whole model's token: with a quarter of its blocks the byte floor alone is more
            target = 1 / (1 + TOKEN_SHARE) if settings.shape == SHAPE_1B else 0.0
            rows.append(
                Row(
                    case=f"{name} token with n{latents} {label}", peer="without", unit="ms/token",
                    ours=token_ms + one.ms, theirs=token_ms, ratio=token_ms / (token_ms + one.ms), target=target,
                )
            )  # fmt: skip
    return rows
