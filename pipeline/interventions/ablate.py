"""Switching latents off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sae.encoders import Encoder, encoder_name
from sae.weights import SAEWeights

from .base import Intervention, check_latents, sae_digest
from .clamp import clamp_change


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Intervention):
    """x' = x - sum_i a_i W_dec[i]: the named latents set to zero, SAE error kept. Rows on which none fires stay as they
    are, bit for bit."""

    weights: SAEWeights
    latents: tuple[int, ...]
    encoder: Encoder | None = None  # what computes the a_i; None: numpy

    def __post_init__(self) -> None:
        check_latents(self.weights, self.latents, (0.0,) * len(self.latents), "value")

    def key(self) -> str:
        sae = sae_digest(self.weights) + encoder_name(self.encoder)
        return f"ablate({self.point};{sae};{sorted(self.latents)};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        zeros = (0.0,) * len(self.latents)
        return clamp_change(self.weights, x_ND, self.latents, zeros, self.encoder)
