"""The training step of `kernels.FastStep` and torch's Adam, its sparse part in Triton kernels.

The encoder's product and the pre-activations are torch's, in encoder_dtype. The k largest are found by a kernel (in
bfloat16 a few more, of which exact values decide), their values computed in float32 by another together with the reconstruction and da. The pairs (row, latent) are sorted by
latent, and one pass over the latents sums a latent's gradient in registers, projects it, updates the weights by Adam
and normalises the decoder row: neither dense latents nor gradients of W_enc and W_dec exist in memory.

Shape letters: N rows, D d_in, F latents, K top-k, M latents with AuxK gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels import auxk_gradients
from ..losses import LossSettings, StepResult
from ..model import SparseCoder, named_count
from ..pre_acts import PreActs
from ..steppers import Stepper
from ..train_config import TrainConfig
from .kernels import AdamStep, Extra, exact_values, latents_pass_, pairs_by_latent, rows_pass, sum_by_latent, topk

PARAMETERS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


class TritonStepper(Stepper):
    """On CUDA, or on a CPU in Triton's interpreter. The state is Adam's."""

    name = "triton"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig) -> None:
        self.model, self.settings = model, settings
        self._betas, self._eps, self._steps = config.betas, config.eps, 0
        weights = {name: getattr(model, name).detach() for name in PARAMETERS}
        self._moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
        self._pre_acts = PreActs(model, settings.encoder_dtype)

    @torch.no_grad()
    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        model, rows = self.model, len(u_ND)
        idx_NK = self._choose(u_ND - model.b_dec_D)
        found = rows_pass(u_ND.contiguous(), model.b_dec_D, model.W_enc_FD, model.b_enc_F, model.W_dec_FD, idx_NK)
        error = found.error_N.double().sum().float()
        loss, auxk_loss = error / rows, torch.zeros_like(error)
        pairs = pairs_by_latent(model.num_latents, idx_NK, found.vals_NK, found.grad_vals_NK)
        db_enc_F, extra = sum_by_latent(pairs), None
        if dead_F is not None and bool(dead_F.any()):
            auxk = auxk_gradients(model, self.settings, found.centred_ND, found.grad_ND, dead_F, unit=rows / 2)
            db_enc_F[auxk.dead_M] += auxk.b_enc_M
            extra = self._extra(auxk.dead_M, auxk.W_enc_MD, auxk.W_dec_MD)
            auxk_loss = auxk.loss
            loss = loss + self.settings.auxk_coef * self.settings.variance * auxk_loss
        db_dec_D = found.grad_ND.sum(0) - db_enc_F @ model.W_enc_FD  # u enters as u - b_dec; W_enc before its update
        adam = self._adam(lr)
        enc, dec = ((getattr(model, name).data, *self._moments[name]) for name in ("W_enc_FD", "W_dec_FD"))
        latents_pass_(enc, dec, pairs, found.centred_ND, found.grad_ND, adam, extra)
        update_(model.b_enc_F, *self._moments["b_enc_F"], db_enc_F, adam)
        update_(model.b_dec_D, *self._moments["b_dec_D"], db_dec_D, adam)
        fired_F = pairs.start_F1.diff().long()
        return StepResult(error=error, auxk_loss=auxk_loss, loss=loss, fired_F=fired_F)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "moments": self._moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        for name, pair in self._moments.items():
            for mine, theirs in zip(pair, state["moments"][name], strict=True):
                mine.copy_(theirs)

    def _choose(self, centred_ND: torch.Tensor) -> torch.Tensor:
        model, dtype = self.model, self.settings.encoder_dtype
        count = named_count(model.k, model.num_latents, dtype)
        idx_NC = torch.empty(len(centred_ND), count, dtype=torch.int32, device=centred_ND.device)
        for part, pre_NF in self._pre_acts(centred_ND):
            idx_NC[part] = topk(pre_NF, count)
        if dtype != torch.bfloat16:
            return idx_NC
        exact_NC = exact_values(centred_ND.contiguous(), model.W_enc_FD, model.b_enc_F, idx_NC)
        return idx_NC.gather(1, topk(exact_NC, model.k).long())

    def _extra(self, dead_M: torch.Tensor, W_enc_MD: torch.Tensor, W_dec_MD: torch.Tensor) -> Extra:
        of_F = torch.full((self.model.num_latents,), -1, dtype=torch.int32, device=dead_M.device)
        of_F[dead_M] = torch.arange(len(dead_M), dtype=torch.int32, device=dead_M.device)
        return Extra(of_F, W_enc_MD.contiguous(), W_dec_MD.contiguous())

    def _adam(self, lr: float) -> AdamStep:
        self._steps += 1
        beta1, beta2 = self._betas
        step_size, root_correction = lr / (1 - beta1**self._steps), math.sqrt(1 - beta2**self._steps)
        return AdamStep(beta1, beta2, self._eps, step_size, root_correction)


def update_(parameter: torch.Tensor, m: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, adam: AdamStep) -> None:
    """torch.optim.Adam on one vector."""
    m.lerp_(grad, 1 - adam.beta1)
    v.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    parameter.addcdiv_(m, v.sqrt().div_(adam.root_correction).add_(adam.eps), value=-adam.step_size)
