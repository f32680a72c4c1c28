"""Logit lens: what the model would answer if each block were its last.

For the residual x after each block: p = softmax(unembed(norm(x))) with the model's real final norm and output matrix.
Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

Shape letters: L+1 rows of the lens (the embedding, then each block), T positions, K top tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae.errors import ConfigError

from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Hook, Rows, Session
from ..llama.unembed import Unembedding

CHUNK_BYTES = 64 << 20  # most that one float64 array of lens logits may take


@dataclass(frozen=True, kw_only=True, slots=True)
class LensResult:
    """Arrays for a heat map: rows are lens rows from the embedding up, columns positions.

    entropy_LT and kl_LT in nats; kl = KL(p_model || p_lens), 0 where the lens already says what the model will.
    next_logprob_LT: log p_lens of the token that really follows, nan at the last position.
    last_block_error: ||lens of the last block - logits|| / ||logits||, the check that norm and matrix are the real ones.
    """

    tokens_T: np.ndarray
    hooks: tuple[str, ...]
    top_tokens_LTK: np.ndarray
    top_probs_LTK: np.ndarray
    entropy_LT: np.ndarray
    kl_LT: np.ndarray
    next_logprob_LT: np.ndarray
    last_block_error: float


def logit_lens(session: Session, model: Model, tokens: np.ndarray, *, top: int = 5) -> LensResult:
    """Runs `tokens` once (all logits) and reads every residual through the model's unembedding.

    Raises ConfigError for no tokens, more than the context holds, or top outside 1..n_vocab.
    """
    tokens_T = np.asarray(tokens, dtype=np.int32).reshape(-1)
    if not 1 <= len(tokens_T) <= session.n_ctx_seq:
        raise ConfigError(f"the lens needs 1 to {session.n_ctx_seq} tokens (the context), got {len(tokens_T)}")
    if not 1 <= top <= model.n_vocab:
        raise ConfigError(f"top: expected 1 to {model.n_vocab} tokens, got {top}")
    points = [HookPoint("resid_pre", 0)] + [HookPoint("resid_post", block) for block in range(model.id.n_layer)]
    residuals, logits_TV = _run(session, tokens_T, points)
    unembedding = model.unembed()
    rows = [_lens_row(unembedding, x_TD, logits_TV, tokens_T, top) for x_TD in residuals]
    return LensResult(
        tokens_T=tokens_T,
        hooks=tuple(str(point) for point in points),
        top_tokens_LTK=np.stack([row["top_tokens"] for row in rows]).astype(np.int32),
        top_probs_LTK=np.stack([row["top_probs"] for row in rows]),
        entropy_LT=np.stack([row["entropy"] for row in rows]),
        kl_LT=np.stack([row["kl"] for row in rows]),
        next_logprob_LT=np.stack([row["next_logprob"] for row in rows]),
        last_block_error=float(np.sqrt(rows[-1]["gap"].sum() / rows[-1]["size"].sum())),
    )


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    """log p in nats over the last axis, float64."""
    shifted_NV = logits_NV.astype(np.float64)
    shifted_NV -= shifted_NV.max(axis=-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(axis=-1, keepdims=True))


def _run(session: Session, tokens_T: np.ndarray, points: list[HookPoint]) -> tuple[list[np.ndarray], np.ndarray]:
    count, found = len(tokens_T), {}

    def keep(point: HookPoint) -> Hook:
        def read(rows: Rows) -> None:
            x_TD = found.setdefault(point, np.full((count, rows.values_ND.shape[1]), np.nan, dtype=np.float32))
            x_TD[rows.pos_N] = rows.values_ND

        return Hook(point=point, read=read)

    session.clear()
    positions_T, seq_T = np.arange(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
    logits = [
        session.decode(tokens_T[part], seq_T[part], positions_T[part], hooks=[keep(p) for p in points], logits="all")
        for part in _chunks(count, session.n_batch)
    ]
    session.clear()
    return [found[point] for point in points], np.concatenate([part for part in logits if part is not None])


def _chunks(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, max(1, step))]


def _lens_row(
    unembedding: Unembedding, x_TD: np.ndarray, logits_TV: np.ndarray, tokens_T: np.ndarray, top: int
) -> dict[str, np.ndarray]:
    """One row of the lens, position by position as far as memory goes."""
    step = max(1, CHUNK_BYTES // (8 * logits_TV.shape[1]))
    following_T = np.append(tokens_T[1:], -1)
    parts = [
        _lens_cells(unembedding.logits(x_TD[part]), logits_TV[part], following_T[part], top)
        for part in _chunks(len(tokens_T), step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _lens_cells(lens_NV: np.ndarray, logits_NV: np.ndarray, following_N: np.ndarray, top: int) -> dict[str, np.ndarray]:
    q_NV, p_NV = log_softmax(lens_NV), log_softmax(logits_NV)
    order_NK = np.argsort(-q_NV, axis=1, kind="stable")[:, :top]
    next_N = q_NV[np.arange(len(q_NV)), following_N]
    return {
        "top_tokens": order_NK,
        "top_probs": np.exp(np.take_along_axis(q_NV, order_NK, axis=1)),
        "entropy": -(np.exp(q_NV) * q_NV).sum(axis=1),
        "kl": (np.exp(p_NV) * (p_NV - q_NV)).sum(axis=1),
        "next_logprob": np.where(following_N >= 0, next_N, np.nan),
        "gap": ((lens_NV.astype(np.float64) - logits_NV) ** 2).sum(axis=1),
        "size": (logits_NV.astype(np.float64) ** 2).sum(axis=1),
    }
