"""Head ablation: what each attention head alone does for the next token after a prompt.

Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?"; Wang et al. 2022, "Interpretability in the Wild"
(ablation by the mean).

Shape letters: L blocks with heads, H heads of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..interventions.base import Where
from ..interventions.heads import AblateHeads, head_name
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Session
from .next_token import NextToken, effects, next_token
from .patching import HEADS_SITE, blocks_with_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsResult:
    """The next token after a prompt with each head switched off, at every position, alone: `next_token.Effects` by block
    and head. NaN and -1: a head that block does not have."""

    target: NextToken
    blocks: tuple[int, ...]
    counts: tuple[int, ...]  # heads of each block
    effect_LH: np.ndarray
    kl_LH: np.ndarray
    likeliest_LH: np.ndarray
    by_mean: bool

    def ranked(self) -> list[tuple[int, int]]:
        """(row, head) of every head, the largest |effect| first."""
        here = [(row, head) for row, count in enumerate(self.counts) for head in range(count)]
        return sorted(here, key=lambda place: -abs(self.effect_LH[place]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        heads = [
            {
                "head": head_name(self.blocks[row], head),
                "effect": float(self.effect_LH[row, head]),
                "kl_nats": float(self.kl_LH[row, head]),
                "likeliest": int(self.likeliest_LH[row, head]),
            }
            for row, count in enumerate(self.counts)
            for head in range(count)
        ]
        return self.target.to_dict() | {"in_place": "mean" if self.by_mean else "zero", "heads": heads}


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

    `answer`, `wrong`: as `next_token` takes them. `means`: rows of `attn.hook_z` by block, (D,), whose columns take the
    place of what a head writes; zeros without. ConfigError for blocks without attention heads.
    """
    all_counts = model.graph.heads()
    blocks = blocks_with_heads(all_counts, blocks)
    counts = tuple(all_counts[block] for block in blocks)
    target = next_token(session, model, prompt, answer, wrong)

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
    found = effects(session, target, cells, edits, side_by_side=side_by_side, progress=progress)
    shape, at = (len(blocks), max(counts)), tuple(np.array(cells).T)
    effect_LH, kl_LH, likeliest_LH = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, -1)
    effect_LH[at], kl_LH[at], likeliest_LH[at] = found.effect_N, found.kl_N, found.likeliest_N
    return HeadsResult(
        target=target, blocks=tuple(blocks), counts=counts, effect_LH=effect_LH, kl_LH=kl_LH, likeliest_LH=likeliest_LH,
        by_mean=means is not None,
    )  # fmt: skip
