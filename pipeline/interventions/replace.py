"""Whole rows replaced: by the SAE's reconstruction, by zero, by the mean. What splicing measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sae.encoders import encoder_of
from sae.runtime import decode

from .base import Intervention, check_width, digest
from .latents import LatentEdit


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruct(LatentEdit):
    """x' = x_hat = decode(encode(x)), of a transcoder what it makes of its input; with `keep_error`
    x' = x_hat + (x - x_hat), the clean run up to rounding."""

    keep_error: bool = False

    def key(self) -> str:
        return f"reconstruct({self.point};{self.sae_key()};error={self.keep_error};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        rows_ND = self.encoded_rows(x_ND, seq_N, pos_N)
        x_hat_ND = decode(self.weights, *encoder_of(self.weights, self.encoder).encode(rows_ND), rows_ND)
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
