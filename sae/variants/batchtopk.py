"""BatchTopK (Bussmann, Leask and Nanda 2024): the k N largest activations of a batch of N rows fire.

    training    a = the k N largest of ReLU(pre) over the whole batch, all others 0
    inference   a = pre where pre > theta, else 0            theta: running mean of min{a > 0} over training batches

theta is what the paper estimates as E_batch[min{a | a > 0}]. dictionary_learning averages with a weight of 0.001 from
step 1000 on, SAELens with 0.01; here the weight is 1 / (t + 1), at least 0.05, so that short runs have one and it is
not behind weights that still move. Equal values at the edge: the earlier row, then the lower latent.

Shape letters: N rows, F latents, P active latents of the batch.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, final

import torch
from torch.nn import functional

from ..batch_select import select_batch
from ..model import ExportForm, SparseCoder

LEAST_WEIGHT = 0.05  # of the newest batch in theta


class BatchSelecting(SparseCoder, ABC):
    """What BatchTopK and Matryoshka share: the choice over a batch, and the threshold that replaces it."""

    theta: torch.Tensor
    batches: torch.Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("theta", torch.zeros(()))  # in units of what is ranked
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        ranked_NF = self.ranking(pre_NF.detach())
        if not self.training:
            return functional.relu(pre_NF) * (ranked_NF > self.theta)
        chosen_NF = select_batch(ranked_NF, self.k * len(pre_NF), by_NF, self.ranks)
        return functional.relu(pre_NF) * chosen_NF

    @torch.no_grad()
    def observe_(self, chosen_P: torch.Tensor) -> None:
        least = self.ranks.least(chosen_P.min() if len(chosen_P) else chosen_P.new_tensor(torch.inf))
        if least.isinf():
            return
        weight = max(1 / (int(self.batches) + 1), LEAST_WEIGHT)
        self.theta += weight * (least - self.theta)
        self.batches += 1

    def form(self) -> ExportForm:
        norm_F = torch.ones_like(self.b_enc_F)
        if not self.unit_rows:
            norm_F = torch.linalg.vector_norm(self.W_dec_FD, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return ExportForm(
            variant="threshold",
            W_enc_FD=self.W_enc_FD,
            b_enc_F=self.b_enc_F,
            threshold_F=self.theta / norm_F,  # export multiplies by the norm
            k=self.k,
        )


@final
class BatchTopKSAE(BatchSelecting):
    """The module docstring's equations."""

    name = "batchtopk"
    selects = "batchtopk"
