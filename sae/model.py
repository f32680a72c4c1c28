"""The sparse autoencoder in torch: what every variant has in common, and the TopK one.

    pre   = W_enc (u - b_dec) + b_enc          u = x / scale
    a     = TopK(ReLU(pre))                    ReLU first, so L0 <= k (Gao et al. 2024); other variants: sae/variants
    u_hat = sum_i a_i W_dec[i] + b_dec         x_hat = scale * u_hat,  ||W_dec[i]|| = 1

Start: W_dec random unit rows, W_enc = c W_dec (tied only at the start; c: initial.py), b_enc = 0, b_dec = mean / scale.
`scale` brings the data to about unit variance per dimension. It is a power of two: dividing by it, and folding it
into b_enc and b_dec on export, changes no bit of any result. With per-token layer norm (`input_norm` layer) the
equations hold for n = (x - mu) / (sigma + eps) in place of u, and x_hat = sigma n_hat + mu.

Shape letters: N rows, W columns of a batch, D d_in, O d_out (D but for transcoders), F latents, K top-k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .errors import ConfigError, ShapeError
from .options import SAEOptions
from .ranks import Ranks
from .weights import LAYER_NORM_EPS, SAEWeights
from .wiring import SAME, Wiring

if TYPE_CHECKING:
    from .losses import LossSettings


TWO_SIDED_START = 0.1  # norm of a transcoder's encoder rows: what unrelated rows write starts small beside the target
PROJECTED_ROWS = 512  # of the decoder at a time


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


def candidate_count(k: int, latents: int) -> int:
    """How many latents a bfloat16 product names for the k largest, so that exact values can decide.

    Without the spare ones 0.3 to 1.1 % of the latents taken are not among the k largest; with them below 0.1 %.
    """
    return min(latents, k + max(4, k // 8))


def named_count(k: int, latents: int, dtype: torch.dtype) -> int:
    """How many latents of a row a product in `dtype` names: `candidate_count` of bfloat16, k where values are exact."""
    return candidate_count(k, latents) if dtype == torch.bfloat16 else k


def keep_entries(acts_NF: torch.Tensor, idx_NK: torch.Tensor) -> torch.Tensor:
    """acts at idx, zero elsewhere."""
    return torch.zeros_like(acts_NF).scatter(1, idx_NK, acts_NF.gather(1, idx_NK))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows as the encoder sees them, what is to be reconstructed, and sigma of every row (1 without layer norm)."""

    input_ND: torch.Tensor
    target_NO: torch.Tensor
    sigma_N1: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """One dense pass: `acts_NF` carries the gradients."""

    batch: Batch
    pre_NF: torch.Tensor
    acts_NF: torch.Tensor
    residual_NO: torch.Tensor  # target - reconstruction


class SparseCoder(nn.Module, ABC):
    """The module docstring's equations with the choice of latents left open; parameters are in the scaled units of u.

    A variant says how pre-activations become latents (`acts`, in training and in evaluation mode), what its loss adds
    to the squared error (`extra_loss`), and what it is as `SAEWeights` (`form`).

    Raises:
        ConfigError: sizes out of range.
        ShapeError: the mean is not (width of a batch,).
    """

    name: ClassVar[str]
    selects: ClassVar[str] = ""  # "topk", "batchtopk", "groupmax": kernels.FastStep has this choice; "": autograd only
    uses_auxk: ClassVar[bool] = True
    centre_I: torch.Tensor  # buffers and a parameter of the wirings that have them
    reaches_FO: torch.Tensor
    W_skip_OD: torch.Tensor

    def __init__(
        self,
        *,
        d_in: int,
        num_latents: int,
        k: int,
        mean_D: np.ndarray,
        scale: float | np.ndarray,
        generator: torch.Generator,
        options: SAEOptions | None = None,
        wiring: Wiring = SAME,
    ) -> None:
        super().__init__()
        if d_in < 1 or num_latents < 1 or not 1 <= k <= num_latents:
            raise ConfigError(f"need d_in >= 1 and 1 <= k <= num_latents, got {d_in}, k={k}, num_latents={num_latents}")
        if mean_D.shape != (d_in,):
            raise ShapeError(f"mean_D must have shape ({d_in},), got {mean_D.shape}")
        self.k = k
        self.scale = scale
        self.options = options if options is not None else SAEOptions()
        self.wiring = wiring
        self.unit_rows = self.options.decoder_rows == "unit"
        self.layer_norm = self.options.input_norm == "layer"
        self.final_k, self.sparsity_weight = k, 1.0  # changed by `schedule_`
        self.ranks = Ranks()  # that share the rows of a batch while it trains: the learner's
        mean_W = torch.from_numpy(mean_D.astype(np.float32)) / torch.as_tensor(scale, dtype=torch.float32)
        target_O = mean_W[wiring.target]
        rows_FD = torch.randn(num_latents, len(target_O), generator=generator)
        rows_FD /= torch.linalg.vector_norm(rows_FD, dim=1, keepdim=True)
        self.W_enc_FD = nn.Parameter(rows_FD.clone())
        self.W_dec_FD = nn.Parameter(rows_FD)
        self.b_enc_F = nn.Parameter(torch.zeros(num_latents))
        self.b_dec_D = nn.Parameter(target_O.clone())
        if wiring.two_sided:
            self._start_two_sided_(mean_W, generator)

    def _start_two_sided_(self, mean_W: torch.Tensor, generator: torch.Generator) -> None:
        """Encoder rows of their own; inputs are centred at their mean, which stays fixed; unread directions masked."""
        wiring = self.wiring
        centre_I = mean_W[: wiring.d_in]
        self.register_buffer("centre_I", centre_I.clone())
        layers, read = (len(wiring.inputs), wiring.inputs[0][1]) if wiring.kind == "cross_layer" else (1, wiring.d_in)
        enc_FD = torch.randn(self.num_latents, read, generator=generator)
        enc_FD *= TWO_SIDED_START / torch.linalg.vector_norm(enc_FD, dim=1, keepdim=True)
        self.W_enc_FD = nn.Parameter(enc_FD)
        if wiring.skip:
            self.W_skip_OD = nn.Parameter(torch.zeros(len(self.b_dec_D), wiring.d_in))
        if layers > 1:
            if self.num_latents % layers:
                raise ConfigError(f"{layers} pairs of hook points need num_latents divisible by {layers}")
            mask_FO = torch.zeros(self.num_latents, len(self.b_dec_D))
            outputs = wiring.parts[layers:]
            for rows, columns in zip(self.layer_rows(), outputs, strict=True):
                mask_FO[rows, columns.start - wiring.d_in :] = 1
            self.register_buffer("reaches_FO", mask_FO)
            with torch.no_grad():
                self.W_dec_FD *= mask_FO
                self.W_dec_FD /= torch.linalg.vector_norm(self.W_dec_FD, dim=1, keepdim=True)

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_dec_FD.shape[0]

    @property
    def d_in(self) -> int:
        """Columns of a batch, W: the width of the activations, of all hook points where there are several."""
        return self.wiring.width or self.W_dec_FD.shape[1]

    # ---- the equations ----

    def prepare(self, u_NW: torch.Tensor) -> Batch:
        """Input and target of the rows; with layer norm both are n = (u - mu) / (sigma + eps)."""
        if self.wiring.two_sided:
            return Batch(input_ND=u_NW[:, : self.wiring.d_in], target_NO=u_NW[:, self.wiring.target])
        if not self.layer_norm:
            return Batch(input_ND=u_NW, target_NO=u_NW)
        n_ND, _, sigma_N1 = layer_normalise(u_NW)
        return Batch(input_ND=n_ND, target_NO=n_ND, sigma_N1=sigma_N1)

    def centred(self, input_ND: torch.Tensor) -> torch.Tensor:
        """u - b_dec; with two sides u less the inputs' mean."""
        return input_ND - (self.centre_I if self.wiring.two_sided else self.b_dec_D)

    def pre_acts(self, input_ND: torch.Tensor) -> torch.Tensor:
        """W_enc (u - b_dec) + b_enc, (N, F); with two sides the inputs' mean in place of b_dec."""
        centred_NI = self.centred(input_ND)
        if self.wiring.kind != "cross_layer":
            return functional.linear(centred_NI, self.W_enc_FD, self.b_enc_F)
        parts = [
            functional.linear(centred_NI[:, columns], self.W_enc_FD[rows], self.b_enc_F[rows])
            for rows, columns in zip(self.layer_rows(), self.wiring.parts, strict=False)
        ]
        return torch.cat(parts, dim=1)

    @abstractmethod
    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        """The latents of every row, (N, F), differentiable in pre. `by_NF` (detached) chooses in place of pre where
        the encoder ran in another dtype. In evaluation mode: what the exported SAE computes."""

    def reconstruct(self, acts_NF: torch.Tensor, input_ND: torch.Tensor) -> torch.Tensor:
        """sum_i a_i W_dec[i] + b_dec (+ W_skip (u - centre)), (N, O)."""
        out_NO = acts_NF @ self.W_dec_FD + self.b_dec_D
        return out_NO + (input_ND - self.centre_I) @ self.W_skip_OD.t() if self.wiring.skip else out_NO

    def forward(self, x_NW: torch.Tensor) -> torch.Tensor:
        """What is reconstructed from the rows, in raw model units."""
        scale_W = torch.as_tensor(self.scale, dtype=x_NW.dtype, device=x_NW.device)
        u_NW = x_NW / scale_W
        batch = self.prepare(u_NW)
        out_NO = self.reconstruct(self.acts(self.pre_acts(batch.input_ND)), batch.input_ND)
        if self.layer_norm:
            _, mu_N1, sigma_N1 = layer_normalise(u_NW)
            out_NO = sigma_N1 * out_NO + mu_N1
        return out_NO * (scale_W if scale_W.ndim == 0 else scale_W[self.wiring.target])

    # ---- the loss, and what changes while training ----

    def ranking(self, pre_NF: torch.Tensor) -> torch.Tensor:
        """What top-k compares: pre, times ||W_dec[i]|| where rows have lengths of their own."""
        return pre_NF if self.unit_rows else pre_NF * torch.linalg.vector_norm(self.W_dec_FD, dim=1)

    def fit(self, batch: Batch, acts_NF: torch.Tensor, residual_NO: torch.Tensor) -> torch.Tensor:
        """The squared error of the loss: 1/N sum_n ||target - reconstruction||^2."""
        return residual_NO.pow(2).sum() / len(residual_NO)

    def extra_loss(self, forward: Forward, settings: LossSettings) -> torch.Tensor | None:
        """What the variant adds to the squared error."""
        return None

    def schedule_(self, step: int, steps: int) -> None:
        """Before step `step` of `steps`: k and the weight of the sparsity penalty of that step."""
        options = self.options
        if options.k_start:
            falling = options.k_anneal_share * steps
            left = max(0.0, 1 - step / falling) if falling else 0.0
            self.k = self.final_k + round(left * (options.k_start - self.final_k))
        growing = options.sparsity_warmup_share * steps
        self.sparsity_weight = min(1.0, (step + 1) / growing) if growing else 1.0

    @torch.no_grad()
    def observe_(self, chosen_P: torch.Tensor) -> None:
        """After a step: the positive activations of this rank's rows as they are ranked, for running estimates."""

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Take the part along W_dec[i] out of every row's gradient: it would only change the norm."""
        grad_FD = self.W_dec_FD.grad
        assert grad_FD is not None, "gradients come before the projection"
        if self.wiring.kind == "cross_layer":
            grad_FD.mul_(self.reaches_FO)
        if self.unit_rows:
            for start in range(0, len(grad_FD), PROJECTED_ROWS):  # the products stay in cache, and need no new memory
                part = slice(start, start + PROJECTED_ROWS)
                parallel_F1 = torch.linalg.vecdot(grad_FD[part], self.W_dec_FD[part]).unsqueeze(1)
                grad_FD[part].addcmul_(parallel_F1, self.W_dec_FD[part], value=-1)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Bring every row of W_dec back to norm 1, where the variant has unit rows; one of zeros, as an imported SAE may
        have, stays."""
        if self.unit_rows:
            self.W_dec_FD.div_(self.decoder_norms())

    def decoder_norms(self) -> torch.Tensor:
        """||W_dec[i]||, (F, 1), above zero: what rows are divided by."""
        norm_F1 = torch.linalg.vector_norm(self.W_dec_FD.detach(), dim=1, keepdim=True)
        return norm_F1.clamp_min_(torch.finfo(norm_F1.dtype).tiny)

    def layer_rows(self) -> list[slice]:
        """The latents that read each input of a cross-layer transcoder: equal shares, in order."""
        per = self.num_latents // len(self.wiring.inputs)
        return [slice(layer * per, (layer + 1) * per) for layer in range(len(self.wiring.inputs))]

    # ---- export ----

    @abstractmethod
    def form(self) -> ExportForm:
        """The variant as `SAEWeights` knows it, in scaled units."""

    def to_weights(self, *, mean_D: np.ndarray, variance: float, hook: str, **extra: Any) -> SAEWeights:
        """The SAE in raw units: b_enc and b_dec times scale, so that a scales with x; free rows are made unit rows
        by folding their norms into W_enc, b_enc and the threshold."""
        from .export import export  # export knows every wiring

        return export(self, self.form(), mean_W=mean_D, variance=variance, hook=hook, extra=extra)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportForm:
    """What a variant becomes: `variant` of SAEWeights, the encoder's rows and bias, a threshold, and its k.

    k None: as many as fired on average (`freq_F`).
    """

    variant: str
    W_enc_FD: torch.Tensor
    b_enc_F: torch.Tensor
    threshold_F: torch.Tensor | None = None
    k: int | None = None


@final
class TopKSAE(SparseCoder):
    """The module docstring's equations (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    With `multi_k`, Multi-TopK: the loss has multi_coef / N sum ||u - u_hat(multi_k)||^2 beside it (there, App. on
    progressive codes: k and 4 k, weight 1/8).
    """

    name = "topk"
    selects = "topk"

    def acts(self, pre_NF: torch.Tensor, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        return self._keep(pre_NF, self.k, by_NF)

    def _keep(self, pre_NF: torch.Tensor, k: int, by_NF: torch.Tensor | None = None) -> torch.Tensor:
        ranked_NF = self.ranking(pre_NF.detach())
        if by_NF is not None:
            named_NC = select_topk(self.ranking(by_NF), candidate_count(k, pre_NF.shape[1]))[1]
            ranked_NF = torch.full_like(ranked_NF, -torch.inf).scatter(1, named_NC, ranked_NF.gather(1, named_NC))
        return keep_entries(functional.relu(pre_NF), select_topk(ranked_NF, k)[1])

    def extra_loss(self, forward: Forward, settings: LossSettings) -> torch.Tensor | None:
        if not self.options.multi_k:
            return None
        acts_NF, batch = self._keep(forward.pre_NF, self.options.multi_k), forward.batch
        error = (batch.target_NO - self.reconstruct(acts_NF, batch.input_ND)).pow(2).sum()
        return self.options.multi_coef * error / len(acts_NF)

    def encode(self, u_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """vals_NK >= 0 and idx_NK, unsorted, in scaled units."""
        pre_NF = self.pre_acts(u_ND)
        _, idx_NK = select_topk(self.ranking(pre_NF), self.k)
        return functional.relu(pre_NF.gather(1, idx_NK)), idx_NK

    def decode(self, vals_NK: torch.Tensor, idx_NK: torch.Tensor) -> torch.Tensor:
        """u_hat_ND in scaled units."""
        return functional.embedding_bag(idx_NK, self.W_dec_FD, per_sample_weights=vals_NK, mode="sum") + self.b_dec_D

    def form(self) -> ExportForm:
        return ExportForm(variant="topk", W_enc_FD=self.W_enc_FD, b_enc_F=self.b_enc_F, k=self.k)


def layer_normalise(u_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n, mu, sigma: (u - mu) / (sigma + eps), mean and standard deviation (over D, not D - 1) of every row."""
    mu_N1 = u_ND.mean(1, keepdim=True)
    sigma_N1 = u_ND.std(1, keepdim=True, correction=0)
    return (u_ND - mu_N1) / (sigma_N1 + LAYER_NORM_EPS), mu_N1, sigma_N1


def apply_update_(model: SparseCoder, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on the gradients present: project, step, renormalise (Gao et al. 2024, App. A)."""
    model.project_decoder_grad_()
    optimizer.step()
    model.normalise_decoder_()
