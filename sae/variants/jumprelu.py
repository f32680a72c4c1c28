"""JumpReLU with an L0 penalty, trained by straight-through estimators (Rajamanoharan et al. 2024, "Jumping ahead").

    a_i = ReLU(pre_i) H(pre_i - theta_i)              theta_i = exp(log_theta_i) > 0, H the step function
    L   = 1/N sum_n ||u - u_hat||^2 + l0_coef * w_t * v * 1/N sum_n sum_i H(pre_i - theta_i)

Neither jump has a gradient in theta. With a kernel K (1 on |z| < 1/2, else 0) of width e the estimators are

    d a_i / d theta_i                = -(theta_i / e) K((pre_i - theta_i) / e)
    d H(pre_i - theta_i) / d theta_i = -(1 / e) K((pre_i - theta_i) / e)

and pre_i gets H(pre_i - theta_i) from a_i, nothing from the penalty. e is `bandwidth` times s = sqrt(v / D), the size of
one dimension; in the paper the data have E||x||^2 = 1, so that its e = 0.001 is 0.05 s at 2,304 dimensions. The first theta
is `threshold_start` standard deviations of the first pre-activations, s ||W_enc[i]||: as many latents fire then whatever
the sizes. Theta moves by its logarithm, lr a step at most, so a short training needs a start of the right size: the
paper's 0.001, for a million steps, leaves most latents firing after thousands. b_dec is subtracted from the input, which
the paper does not do: the same functions, another start. The paper's Adam has beta1 = 0. dictionary_learning trains theta itself, not its logarithm, has the penalty (L0 / target - 1)^2, and takes
the step of a in place of pre, so that its kernel sees no pre-activation below theta.

Shape letters: N rows, F latents.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from ..errors import ConfigError
from ..model import ExportForm, Forward, SparseCoder

if TYPE_CHECKING:
    from ..losses import LossSettings


class _Jump(torch.autograd.Function):
    """ReLU(pre) H(pre - theta) with the estimator above."""

    @staticmethod
    def forward(ctx: Any, pre_NF: torch.Tensor, theta_F: torch.Tensor, width: float) -> torch.Tensor:
        ctx.save_for_backward(pre_NF, theta_F)
        ctx.width = width
        return pre_NF * (pre_NF > theta_F)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # pyright: ignore
        (grad_NF,) = grads
        pre_NF, theta_F = ctx.saved_tensors
        near_NF = ((pre_NF - theta_F).abs() < ctx.width / 2).to(pre_NF.dtype)
        return grad_NF * (pre_NF > theta_F), (grad_NF * near_NF).sum(0) * (-theta_F / ctx.width), None


class _Step(torch.autograd.Function):
    """H(pre - theta) with the estimator above."""

    @staticmethod
    def forward(ctx: Any, pre_NF: torch.Tensor, theta_F: torch.Tensor, width: float) -> torch.Tensor:
        ctx.save_for_backward(pre_NF, theta_F)
        ctx.width = width
        return (pre_NF > theta_F).to(pre_NF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # pyright: ignore
        (grad_NF,) = grads
        pre_NF, theta_F = ctx.saved_tensors
        near_NF = ((pre_NF - theta_F).abs() < ctx.width / 2).to(pre_NF.dtype)
        return None, (grad_NF * near_NF).sum(0) * (-1 / ctx.width), None


@final
class JumpReLUSAE(SparseCoder):
    """The module docstring's equations; `log_theta_F` is trained beside the others."""

    name = "jumprelu"
    uses_auxk = False

    def __init__(self, *, deviation: float = 1.0, **arguments: Any) -> None:
        """`deviation`: sqrt(v) in scaled units."""
        super().__init__(**arguments)
        if not (math.isfinite(deviation) and deviation > 0):
            raise ConfigError(f"the standard deviation of the activations must be a positive number, got {deviation}")
        self.unit = deviation / math.sqrt(self.W_dec_FD.shape[1])  # s
        self.width = self.options.bandwidth * self.unit
        self.log_theta_F = nn.Parameter(torch.zeros(self.num_latents))
        self.start_thresholds_()

    @torch.no_grad()
    def start_thresholds_(self) -> None:
        """The first thresholds of a model whose encoder is as it starts."""
        norm_F = torch.linalg.vector_norm(self.W_enc_FD, dim=1)
        self.log_theta_F.copy_((self.options.threshold_start * self.unit * norm_F).log())

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        return _Jump.apply(pre_NF, self.log_theta_F.exp(), self.width)  # pyright: ignore[reportReturnType]

    def extra_loss(self, forward: Forward, settings: LossSettings) -> torch.Tensor | None:
        fires_NF: Any = _Step.apply(forward.pre_NF.detach(), self.log_theta_F.exp(), self.width)
        weight = self.options.l0_coef * self.sparsity_weight * settings.variance
        return weight * fires_NF.sum() / len(fires_NF)

    def form(self) -> ExportForm:
        return ExportForm(
            variant="threshold", W_enc_FD=self.W_enc_FD, b_enc_F=self.b_enc_F, threshold_F=self.log_theta_F.exp()
        )
