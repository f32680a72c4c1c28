"""Steering by a latent, x' = x + coeff W_dec[f], measured against random directions of equal norm.

D width, V vocabulary, P promoted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.evaluation.splice import CLEAN, Reconstruct, SpliceConfig, TokenWindow, splice
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Rows, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Means over the counted tokens at each coefficient: log-probability of the promoted tokens, and KL."""

    coeffs: list[float]
    log_prob: list[float]  # mean over positions and promoted tokens, nats
    kl: list[float]  # mean KL(plain || steered)
    positions: int


def steering_curves(
    model: Model,
    windows: list[TokenWindow],
    hook: HookPoint,
    directions: Mapping[str, np.ndarray],
    promoted_P: np.ndarray,
    coeffs: Sequence[float],
    *,
    config: SpliceConfig | None = None,
) -> dict[str, Curve]:
    """One curve per direction. Every unflagged row of the windows is moved by coeff * direction.

    `promoted_P` are token ids; the same for all directions, so that a control shows what a shift of that
    size alone does to them.
    """
    sums: dict[str, float] = {}
    seen: dict[str, int] = {}

    def observe(run: str, logits_NV: np.ndarray, log_z_N: np.ndarray) -> None:
        log_p_NP = logits_NV[:, promoted_P].astype(np.float64) - log_z_N[:, None]
        sums[run] = sums.get(run, 0.0) + float(log_p_NP.sum())
        seen[run] = seen.get(run, 0) + log_p_NP.size

    runs: dict[str, Reconstruct] = {}
    for name, direction_D in directions.items():
        for coeff in coeffs:
            if coeff != 0:
                runs[f"{name}/{coeff:g}"] = _shift(coeff * direction_D.astype(np.float32))
    result = splice(model, windows, runs, hook, config=config, observe=observe)

    def point(name: str, coeff: float) -> tuple[float, float]:
        run = CLEAN if coeff == 0 else f"{name}/{coeff:g}"
        kl = 0.0 if coeff == 0 else float(result.kl[run].mean())
        return sums[run] / max(1, seen[run]), kl

    return {
        name: Curve(
            coeffs=[float(c) for c in coeffs],
            log_prob=[point(name, c)[0] for c in coeffs],
            kl=[point(name, c)[1] for c in coeffs],
            positions=len(result.document_N),
        )
        for name in directions
    }


def random_directions(direction_D: np.ndarray, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`count` directions drawn uniformly from the sphere, of the norm of `direction_D`."""
    norm = float(np.linalg.norm(direction_D))
    drawn_CD = rng.standard_normal((count, len(direction_D)))
    drawn_CD *= norm / np.linalg.norm(drawn_CD, axis=1, keepdims=True)
    return {f"random {i}": row.astype(np.float32) for i, row in enumerate(drawn_CD)}


def responses(
    model: Model,
    windows: list[TokenWindow],
    hook: HookPoint,
    candidates: Mapping[int, tuple[np.ndarray, float, np.ndarray]],
    factors: Sequence[float],
    *,
    config: SpliceConfig | None = None,
) -> dict[int, list[float]]:
    """Change of the mean log-probability of a latent's own promoted tokens, steered at factor * its coefficient.

    `candidates` maps a latent to (direction_D, coefficient, its promoted token ids); one value per factor.
    """
    sums: dict[str, float] = {}
    seen = 0

    def observe(run: str, logits_NV: np.ndarray, log_z_N: np.ndarray) -> None:
        nonlocal seen
        seen += len(log_z_N) if run == CLEAN else 0
        for latent, (_, _, promoted_P) in candidates.items():
            if run == CLEAN or run.startswith(f"{latent}/"):
                log_p = float((logits_NV[:, promoted_P].astype(np.float64) - log_z_N[:, None]).mean(axis=1).sum())
                key = f"{run}/{latent}" if run == CLEAN else run
                sums[key] = sums.get(key, 0.0) + log_p

    runs = {
        f"{f}/{i}": _shift(np.float32(factor * coeff) * d_D)
        for f, (d_D, coeff, _) in candidates.items()
        for i, factor in enumerate(factors)
    }
    splice(model, windows, runs, hook, config=config, observe=observe)
    return {
        f: [(sums[f"{f}/{i}"] - sums[f"{CLEAN}/{f}"]) / max(1, seen) for i in range(len(factors))] for f in candidates
    }


def clearest(changes: Mapping[int, Sequence[float]], factors: Sequence[float]) -> int:
    """The latent of the largest change at the last factor, of those that rise at every step where there are any."""

    def rises(latent: int) -> bool:
        points = sorted([(0.0, 0.0), *zip(factors, changes[latent], strict=True)])
        return all(low < high for (_, low), (_, high) in pairwise(points))

    rising = [latent for latent in changes if rises(latent)]
    return max(rising or list(changes), key=lambda latent: changes[latent][-1])


def complete(
    model: Model,
    prompt: bytes,
    hook: HookPoint,
    delta_D: np.ndarray | None,
    *,
    max_tokens: int,
    session: Mapping[str, Any] | None = None,
) -> bytes:
    """The greedy completion of `prompt`, with `delta_D` added at `hook` to every token but BOS (None: plain)."""
    tokens = [model.bos] if model.add_bos and model.bos is not None else []
    first = len(tokens)
    tokens = np.array([*tokens, *model.tokenize(prompt).tolist()], np.int32)
    hooks = () if delta_D is None else (Hook(point=hook, read=None, edit=_adder(delta_D, first)),)
    out: list[bytes] = []
    llama = Session(model, n_ctx=len(tokens) + max_tokens, **dict(session or {}))
    try:
        position, pending_N = 0, tokens
        for _ in range(max_tokens):
            pos_N = np.arange(position, position + len(pending_N), dtype=np.int32)
            logits_NV = llama.decode(
                pending_N, np.zeros_like(pos_N), pos_N, hooks=hooks, logits="last", edits_key="steer" if hooks else ""
            )
            assert logits_NV is not None
            token = int(logits_NV[-1].argmax())
            if token == model.eos or model.is_special(token):
                break
            out.append(model.piece(token))
            position += len(pending_N)
            pending_N = np.array([token], np.int32)
    finally:
        llama.close()
    return b"".join(out)


def _shift(delta_D: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x_ND: x_ND + delta_D


def _adder(delta_D: np.ndarray, first: int) -> Callable[[Rows], np.ndarray]:
    def edit(rows: Rows) -> np.ndarray:
        return np.where(rows.pos_N[:, None] >= first, delta_D, np.float32(0)).astype(np.float32)

    return edit
