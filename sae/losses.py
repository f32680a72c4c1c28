"""The training loss, and its gradients by dense autograd: the general path that `kernels.py` must equal.

    L = 1/N sum_n ||u - u_hat||^2  +  auxk_coef * v * L_aux  +  what the variant adds
                                                                       v = E||u - mean||^2, a constant of the data
    L_aux = sum_n ||e - e_hat||^2 / sum_n ||e - mean(e)||^2            (Gao et al. 2024, App. A.2)
    e = u - u_hat, detached;  e_hat = sum_i b_i W_dec[i], no bias;  b = TopK_{auxk_k}(ReLU(pre) of dead latents)

L / v is Gao's loss (normalised MSE plus auxk_coef times normalised auxiliary MSE); with v the gradients do not shrink
with d_in, so Adam's eps stays small beside them. Everything is in the scaled units of `model.py`.

Shape letters: N rows, W columns of a batch, D d_in, O d_out, F latents, K top-k, A auxiliary k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from .model import Forward, SparseCoder, keep_entries, select_topk
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """What the loss needs to know besides the model and the batch."""

    variance: float  # v: E||u - mean||^2 of what is reconstructed, in scaled units
    auxk_k: int
    auxk_coef: float
    encoder_dtype: torch.dtype = torch.float32  # bfloat16 names the latents that may be chosen; float32 values decide
    auxk_dtype: torch.dtype = torch.float32  # bfloat16: that of AuxK's products in `kernels.py`; here they are exact


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Numbers of one batch, left on the device; the gradients are in the parameters' .grad."""

    error: torch.Tensor  # sum_n ||u - u_hat||^2, with layer norm too
    auxk_loss: torch.Tensor  # L_aux, 0 where no latent is dead
    loss: torch.Tensor  # L
    fired_F: torch.Tensor  # int64: rows of the batch on which a latent was above zero


def dense_step(
    model: SparseCoder, u_NW: torch.Tensor, settings: LossSettings, dead_F: torch.Tensor | None = None
) -> StepResult:
    """Gradients of L by autograd over all latents, written to .grad. `dead_F` (bool) turns AuxK on where any is true.

    Where `model.ranks` share a batch, `u_NW` are the rows of this one, and L of the batch is the mean of what they give.
    Works in the dtype of the model and u: float64 gives the oracle.
    """
    model.zero_grad(set_to_none=True)
    batch = model.prepare(u_NW)
    pre_NF = model.pre_acts(batch.input_ND)
    acts_NF = model.acts(pre_NF, _rounded_pre_acts(model, batch.input_ND, settings))
    residual_NO = batch.target_NO - model.reconstruct(acts_NF, batch.input_ND)
    forward = Forward(batch=batch, pre_NF=pre_NF, acts_NF=acts_NF, residual_NO=residual_NO)
    loss = model.fit(batch, acts_NF, residual_NO)
    extra = model.extra_loss(forward, settings)
    if extra is not None:
        loss = loss + extra
    auxk_loss = torch.zeros_like(loss)
    if model.uses_auxk and dead_F is not None and bool(dead_F.any()):
        auxk_loss = _dense_auxk(model, pre_NF, residual_NO.detach(), settings, dead_F)
        loss = loss + settings.auxk_coef * settings.variance * auxk_loss
    loss.backward()
    ranked_NF = model.ranking(acts_NF.detach())
    model.observe_(ranked_NF[ranked_NF > 0])
    residual_NO = residual_NO.detach()
    error = (residual_NO if batch.sigma_N1 is None else residual_NO * batch.sigma_N1).pow(2).sum()
    return StepResult(error=error, auxk_loss=auxk_loss.detach(), loss=loss.detach(), fired_F=(acts_NF > 0).sum(0))


def _rounded_pre_acts(model: SparseCoder, input_ND: torch.Tensor, settings: LossSettings) -> torch.Tensor | None:
    """Pre-activations in bfloat16 where they name the candidates; None where all are exact."""
    if settings.encoder_dtype != torch.bfloat16:
        return None
    with torch.no_grad():
        centred_ND = model.centred(input_ND).bfloat16()
        return functional.linear(centred_ND, model.W_enc_FD.bfloat16(), model.b_enc_F.bfloat16())


def squares(x_ND: torch.Tensor) -> torch.Tensor:
    """||x||^2 without an array of squares."""
    return torch.linalg.vector_norm(x_ND, dim=1).square().sum()


def auxk_denominator(error_ND: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """sum_n ||e - mean(e)||^2, kept above zero for a perfect reconstruction.

    Of W ranks a W-th of that of all rows: the mean over the ranks of what it divides is then L_aux of the batch.
    """
    mean_D = ranks.mean(error_ND.mean(0))
    scatter = ranks.mean(squares(error_ND - mean_D))
    return scatter.clamp_min(torch.finfo(error_ND.dtype).tiny)


def _dense_auxk(
    model: SparseCoder, pre_NF: torch.Tensor, error_NO: torch.Tensor, settings: LossSettings, dead_F: torch.Tensor
) -> torch.Tensor:
    dead_NF = functional.relu(pre_NF.masked_fill(~dead_F, -torch.inf))
    count = min(settings.auxk_k, int(dead_F.sum()))
    _, idx_NA = select_topk(model.ranking(pre_NF.detach()).masked_fill(~dead_F, -torch.inf), count)
    error_hat_NO = keep_entries(dead_NF, idx_NA) @ model.W_dec_FD
    return (error_NO - error_hat_NO).pow(2).sum() / auxk_denominator(error_NO, model.ranks)
