"""One prompt many times in one batch, each time under edits of its own: what sweeps over blocks, positions, heads cost.

Products of more rows round otherwise, so the prompt as it is stands in every batch of several: what changes nothing is
then 0, as long as the batch is one pass through the graph (`n_ubatch`).

Shape letters: S prompts side by side, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from sae.errors import ConfigError, LlamaError

from ..interventions.base import Intervention, Sequences, edit_hooks, edits_key
from ..llama.session import Session

Variant = TypeVar("Variant")


def check_fits(session: Session, count: int) -> None:
    """ConfigError for prompts that one batch does not hold."""
    held = min(session.n_ctx_seq, session.n_batch)
    if count > held:
        raise ConfigError(f"the prompts have {count} tokens, one batch of the context holds {held}; raise model.n_ctx")


def decoded(
    session: Session,
    tokens_T: np.ndarray,
    variants: Sequence[Variant],
    edits: Callable[[Sequence[Variant]], Sequence[Intervention]],
    *,
    flags: Sequence[bool] = (),
    side_by_side: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each batch of variants the logits after the last token, (S, V), and those of the prompt as it is, (V,), as
    they are in that batch.

    `edits`: what changes sequence s into variant s of a batch. `flags`: of the prompt's tokens (`Sequences`), none if
    empty. `side_by_side`: variants of a batch; 0 takes as many as the session's sequences, batch and context hold.
    """
    width, beside = _width(session, len(tokens_T), side_by_side)
    plain_V = None if beside else last_logits(session, tokens_T, 1, [])[0]
    for start in range(0, len(variants), width):
        batch = variants[start : start + width]
        logits_SV = last_logits(session, tokens_T, len(batch) + beside, edits(batch), flags)
        yield logits_SV[: len(batch)], logits_SV[-1] if plain_V is None else plain_V
    session.clear()


def last_logits(
    session: Session,
    tokens_T: np.ndarray,
    copies: int,
    interventions: Sequence[Intervention],
    flags: Sequence[bool] = (),
) -> np.ndarray:
    """Logits after the last token of each of `copies` runs of the prompt, (S, V) float32. LlamaError for any that are not
    finite."""
    sequences = Sequences()
    for seq in range(copies):
        sequences.start(seq, flags or [False] * len(tokens_T))
    session.clear()
    logits_SV = session.decode(
        np.tile(tokens_T, copies),
        np.repeat(np.arange(copies, dtype=np.int32), len(tokens_T)),
        np.tile(np.arange(len(tokens_T), dtype=np.int32), copies),
        hooks=edit_hooks(interventions, sequences),
        logits="last",
        edits_key=edits_key(interventions, sequences),
    )
    if logits_SV is None:
        raise LlamaError("an edited prompt gave no logits")
    if not np.isfinite(logits_SV.max(axis=1)).all():  # NaN, +inf, or -inf for every token
        raise LlamaError(
            "the logits after the prompt are not finite, so nothing can be measured: `ggscope apply` shows from which token on"
        )
    return logits_SV


def _width(session: Session, count: int, side_by_side: int) -> tuple[int, int]:
    """Variants of a batch, and whether (0, 1) the unedited prompt is decoded beside them: not where one prompt fits."""
    cells = session.n_ctx // count if session.kv_unified else session.n_seq_max
    most = max(1, min(session.n_seq_max, session.n_batch // count, cells))
    beside = int(most > 1)
    if side_by_side > most - beside:
        raise ConfigError(
            f"side_by_side: this session holds at most {most} prompts of {count} tokens, {beside} of them unpatched, got "
            f"{side_by_side}"
        )
    return side_by_side or most - beside, beside
