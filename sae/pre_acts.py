"""Pre-activations of a batch, block of rows by block of rows: in the dtype that chooses, or bounds on them from 8 bits.

Bounds: x' = x / balance is rounded to s (q - e), where e is a dither: a random number in +-1/2 for each dimension, added
before the rounding and taken off after it. So the errors are uniform and independent of the row, however few values it
has, zero among them (Schuchman 1964). w' = w * balance is rounded to c p, its errors taken as independent too. Then

    <w', x'> - s (c <q, p> - <w', e>) = <w', x' - s (q - e)> + s <w' - c p, q>

is a sum of D errors of variance s^2 / 12 times w'^2 and c^2 / 12 times (s q)^2. SIGMAS standard deviations of it on top,
with the |q|^2 of the batch's flattest row, make an upper bound,

    bound_nf = b_f + s_n (c_f <q_n, p_f> + A_f),   A_f = SIGMAS / sqrt(12) sqrt(|w'_f|^2 + (c_f max_n |q_n|)^2) - <w'_f, e>

and a latent whose bound is below an exact value that is to be chosen need not be computed (`native/candidates.c` does
the same in C). A row that is not finite has bounds that are NaN.

Shape letters: N rows, D d_in, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from . import pages
from .model import SparseCoder

BLOCK_BYTES = 8 << 20  # dense pre-activations held at a time on a CPU
BLOCK_ROWS = 512  # but never fewer rows than this: W_enc is read once per block
SIGMAS = 4.0
STEPS = 126  # of a row's largest value: with the dither 127 at most
LATENTS_PER_K = 48  # of fewer latents too many would be candidates
LEAST_DIMENSIONS = 2  # of one, torch 2.13 leaves the product's memory as it was
MOST_DIMENSIONS = 32768  # an 8-bit product of more would not fit 32 bits
LATENTS_ROUNDED = 1024  # at a time: they stay in cache
LEAST_BALANCE = 1e-6
BALANCE_ROWS = 256
_TINY = 1e-30  # a scale of nothing but zeros


def block_rows(rows: int, latents: int, device: torch.device) -> int:
    """Rows whose dense pre-activations are held at a time."""
    return rows if device.type != "cpu" else min(rows, max(BLOCK_ROWS, BLOCK_BYTES // (4 * latents)))


class PreActs:
    """Dense pre-activations of one block of rows at a time, in the dtype that chooses; the buffer is kept."""

    def __init__(self, model: SparseCoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._pre = torch.empty(0)

    def __call__(self, centred_ND: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, pre_NF) block by block; the array is reused for the next block."""
        model, rows, dtype = self.model, len(centred_ND), self.dtype
        weight_DF, bias_F, input_ND = model.W_enc_FD.to(dtype).t(), model.b_enc_F.to(dtype), centred_ND.to(dtype)
        block = block_rows(rows, model.num_latents, centred_ND.device)
        if self._pre.shape != (block, model.num_latents):
            self._pre = torch.empty(block, model.num_latents, dtype=dtype, device=centred_ND.device)
        for start in range(0, rows, block):
            part = slice(start, min(rows, start + block))
            pre_NF = self._pre[: part.stop - start]
            torch.addmm(bias_F, input_ND[part], weight_DF, out=pre_NF)
            yield part, pre_NF


class Bounds:
    """Upper bounds on the pre-activations of one block of rows at a time, float32 on a CPU; the buffers are kept.

    No bound of a row is NaN, or all are: of a row that is not finite. Infinity is that of a latent whose weights are not.
    """

    def __init__(self, model: SparseCoder) -> None:
        self.model = model
        self._p_FD = torch.empty(0, dtype=torch.int8)
        self._scale_F, self._norm_F, self._shift_F = torch.empty(0), torch.empty(0), torch.empty(0)
        self._balance_D = torch.empty(0)
        self._dither_D = dither(model.W_enc_FD.shape[1])
        self._product = torch.empty(0, dtype=torch.int32)

    def __call__(self, centred_ND: torch.Tensor, *, again: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, bound_NF) block by block, as of `PreActs`. `again`: with the weights that were rounded last."""
        rows, latents, b_F = len(centred_ND), self.model.num_latents, self.model.b_enc_F
        if not again:
            self._balance_D = balance([centred_ND[:: max(1, rows // BALANCE_ROWS)]])
            self._round_weights(self._balance_D)
        q_ND, scale_N1, longest = rounded_rows(centred_ND / self._balance_D, self._dither_D)
        slack_F = torch.hypot(self._norm_F, self._scale_F * longest).mul_(SIGMAS / math.sqrt(12)).sub_(self._shift_F)
        finite_F = slack_F.isfinite() & self._scale_F.isfinite() & b_F.isfinite()
        b_F = torch.where(finite_F, b_F, torch.inf)  # such a latent is always looked at
        slack_F, scale_F = (torch.where(finite_F, part_F, 0.0) for part_F in (slack_F, self._scale_F))
        block = block_rows(rows, latents, centred_ND.device)
        if len(self._product) < block:
            self._product = pages.zeros(block, latents, dtype=torch.int32)
        for start in range(0, rows, block):
            part = slice(start, min(rows, start + block))
            product_NF = self._product[: part.stop - start]
            torch.ops.aten._int_mm.out(q_ND[part], self._p_FD.t(), out=product_NF)
            bound_NF = product_NF.view(torch.float32).copy_(product_NF)  # in its own place: that is in cache
            torch.addcmul(slack_F, bound_NF, scale_F, out=bound_NF)
            torch.addcmul(b_F, bound_NF, scale_N1[part], out=bound_NF)
            yield part, bound_NF

    def _round_weights(self, balance_D: torch.Tensor) -> None:
        W_enc_FD = self.model.W_enc_FD
        if self._p_FD.shape != W_enc_FD.shape:
            self._p_FD = pages.zeros(*W_enc_FD.shape, dtype=torch.int8)
            self._scale_F, self._norm_F, self._shift_F = torch.empty(3, len(W_enc_FD))
        scaled_FD, dithered_FD = torch.empty(2, min(LATENTS_ROUNDED, len(W_enc_FD)), W_enc_FD.shape[1])
        for start in range(0, len(W_enc_FD), LATENTS_ROUNDED):
            part = slice(start, min(len(W_enc_FD), start + LATENTS_ROUNDED))
            some_FD = torch.mul(W_enc_FD[part], balance_D, out=scaled_FD[: part.stop - start])
            torch.linalg.vector_norm(some_FD, dim=1, out=self._norm_F[part])
            # a matrix times a vector: torch takes one thread for that
            torch.sum(torch.mul(some_FD, self._dither_D, out=dithered_FD[: len(some_FD)]), 1, out=self._shift_F[part])
            scale_F = torch.div(some_FD.abs().amax(1), 127, out=self._scale_F[part]).clamp_min_(_TINY)
            self._p_FD[part] = some_FD.mul_(scale_F.reciprocal().unsqueeze(1)).round_()


def dither(d_in: int) -> torch.Tensor:
    """dither_D float32 in +-1/2, the same for every model of that width."""
    return torch.rand(d_in, generator=torch.Generator().manual_seed(0)) - 0.5


def rounded_rows(balanced_ND: torch.Tensor, dither_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_ND int8 and s_N1 with x' ~ s (q - dither), s NaN where a row is not finite, and the largest |q_n|."""
    scale_N = balanced_ND.abs().amax(1).div_(STEPS).clamp_min_(_TINY)
    rounded_ND = balanced_ND.mul_(scale_N.reciprocal().unsqueeze(1)).add_(dither_D).round_()
    length_N = torch.linalg.vector_norm(rounded_ND, dim=1)
    finite_N = scale_N.isfinite() & length_N.isfinite()
    longest = torch.where(finite_N, length_N, 0.0).max()
    return rounded_ND.to(torch.int8), torch.where(finite_N, scale_N, torch.nan).unsqueeze(1), longest


def balance(centred_parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """What input dimensions are divided by before they are rounded to 8 bits, and those of W_enc multiplied by.

    The square root of their root mean square shares the spread of unequal dimensions between both sides (Xiao et al.
    2023, SmoothQuant, with exponent 1/2); it changes the number of candidates, not which latents are taken. `centred_parts`:
    rows, part by part. A dimension that is zero in all of them is taken for one that hardly matters: whoever keeps the
    balance should measure it on many rows.
    """
    squares, rows = torch.zeros((), dtype=torch.float64), 0
    for part_ND in centred_parts:
        squares, rows = squares + part_ND.double().square().sum(0), rows + len(part_ND)
    rms_D = (squares / rows).sqrt()
    finite_D = torch.where(rms_D.isfinite(), rms_D, 0.0)
    return (finite_D + LEAST_BALANCE + 1e-3 * finite_D.mean()).sqrt().float()


def has_int8_products(device: torch.device) -> bool:
    """Whether torch multiplies 8-bit matrices by instructions made for it; without them it takes minutes."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and supported is not None and supported()


def finds_by_bounds(model: SparseCoder, k: int) -> bool:
    """Whether a step in torch finds the latents by `Bounds`, their exact float32 values deciding: faster than bfloat16 but
    on rows with values hundreds of times as large as the rest, whose bounds are too wide."""
    W_enc_FD = model.W_enc_FD
    holds = LEAST_DIMENSIONS <= W_enc_FD.shape[1] <= MOST_DIMENSIONS and W_enc_FD.dtype == torch.float32
    fits = holds and model.selects in ("topk", "batchtopk") and model.num_latents >= LATENTS_PER_K * k
    return fits and has_int8_products(W_enc_FD.device)
