"""Head ablation: what each attention head alone does for the next token after a prompt.

Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?"; Wang et al. 2022, "Interpretability in the Wild"
(ablation by the mean).

Shape letters: L blocks with heads, H heads of a block, S variants decoded side by side, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError

from ..interventions.base import Where
from ..interventions.heads import AblateHeads, head_name
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Session
from .logit_lens import log_softmax
from .patching import HEADS_SITE, blocks_with_heads, prompt_tokens, single_token
from .side_by_side import check_fits, decoded, last_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsResult:
    """The next token after a prompt with each head switched off, at every position, alone.

    measure: `logit_difference` of answer - wrong, or `logprob` of the answer (nats) where there is no wrong one; `plain`
    is that of the model as it is. effect_LH: the measure without the head - with it, below 0 where the head speaks for
    the answer. kl_LH: KL(as it is || without the head), nats. likeliest_LH: the likeliest next token without it.
    NaN and -1: a head that block does not have.
    """

    blocks: tuple[int, ...]
    counts: tuple[int, ...]  # heads of each block
    effect_LH: np.ndarray
    kl_LH: np.ndarray
    likeliest_LH: np.ndarray
    measure: str
    plain: float
    tokens: np.ndarray
    answer: int
    wrong: int | None
    likeliest: int
    by_mean: bool

    def ranked(self) -> list[tuple[int, int]]:
        """(row, head) of every head, the largest |effect| first."""
        here = [(row, head) for row, count in enumerate(self.counts) for head in range(count)]
        return sorted(here, key=lambda place: -abs(self.effect_LH[place]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "measure": self.measure,
            "plain": self.plain,
            "tokens": self.tokens.tolist(),
            "answer": self.answer,
            "wrong": self.wrong,
            "likeliest": self.likeliest,
            "in_place": "mean" if self.by_mean else "zero",
            "heads": [
                {
                    "head": head_name(self.blocks[row], head),
                    "effect": float(self.effect_LH[row, head]),
                    "kl_nats": float(self.kl_LH[row, head]),
                    "likeliest": int(self.likeliest_LH[row, head]),
                }
                for row, count in enumerate(self.counts)
                for head in range(count)
            ],
        }


def head_sweep(
    session: Session,
    model: Model,
    prompt: str,
    answer: str = "",
    wrong: str = "",
    *,
    blocks: Sequence[int] | None = None,
    means: Mapping[int, np.ndarray] | None = None,
    side_by_side: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HeadsResult:
    """Switches off every head of the blocks (all that have heads), one at a time.

    `answer`: the token looked at, the likeliest one if ""; `wrong`: another one, for the logit difference. `means`: rows
    of `attn.hook_z` by block, (D,), whose columns take the place of what a head writes; zeros without. `side_by_side` as
    in `side_by_side.decoded`. Raises ConfigError for a prompt without tokens or too long, answers that are not one token,
    blocks without attention heads.
    """
    tokens_T = prompt_tokens(model, prompt)
    if not len(tokens_T):
        raise ConfigError("the prompt has no token")
    check_fits(session, len(tokens_T))
    all_counts = model.graph.heads()
    blocks = blocks_with_heads(all_counts, blocks)
    counts = tuple(all_counts[block] for block in blocks)
    plain_V = log_softmax(last_logits(session, tokens_T, 1, [])[0])
    likeliest = int(plain_V.argmax())
    chosen = single_token(model, answer, "answer") if answer else likeliest
    against = single_token(model, wrong, "wrong") if wrong else None
    if against == chosen:
        raise ConfigError(f"answer and wrong are the same token, {(wrong or answer)!r}")

    def measure(logprob_V: np.ndarray) -> float:
        return float(logprob_V[chosen] - (0 if against is None else logprob_V[against]))

    def edits(batch: Sequence[tuple[int, int]]) -> list[AblateHeads]:
        return [
            AblateHeads(
                point=HookPoint.parse(f"blocks.{blocks[row]}.{HEADS_SITE}"),
                where=Where(sequences=(seq,), flagged=True),
                heads=(head,),
                count=counts[row],
                mean_D=None if means is None else means[blocks[row]],
            )
            for seq, (row, head) in enumerate(batch)
        ]

    cells = [(row, head) for row, count in enumerate(counts) for head in range(count)]
    effect_LH, kl_LH = (np.full((len(blocks), max(counts)), np.nan) for _ in range(2))
    likeliest_LH = np.full(effect_LH.shape, -1, dtype=np.int64)
    done = 0
    for found_SV, beside_V in decoded(session, tokens_T, cells, edits, side_by_side=side_by_side):
        clean_V = log_softmax(beside_V)
        for cell, found_V in zip(cells[done : done + len(found_SV)], found_SV, strict=True):
            without_V = log_softmax(found_V)
            effect_LH[cell] = measure(without_V) - measure(clean_V)
            kl_LH[cell] = np.maximum(0, (np.exp(clean_V) * (clean_V - without_V)).sum())
            likeliest_LH[cell] = int(without_V.argmax())
        done += len(found_SV)
        if progress is not None:
            progress(done, len(cells))
    return HeadsResult(
        blocks=tuple(blocks),
        counts=counts,
        effect_LH=effect_LH,
        kl_LH=kl_LH,
        likeliest_LH=likeliest_LH,
        measure="logprob" if against is None else "logit_difference",
        plain=measure(plain_V),
        tokens=tokens_T,
        answer=chosen,
        wrong=against,
        likeliest=likeliest,
        by_mean=means is not None,
    )
