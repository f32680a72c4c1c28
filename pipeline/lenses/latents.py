"""What each active latent of an SAE alone does for the next token after a prompt, by switching it off.

Shape letters: N latents, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.encoders import Encoder
from sae.weights import SAEWeights

from ..generate import generate
from ..interventions.ablate import Ablate
from ..interventions.base import Where
from ..interventions.inputs import output_point
from ..llama.model import Model
from ..llama.session import Session
from ..readout import Reader
from .next_token import NextToken, effects, next_token


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsResult:
    """The next token after a prompt with each latent ablated (the SAE error stays), at every token that is not flagged,
    alone: `next_token.Effects` by latent. `active`: how many latents are above zero somewhere in the prompt, those looked
    at are the ones with the largest activation."""

    target: NextToken
    active: int
    latents_N: np.ndarray
    activation_N: np.ndarray  # the largest one in the prompt ...
    position_N: np.ndarray  # ... and its place
    tokens_N: np.ndarray  # on how many tokens it fires
    effect_N: np.ndarray
    kl_N: np.ndarray
    likeliest_N: np.ndarray

    def ranked(self) -> list[int]:
        """Rows, the largest |effect| first."""
        return np.argsort(-np.abs(self.effect_N), kind="stable").tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        columns = {
            "latent": self.latents_N, "activation": self.activation_N, "position": self.position_N,
            "tokens": self.tokens_N, "effect": self.effect_N, "kl_nats": self.kl_N, "likeliest": self.likeliest_N,
        }  # fmt: skip
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        latents = [dict(zip(columns, row, strict=True)) for row in rows]
        return self.target.to_dict() | {"active": self.active, "latents": latents}


def latent_sweep(
    session: Session,
    model: Model,
    weights: SAEWeights,
    prompt: str,
    answer: str = "",
    wrong: str = "",
    *,
    most: int = 0,
    encoder: Encoder | None = None,
    side_by_side: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LatentsResult:
    """Ablates each latent that fires in the prompt, one at a time; `most` > 0: only so many, by their largest activation.

    `answer`, `wrong`: as `next_token` takes them. Where no latent fires there is none in the result.
    """
    target = next_token(session, model, prompt, answer, wrong)
    reader = Reader(weights, top=weights.num_latents, encoder=encoder)
    events = list(generate(session, model, target.tokens, readers=[reader], max_tokens=0))
    by_latent: dict[int, list[tuple[float, int]]] = {}
    for event in events:
        for latent, activation in event.latents:
            by_latent.setdefault(latent, []).append((activation, -event.pos))
    strongest = sorted(by_latent, key=lambda latent: (-max(by_latent[latent])[0], latent))
    chosen = strongest[:most] if most else strongest
    point = output_point(weights)

    def edits(batch: Sequence[int]) -> list[Ablate]:
        return [
            Ablate(point=point, weights=weights, latents=(latent,), encoder=encoder, where=Where(sequences=(seq,)))
            for seq, latent in enumerate(batch)
        ]

    flags = [event.flagged for event in events]
    found = effects(session, target, chosen, edits, flags=flags, side_by_side=side_by_side, progress=progress)
    largest = [max(by_latent[latent]) for latent in chosen]
    return LatentsResult(
        target=target,
        active=len(by_latent),
        latents_N=np.array(chosen, np.int64),
        activation_N=np.array([activation for activation, _ in largest]),
        position_N=np.array([-place for _, place in largest], np.int64),
        tokens_N=np.array([len(by_latent[latent]) for latent in chosen], np.int64),
        effect_N=found.effect_N,
        kl_N=found.kl_N,
        likeliest_N=found.likeliest_N,
    )
