"""ReLU with an L1 penalty that knows the decoder's norms (Anthropic, "Update on how we train SAEs", April 2024).

    a = ReLU(pre)
    L = 1/N sum_n ||u - u_hat||^2 + l1_coef * w_t * s * 1/N sum_n sum_i a_i ||W_dec[i]||        s = sqrt(v / D)

Rows of W_dec keep their own length unless `decoder_rows` is "unit". s makes `l1_coef` independent of the scale of the
data: there E||x||^2 = D, so s = 1, and the coefficient is 5, at thousands of dimensions. A latent loses l1_coef s / 2 of
its activation, and activations of L0 latents are about s sqrt(D / L0), so the coefficient for an L0 grows with sqrt(D);
2 is for hundreds of dimensions. w_t grows to 1 over the first steps. Two differences
from there: b_dec is subtracted from the input, and rows start at norm 1, not 0.1. Of a crosscoder ||W_dec[i]|| is the
sum of its norms at each hook point (Lindsey et al. 2024).

Shape letters: N rows, D d_in, F latents.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch.nn import functional

from ..model import ExportForm, Forward, SparseCoder

if TYPE_CHECKING:
    from ..losses import LossSettings


@final
class ReLUSAE(SparseCoder):
    """The module docstring's equations; as `SAEWeights` a threshold SAE with threshold 0."""

    name = "relu"
    uses_auxk = False

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        return functional.relu(pre_NF)

    def extra_loss(self, forward: Forward, settings: LossSettings) -> torch.Tensor | None:
        weight = self.options.l1_coef * self.sparsity_weight
        weight *= math.sqrt(settings.variance / self.W_dec_FD.shape[1])
        return weight * (forward.acts_NF @ self.row_norms()).sum() / len(forward.acts_NF)

    def row_norms(self) -> torch.Tensor:
        """||W_dec[i]||, summed over the hook points of a crosscoder."""
        parts = self.wiring.parts if self.wiring.kind == "crosscoder" else (slice(None),)
        norms_PF = [torch.linalg.vector_norm(self.W_dec_FD[:, columns], dim=1) for columns in parts]
        return torch.stack(norms_PF).sum(0)

    def form(self) -> ExportForm:
        return ExportForm(
            variant="threshold",
            W_enc_FD=self.W_enc_FD,
            b_enc_F=self.b_enc_F,
            threshold_F=torch.zeros_like(self.b_enc_F),
        )
