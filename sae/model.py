"""The TopK sparse autoencoder in torch (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    pre   = W_enc (u - b_dec) + b_enc          u = x / scale
    a     = TopK(ReLU(pre))                    ReLU first, so L0 <= k
    u_hat = sum_i a_i W_dec[i] + b_dec         x_hat = scale * u_hat,  ||W_dec[i]|| = 1

Start: W_dec random unit rows, W_enc = W_dec (tied only at the start), b_enc = 0, b_dec = mean / scale.
`scale` brings the data to about unit variance per dimension. It is a power of two: dividing by it, and folding it
into b_enc and b_dec on export, changes no bit of any result.

Shape letters: N rows, D d_in, F latents, K top-k.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .errors import ConfigError, ShapeError
from .weights import SAEWeights


def input_scale(variance: float, d_in: int) -> float:
    """The power of two nearest (in log) to sqrt(E||x - mean||^2 / D).

    Raises:
        ConfigError: the variance is not a positive number.
    """
    if not (math.isfinite(variance) and variance > 0):
        raise ConfigError(f"the variance of the activations must be a positive number, got {variance}")
    return 2.0 ** round(math.log2(math.sqrt(variance / d_in)))


def select_topk(pre_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vals_NK, idx_NK of the k largest pre-activations per row, unsorted, before ReLU.

    ReLU keeps order, so these are also the k largest after it. Which of several equal entries at the edge is taken
    is torch.topk's choice: the same for the same input.
    """
    vals_NK, idx_NK = torch.topk(pre_NF, k, dim=-1, sorted=False)
    return vals_NK, idx_NK


class TopKSAE(nn.Module):
    """The module docstring's equations; parameters are in the scaled units of u.

    Raises:
        ConfigError: sizes out of range.
        ShapeError: the mean is not (d_in,).
    """

    def __init__(
        self, *, d_in: int, num_latents: int, k: int, mean_D: np.ndarray, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        if d_in < 1 or num_latents < 1 or not 1 <= k <= num_latents:
            raise ConfigError(f"need d_in >= 1 and 1 <= k <= num_latents, got {d_in}, k={k}, num_latents={num_latents}")
        if mean_D.shape != (d_in,):
            raise ShapeError(f"mean_D must have shape ({d_in},), got {mean_D.shape}")
        self.k = k
        self.scale = scale
        rows_FD = torch.randn(num_latents, d_in, generator=generator)
        rows_FD /= torch.linalg.vector_norm(rows_FD, dim=1, keepdim=True)
        self.W_enc_FD = nn.Parameter(rows_FD.clone())
        self.W_dec_FD = nn.Parameter(rows_FD)
        self.b_enc_F = nn.Parameter(torch.zeros(num_latents))
        self.b_dec_D = nn.Parameter(torch.from_numpy(mean_D.astype(np.float32)) / scale)

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_dec_FD.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_dec_FD.shape[1]

    def pre_acts(self, u_ND: torch.Tensor) -> torch.Tensor:
        """W_enc (u - b_dec) + b_enc, (N, F)."""
        return functional.linear(u_ND - self.b_dec_D, self.W_enc_FD, self.b_enc_F)

    def encode(self, u_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """vals_NK >= 0 and idx_NK, unsorted, in scaled units."""
        vals_NK, idx_NK = select_topk(self.pre_acts(u_ND), self.k)
        return functional.relu(vals_NK), idx_NK

    def decode(self, vals_NK: torch.Tensor, idx_NK: torch.Tensor) -> torch.Tensor:
        """u_hat_ND in scaled units."""
        return functional.embedding_bag(idx_NK, self.W_dec_FD, per_sample_weights=vals_NK, mode="sum") + self.b_dec_D

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_hat_ND in raw model units."""
        return self.decode(*self.encode(x_ND / self.scale)) * self.scale

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Take the part along W_dec[i] out of every row's gradient: it would only change the norm."""
        grad_FD = self.W_dec_FD.grad
        assert grad_FD is not None, "gradients come before the projection"
        parallel_F1 = torch.linalg.vecdot(grad_FD, self.W_dec_FD).unsqueeze(1)
        grad_FD.addcmul_(parallel_F1, self.W_dec_FD, value=-1)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Bring every row of W_dec back to norm 1."""
        self.W_dec_FD.div_(torch.linalg.vector_norm(self.W_dec_FD, dim=1, keepdim=True))

    def to_weights(self, *, mean_D: np.ndarray, variance: float, hook: str, **extra: Any) -> SAEWeights:
        """The SAE in raw units: W_enc and W_dec as they are, b_enc and b_dec times scale, so a scales with x."""

        def array(tensor: torch.Tensor, factor: float = 1.0) -> np.ndarray:
            return (tensor.detach() * factor).cpu().numpy()

        return SAEWeights(
            W_enc_FD=array(self.W_enc_FD),
            b_enc_F=array(self.b_enc_F, self.scale),
            W_dec_FD=array(self.W_dec_FD),
            b_dec_D=array(self.b_dec_D, self.scale),
            mean_D=mean_D,
            variance=variance,
            k=self.k,
            hook=hook,
            **extra,
        )


def apply_update_(model: TopKSAE, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on the gradients present: project, step, renormalise (Gao et al. 2024, App. A)."""
    model.project_decoder_grad_()
    optimizer.step()
    model.normalise_decoder_()
