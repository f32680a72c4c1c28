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


def group_candidates(pre_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vals_NC and idx_NC of the two largest entries of each group: the leaders, then the seconds. Overwrites pre_NF."""
    vals_NK, idx_NK = group_leaders(pre_NF, k)
    seconds_NK, second_NK = group_leaders(pre_NF.scatter_(1, idx_NK, -torch.inf), k)
    return torch.cat([vals_NK, seconds_NK], 1), torch.cat([idx_NK, second_NK], 1)


def group_winners(exact_NC: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vals_NK of the larger candidate of each group, by its exact value, and its place among the candidates."""
    vals_NK, second_NK = exact_NC.view(len(exact_NC), 2, k).max(1)
    return vals_NK, second_NK * k + torch.arange(k, device=exact_NC.device)


@final
class GroupMaxSAE(SparseCoder):
    """The module docstring's equations."""

    name = "groupmax"
    selects = "groupmax"

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        if by_NF is None:
            _, idx_NK = group_leaders(pre_NF.detach(), self.k)
        else:
            _, idx_NC = group_candidates(by_NF.clone(), self.k)
            idx_NK = idx_NC.gather(1, group_winners(pre_NF.detach().gather(1, idx_NC), self.k)[1])
        return keep_entries(functional.relu(pre_NF), idx_NK)

    def form(self) -> ExportForm:
        return ExportForm(variant="groupmax", W_enc_FD=self.W_enc_FD, b_enc_F=self.b_enc_F, k=self.k)
