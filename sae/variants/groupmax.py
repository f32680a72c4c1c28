"""GroupMax: the largest latent of each of k groups of F / k neighbours may fire (as sparsify's `groupmax`).

    a_i = ReLU(pre_i) where i is the argmax of its group, else 0

One pass over the pre-activations in place of a top-k; F must be divisible by k.

Shape letters: N rows, F latents, K groups, G latents of a group.
"""

from __future__ import annotations

from typing import final

import torch
from torch.nn import functional

from ..model import ExportForm, SparseCoder, keep_entries


def group_leaders(pre_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vals_NK and idx_NK of the largest entry of each group."""
    rows, latents = pre_NF.shape
    vals_NK, at_NK = pre_NF.view(rows, k, latents // k).max(2)
    return vals_NK, at_NK + torch.arange(0, latents, latents // k, device=pre_NF.device)


@final
class GroupMaxSAE(SparseCoder):
    """The module docstring's equations."""

    name = "groupmax"
    selects = "groupmax"

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        _, idx_NK = group_leaders(pre_NF.detach() if by_NF is None else by_NF, self.k)
        return keep_entries(functional.relu(pre_NF), idx_NK)

    def form(self) -> ExportForm:
        return ExportForm(variant="groupmax", W_enc_FD=self.W_enc_FD, b_enc_F=self.b_enc_F, k=self.k)
