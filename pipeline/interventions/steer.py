"""Adding decoder directions to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sae.errors import ConfigError
from sae.runtime import sigma
from sae.weights import SAEWeights

from .base import Intervention, check_latents, check_width, digest

UNITS = ("latent", "norm")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Steer(Intervention):
    """x' = x + sum_f coeff_f W_dec[f] (unit `latent`), or with W_dec[f] / ||W_dec[f]|| (unit `norm`).

    `coeffs` are in units of the latent's activation: with per-token layer norm x' = x + sigma sum_f coeff_f W_dec[f],
    sigma of that token. Raises ConfigError for latents the SAE does not have.
    """

    weights: SAEWeights
    latents: tuple[int, ...]
    coeffs: tuple[float, ...]
    unit: str = "latent"

    def __post_init__(self) -> None:
        check_latents(self.weights, self.latents, self.coeffs, "coeff")
        if self.unit not in UNITS:
            raise ConfigError(f"unit: expected one of {', '.join(UNITS)}, got {self.unit!r}")

    def direction(self) -> np.ndarray:
        """sum_f coeff_f W_dec[f], float32 (D,)."""
        rows_FD = self.weights.W_dec_FD[list(self.latents)].astype(np.float64)
        if self.unit == "norm":
            norms_F1 = np.linalg.norm(rows_FD, axis=1, keepdims=True)
            rows_FD = rows_FD / np.where(norms_F1 > 0, norms_F1, 1.0)
        return (np.asarray(self.coeffs, dtype=np.float64) @ rows_FD).astype(np.float32)

    def key(self) -> str:
        norm = f";{self.weights.norm_mode}" if self._by_sigma else ""
        return f"steer({self.point};{digest(self.direction())}{norm};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        direction_D = self.direction()
        check_width(x_ND, len(direction_D), "the SAE")
        return sigma(self.weights, x_ND) * direction_D if self._by_sigma else np.broadcast_to(direction_D, x_ND.shape)

    @property
    def _by_sigma(self) -> bool:
        """Whether a unit of activation is a multiple of the token's sigma."""
        return self.unit == "latent" and self.weights.norm_mode != "none"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AddVector(Intervention):
    """x' = x + vector_D, raw: a control vector, or the random direction a steering curve is held against."""

    vector_D: np.ndarray

    def key(self) -> str:
        return f"add({self.point};{digest(np.asarray(self.vector_D, np.float32))};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        check_width(x_ND, len(self.vector_D), "the vector")
        return np.broadcast_to(np.asarray(self.vector_D, np.float32), x_ND.shape)
