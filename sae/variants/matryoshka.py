"""Matryoshka SAEs (Bussmann, Nabeshima, Karvonen and Nanda 2025): nested dictionaries, each of which reconstructs.

    L = 1/M sum_m 1/N sum_n ||u - u_hat_m||^2        u_hat_m = sum_{i < F_m} a_i W_dec[i] + b_dec

with F_1 < ... < F_M = F and one BatchTopK choice over all F latents. The paper sums over m; the mean differs by a
constant factor and keeps AuxK's weight what it is for the others (dictionary_learning divides by M twice, which makes
AuxK M times heavier). Prefixes are fixed, not drawn anew for each batch.
Without `prefixes` they are F/16, F/8, F/4, F/2, F.

Shape letters: N rows, O d_out, F latents, M prefixes.
"""

from __future__ import annotations

from typing import Any, final

import torch

from ..model import Batch
from .batchtopk import BatchSelecting

HALVINGS = 4


@final
class MatryoshkaSAE(BatchSelecting):
    """The module docstring's equations; as `SAEWeights` a threshold SAE like BatchTopK's."""

    name = "matryoshka"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        latents = self.num_latents
        given = self.options.prefixes or tuple(latents >> halved for halved in range(HALVINGS, 0, -1))
        self.prefixes = tuple(sorted({size for size in given if size > 0} | {latents}))

    def fit(self, batch: Batch, acts_NF: torch.Tensor, residual_NO: torch.Tensor) -> torch.Tensor:
        # the error of a prefix is that of all latents plus what the later ones added
        total, later_NO = residual_NO.pow(2).sum(), torch.zeros_like(residual_NO)
        for low, high in reversed(list(zip(self.prefixes, self.prefixes[1:], strict=False))):
            later_NO = later_NO + acts_NF[:, low:high] @ self.W_dec_FD[low:high]
            total = total + (residual_NO + later_NO).pow(2).sum()
        return total / (len(self.prefixes) * len(residual_NO))
