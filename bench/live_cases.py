"""The measurements of `python -m bench.live`: every side decodes the same tokens before the next turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import live_ask, models
from bench.common import ROOT, Row
from bench.live_readings import Side, readers, reading_rows, side
from bench.live_steps import (
    SHARED_TOKENS,
    WARM_TOKENS,
    Say,
    Settings,
    Step,
    bare_context,
    bare_step,
    in_rotation,
    in_step,
    session_of,
    session_step,
    sum_step,
    timed,
)
from bench.ours import beside
from pipeline.llama.model import Model
from pipeline.llama.symbols import lc

SPEED_SPREAD = 0.15  # of the time of a sum, among rounds at one speed of memory
CALLBACK_SHARE, BUSY_SHARE = 0.03, 0.10
CONTEXTS = 8  # whose buffers lie in as many places


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
    with Model(path) as model, _sides(model, settings, say) as (hooks, sides):
        say(f"{name}: {settings.tokens} rounds, {len(sides)} readings")
        together = [hooks, *(one.steps for one in sides.values() if not one.apart)]
        meters = {key: one.meter for key, one in sides.items() if one.meter is not None}
        summing = sum_step(settings)
        if settings.limits:
            quiet = in_step(together, settings, settings.tokens, opening=summing, meters=meters)
        else:  # a small model: what the sum throws out of the caches would not come back with one token
            quiet = in_step(together, settings, settings.tokens, meters=meters)
            quiet["sum"] = timed(summing, range(settings.tokens), 0)
        for one in sides.values():
            if one.apart:
                quiet |= in_step([one.steps], settings, settings.tokens)
        say(f"{name}: {settings.busy_tokens} tokens beside a busy Python thread")
        with beside(busy=True):
            busy = in_step([hooks], settings, settings.busy_tokens)
        token_ms = 1e3 * statistics.median(quiet["callback"])
        asked = live_ask.rows(name, model, turns=settings.busy_tokens, threads=settings.threads, token_ms=token_ms)
    kept = same_speed(quiet["sum"]) if settings.limits else range(settings.tokens)
    seconds = settings.sum_bytes / 1e9
    facts = {
        f"{name} bandwidth_gb_s": round(seconds / statistics.median(quiet["sum"]), 1),
        f"{name} rounds at that bandwidth": f"{len(kept)} of {len(quiet['sum'])}",
        f"{name} ms_per_token": round(token_ms, 3),
        f"{name} model_mb": round(path.stat().st_size / 1e6),
    }
    rows = [*_callback_rows(name, quiet, busy, settings), *asked, *reading_rows(name, quiet, sides, settings, kept)]
    return rows, facts


def same_speed(sum_T: Sequence[float]) -> list[int]:
    """The most rounds whose sums took about as long. A virtual machine's processors move: memory then runs at another
    speed for seconds, and rounds at one speed cannot be held against a floor at another."""
    near = [[t for t, other in enumerate(sum_T) if abs(other - one) <= SPEED_SPREAD * one] for one in sum_T]
    return max(near, key=len)


@contextmanager
def _sides(model: Model, settings: Settings, say: Say) -> Iterator[tuple[dict[str, Step], dict[str, Side]]]:
    """The sides "bare" and "callback", and the readings.

    Where a context's buffers happen to lie is worth more than a callback: "bare" and "callback" are several contexts each,
    a token in turn.
    """
    n_ctx = (settings.prompt + 2 * (WARM_TOKENS + max(settings.tokens, settings.busy_tokens))) // CONTEXTS + 2
    bare = [bare_context(model, n_ctx, settings.threads) for _ in range(CONTEXTS)]
    hooks: dict[str, Step] = {"bare": in_rotation([bare_step(context) for context in bare])}
    sides: dict[str, Side] = {}
    try:
        sessions = [session_of(model, n_ctx, settings) for _ in range(CONTEXTS)]
        hooks["callback"] = in_rotation([session_step(session, None) for session in sessions])
        session = session_of(model, SHARED_TOKENS, settings)
        for latents in settings.latents:
            say(f"encoders of {model.n_embd} x {latents}")
            for label, reader, n_bytes in readers(model, latents, settings):
                key = f"{latents} {label}"
                sides[key] = side(session, key, reader, latents, label, n_bytes)
        yield hooks, sides
    finally:
        for context in bare:
            lc.llama_free(context)


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
