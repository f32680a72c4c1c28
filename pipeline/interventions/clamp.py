"""Setting latents to a value while everything the SAE does not explain stays in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sae.encoders import Encoder, encoder_of
from sae.runtime import latent_values, sigma
from sae.weights import SAEWeights

from .base import check_latents, check_width
from .latents import LatentEdit


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(LatentEdit):
    """x' = x + sum_i (value_i - a_i) W_dec[i], a_i the activation after ReLU and top-k (0 where the latent is silent).

    With per-token layer norm the sum is times the token's sigma, since activations are in its units. The SAE error and
    all other latents stay. It promises this arithmetic change, not encode(x')[i] = value_i.
    """

    latents: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_latents(self.weights, self.latents, self.values, "value")

    def key(self) -> str:
        named = f"{list(self.latents)};{[float(value).hex() for value in self.values]}"
        return f"clamp({self.point};{self.sae_key()};{named};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        rows_ND = self.encoded_rows(x_ND, seq_N, pos_N)
        return clamp_change(self.weights, rows_ND, self.latents, self.values, self.encoder)


def clamp_change(
    w: SAEWeights,
    x_ND: np.ndarray,
    latents: tuple[int, ...],
    values: tuple[float, ...],
    encoder: Encoder | None = None,
) -> np.ndarray:
    """sum_i (value_i - a_i) W_dec[i], a_i those of the rows x_ND: float32 (N, d_out); exactly zero where every value_i
    equals a_i."""
    check_width(x_ND, w.d_in, "the SAE")
    if not latents:
        return np.zeros((len(x_ND), w.d_out), np.float32)
    encoded = encoder_of(w, encoder).encode(x_ND)
    a_NI = latent_values(w, x_ND, list(latents), encoded=encoded).astype(np.float64)
    change_ND = (np.asarray(values) - a_NI) @ w.W_dec_FD[list(latents)].astype(np.float64)
    return (sigma(w, x_ND) * change_ND).astype(np.float32)
