"""Setting latents to a value while everything the SAE does not explain stays in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sae.encoders import Encoder, encoder_name, encoder_of
from sae.runtime import latent_values, sigma
from sae.weights import SAEWeights

from .base import Intervention, check_latents, check_width, sae_digest


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Intervention):
    """x' = x + sum_i (value_i - a_i) W_dec[i], a_i the activation after ReLU and top-k (0 where the latent is silent).

    With per-token layer norm the sum is times the token's sigma, since activations are in its units. The SAE error and
    all other latents stay. It promises this arithmetic change, not encode(x')[i] = value_i.
    """

    weights: SAEWeights
    latents: tuple[int, ...]
    values: tuple[float, ...]
    encoder: Encoder | None = None  # what computes the a_i; None: numpy

    def __post_init__(self) -> None:
        check_latents(self.weights, self.latents, self.values, "value")

    def key(self) -> str:
        named = f"{list(self.latents)};{[float(value).hex() for value in self.values]}"
        return f"clamp({self.point};{sae_digest(self.weights)}{encoder_name(self.encoder)};{named};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        return clamp_change(self.weights, x_ND, self.latents, self.values, self.encoder)


def clamp_change(
    w: SAEWeights,
    x_ND: np.ndarray,
    latents: tuple[int, ...],
    values: tuple[float, ...],
    encoder: Encoder | None = None,
) -> np.ndarray:
    """sum_i (value_i - a_i) W_dec[i] for each row, float32 (N, D); exactly zero where every value_i equals a_i."""
    check_width(x_ND, w.d_in, "the SAE")
    if not latents:
        return np.zeros_like(x_ND)
    encoded = encoder_of(w, encoder).encode(x_ND)
    a_NI = latent_values(w, x_ND, list(latents), encoded=encoded).astype(np.float64)
    change_ND = (np.asarray(values) - a_NI) @ w.W_dec_FD[list(latents)].astype(np.float64)
    return (sigma(w, x_ND) * change_ND).astype(np.float32)
