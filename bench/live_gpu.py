"""`python -m bench.live --gpu`: what reading an SAE adds to a token of an 8B shape with all of its blocks on the GPU.

The sides of `live_cases` on the model where it lies; the encoder is on the device of its hook point. The floor of the
CPU's memory says nothing there, so each reading stands beside the token without it. No GPU has run this yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import models
from bench.common import Row
from bench.live_readings import Side, added, readers, side, without
from bench.live_steps import SHARED_TOKENS, Say, Settings, in_step, session_of
from pipeline.llama.doctor import backends
from pipeline.llama.model import Model
from pipeline.llama.symbols import lc

NAME = "llama8b"
SHAPE_8B = models.Shape(d=4096, blocks=32, heads=32, kv_heads=8, ff=14336)
TOKEN_SHARE = 0.05
SETTINGS = Settings(shape=SHAPE_8B, latents=(32768, 131072), types=("F16", "Q8_0"), numpy_latents=0)
QUICK = replace(SETTINGS, tokens=64, latents=(32768,))


def device_name() -> str:
    """llama.cpp's first GPU; "" where it has none."""
    if not lc.llama_supports_gpu_offload():
        return ""
    return next((device["description"] for device in backends() if device["type"] == "gpu"), "")


def measure(path: Path, settings: Settings, say: Say) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what they rest on."""
    with Model(path, n_gpu_layers=-1) as model:
        session = session_of(model, SHARED_TOKENS, settings)
        sides: dict[str, Side] = {}
        for latents in settings.latents:
            say(f"encoders of {model.n_embd} x {latents}")
            for label, reader, n_bytes in readers(model, latents, settings):
                key = f"n{latents} k{settings.k} {label}, {n_bytes / 1e6:.0f} MB"
                sides[key] = side(session, key, reader, latents, label, n_bytes)
        say(f"{settings.tokens} rounds, {len(sides)} readings")
        meters = {key: one.meter for key, one in sides.items() if one.meter is not None}
        seconds = in_step([one.steps for one in sides.values()], settings, settings.tokens, meters=meters)
    return token_rows(seconds, list(sides)), {"model_mb": round(path.stat().st_size / 1e6)}


def token_rows(seconds: Mapping[str, Sequence[float]], keys: Sequence[str]) -> list[Row]:
    """A token with each reading against one without: the median of the differences, round by round."""
    found = []
    for key, one in added(seconds, keys, range(len(seconds[keys[0]]))).items():
        token_ms = 1e3 * statistics.median(seconds[without(key)])
        found.append(
            Row(
                case=f"{NAME} token with {key}", peer="without", unit="ms/token", ours=token_ms + one.ms, theirs=token_ms,
                ratio=token_ms / (token_ms + one.ms), target=1 / (1 + TOKEN_SHARE),
                note=f"{one.ms / token_ms:+.1%} ± {one.error / token_ms:.1%}",
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: row.case)
