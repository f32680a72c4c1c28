"""What edits of the forward pass do to the next token after a prompt, each alone, many side by side in a batch.

Shape letters: T prompt tokens, N edits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sae.errors import ConfigError

from ..interventions.base import Intervention
from ..llama.model import Model
from ..llama.session import Session
from .logit_lens import log_softmax
from .patching import prompt_tokens, single_token
from .side_by_side import check_fits, decoded, last_logits

Variant = TypeVar("Variant")


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken:
    """What is looked at: `logit_difference` of answer - wrong, or `logprob` of the answer (nats) where there is no wrong
    one. `plain`: that of the model as it is. `likeliest`: its next token."""

    tokens: np.ndarray
    answer: int
    wrong: int | None
    likeliest: int
    plain: float

    @property
    def measure(self) -> str:
        return "logprob" if self.wrong is None else "logit_difference"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "measure": self.measure,
            "plain": self.plain,
            "tokens": self.tokens.tolist(),
            "answer": self.answer,
            "wrong": self.wrong,
            "likeliest": self.likeliest,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """effect_N: the measure under each edit - without it, below 0 where what was taken away speaks for the answer. kl_N:
    KL(as it is || edited), nats. likeliest_N: the likeliest next token under the edit."""

    effect_N: np.ndarray
    kl_N: np.ndarray
    likeliest_N: np.ndarray


def next_token(session: Session, model: Model, prompt: str, answer: str = "", wrong: str = "") -> NextToken:
    """`answer`: the token looked at, the likeliest one if ""; `wrong`: another one, for the logit difference.

    Raises ConfigError for a prompt without tokens or too long, and for answers that are not one token, or the same one.
    """
    tokens_T = prompt_tokens(model, prompt)
    if not len(tokens_T):
        raise ConfigError("the prompt has no token")
    check_fits(session, len(tokens_T))
    plain_V = log_softmax(last_logits(session, tokens_T, 1, [])[0])
    likeliest = int(plain_V.argmax())
    chosen = single_token(model, answer, "answer") if answer else likeliest
    against = single_token(model, wrong, "wrong") if wrong else None
    if against == chosen:
        which = "the answer" if answer else "the likeliest next token; name an answer, or another one"
        raise ConfigError(f"wrong: {wrong!r} is {which}")
    return NextToken(
        tokens=tokens_T, answer=chosen, wrong=against, likeliest=likeliest, plain=_measure(plain_V, chosen, against)
    )


def effects(
    session: Session,
    target: NextToken,
    variants: Sequence[Variant],
    edits: Callable[[Sequence[Variant]], Sequence[Intervention]],
    *,
    flags: Sequence[bool] = (),
    side_by_side: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Of each variant alone; `edits`, `flags` and `side_by_side` as `side_by_side.decoded` takes them."""
    found: list[tuple[float, float, int]] = []
    for edited_SV, plain_V in decoded(session, target.tokens, variants, edits, flags=flags, side_by_side=side_by_side):
        clean_V = log_softmax(plain_V)
        before = _measure(clean_V, target.answer, target.wrong)
        for edited_V in map(log_softmax, edited_SV):
            effect = _measure(edited_V, target.answer, target.wrong) - before
            likely_V = clean_V > -np.inf  # a token that cannot be has no share in KL
            kl = (np.exp(clean_V[likely_V]) * (clean_V[likely_V] - edited_V[likely_V])).sum()
            found.append((effect, max(0.0, float(kl)), int(edited_V.argmax())))
        if progress is not None:
            progress(len(found), len(variants))
    effect_N, kl_N, likeliest_N = zip(*found, strict=True) if found else ((), (), ())
    return Effects(effect_N=np.array(effect_N), kl_N=np.array(kl_N), likeliest_N=np.array(likeliest_N, np.int64))


def _measure(logprob_V: np.ndarray, answer: int, wrong: int | None) -> float:
    return float(logprob_V[answer] - (0 if wrong is None else logprob_V[wrong]))
