"""Gated SAEs (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders").

    gate = W_enc (u - b_dec) + b_enc            mag = exp(r) * W_enc (u - b_dec) + b_mag       (weights shared)
    a    = H(gate) ReLU(mag)
    L    = 1/N sum_n ||u - u_hat||^2 + l1_coef * w_t * s * 1/N sum_n sum_i ReLU(gate_i)        s = sqrt(v / D)
         + 1/N sum_n ||u - sum_i ReLU(gate_i) W_dec[i] - b_dec||^2      W_dec and b_dec of this term held fixed

gate > 0 is mag > b_mag - exp(r) b_enc, so this is exactly a threshold SAE with rows exp(r) W_enc, bias b_mag and
threshold max(0, b_mag - exp(r) b_enc). The one difference from there (and dictionary_learning): s, as in `relu.py`.

Shape letters: N rows, D d_in, F latents.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.nn import functional

from ..model import ExportForm, Forward, SparseCoder

if TYPE_CHECKING:
    from ..losses import LossSettings


@final
class GatedSAE(SparseCoder):
    """The module docstring's equations; `b_enc_F` is the gate's bias, `r_F` and `b_mag_F` are trained beside it."""

    name = "gated"
    uses_auxk = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.r_F = nn.Parameter(torch.zeros(self.num_latents))
        self.b_mag_F = nn.Parameter(torch.zeros(self.num_latents))

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        mag_NF = self.r_F.exp() * (pre_NF - self.b_enc_F) + self.b_mag_F
        return functional.relu(mag_NF) * (pre_NF.detach() > 0)

    def extra_loss(self, forward: Forward, settings: LossSettings) -> torch.Tensor | None:
        gate_NF, batch = functional.relu(forward.pre_NF), forward.batch
        weight = self.options.l1_coef * self.sparsity_weight
        weight *= math.sqrt(settings.variance / self.W_dec_FD.shape[1])
        frozen_NO = gate_NF @ self.W_dec_FD.detach() + self.b_dec_D.detach()
        if self.wiring.skip:
            frozen_NO = frozen_NO + (batch.input_ND - self.centre_I) @ self.W_skip_OD.detach().t()
        error = (batch.target_NO - frozen_NO).pow(2).sum()
        return (weight * gate_NF.sum() + error) / len(gate_NF)

    def form(self) -> ExportForm:
        gain_F = self.r_F.exp()
        return ExportForm(
            variant="threshold",
            W_enc_FD=self.W_enc_FD * gain_F[:, None],
            b_enc_F=self.b_mag_F,
            threshold_F=functional.relu(self.b_mag_F - gain_F * self.b_enc_F),
        )
