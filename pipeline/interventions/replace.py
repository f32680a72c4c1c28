"""Whole rows replaced: by the SAE's reconstruction, by zero, by the mean. What splicing measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sae.encoders import Encoder, encoder_name, encoder_of
from sae.runtime import decode
from sae.weights import SAEWeights

from .base import Intervention, check_width, digest, sae_digest


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruct(Intervention):
    """x' = x_hat = decode(encode(x)); with `keep_error` x' = x_hat + (x - x_hat), the clean run up to rounding."""

    weights: SAEWeights
    keep_error: bool = False
    encoder: Encoder | None = None  # None: numpy

    def key(self) -> str:
        sae = sae_digest(self.weights) + encoder_name(self.encoder)
        return f"reconstruct({self.point};{sae};error={self.keep_error};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        check_width(x_ND, self.weights.d_in, "the SAE")
        x_hat_ND = decode(self.weights, *encoder_of(self.weights, self.encoder).encode(x_ND), x_ND)
        if self.keep_error:
            x_hat_ND = x_hat_ND + (x_ND - x_hat_ND)
        return x_hat_ND - x_ND


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Zero(Intervention):
    """x' = 0."""

    sets_value: ClassVar[bool] = True

    def key(self) -> str:
        return f"zero({self.point};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        return -x_ND


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Mean(Intervention):
    """x' = mean_D, the mean of the training rows."""

    mean_D: np.ndarray
    sets_value: ClassVar[bool] = True

    def key(self) -> str:
        return f"mean({self.point};{digest(np.asarray(self.mean_D, np.float32))};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        check_width(x_ND, len(self.mean_D), "the mean")
        return np.asarray(self.mean_D, np.float32) - x_ND
