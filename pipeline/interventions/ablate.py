"""Switching latents off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from .base import check_latents
from .clamp import clamp_change
from .latents import LatentEdit


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(LatentEdit):
    """x' = x - sum_i a_i W_dec[i]: the named latents set to zero, SAE error kept. Rows on which none fires stay as they
    are, bit for bit."""

    latents: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_latents(self.weights, self.latents, (0.0,) * len(self.latents), "value")

    def key(self) -> str:
        return f"ablate({self.point};{self.sae_key()};{sorted(self.latents)};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        zeros = (0.0,) * len(self.latents)
        return clamp_change(self.weights, self.encoded_rows(x_ND, seq_N, pos_N), self.latents, zeros, self.encoder)
