"""Triton kernels of the training step, and their launches. Importing this file needs triton.

Nothing is added up by atomics: every sum has a fixed order, so equal input gives equal bits on one device. Arrays are
row-major and contiguous; pre-activations, tables and rows may be float32 or bfloat16, sums are float32. With the
environment variable TRITON_INTERPRET=1, set before the import, all of it runs on a CPU, slowly: for tests.

Shape letters: N rows, D d_in, F latents, K top-k, P pairs (row, latent) sorted by latent, M latents with AuxK
gradients, S segments of a row.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false
# triton need not be installed; kernel[grid](...) is how it starts one

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SEGMENT = 16384  # pre-activations that one program holds in registers
TILE = 8192  # entries of a block of table rows: (rows, D)
PAIRS = 64  # pairs whose numbers are read at a time


def interpreted() -> bool:
    """Whether these kernels run in Triton's interpreter, on a CPU."""
    return not isinstance(_topk_kernel, triton.JITFunction)


# ---- which latents: the K largest of a row ----


@triton.jit
def _order_key(values, BITS: tl.constexpr):
    """Unsigned keys of BITS bits that order like the values; NaN is the largest, 0 is no value's key."""
    bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0xFFFFFFFF, key)
    return key >> (32 - BITS)  # a bfloat16 value has nothing in the lower 16 bits


@triton.jit
def _topk_kernel(
    pre_NF, idx_NSK, F, K, row_stride, segments, SIZE: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """idx_NSK: the K largest entries of a segment of a row, by index but those equal to the K-th last; of these the
    lowest indices. A segment of fewer than K entries leaves its last places as they are."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    at = segment * SIZE + tl.arange(0, SIZE)
    values = tl.load(pre_NF + row * row_stride + at, mask=at < F, other=0.0)
    keys = tl.where(at < F, _order_key(values, BITS), 0)
    kth = tl.full((), 0, tl.uint32)  # the largest number that K keys reach, bit by bit
    for place in tl.static_range(BITS):
        more = kth | (1 << (BITS - 1 - place))
        kth = tl.where(tl.sum((keys >= more).to(tl.int32)) >= K, more, kth)
    above = (keys > kth).to(tl.int32)
    equal = ((keys == kth) & (at < F)).to(tl.int32)
    place_above = tl.cumsum(above) - 1
    place_equal = tl.cumsum(equal) - 1 + tl.sum(above)
    out = idx_NSK + (row * segments + segment) * K
    tl.store(out + place_above, at, mask=above == 1)
    tl.store(out + place_equal, at, mask=(equal == 1) & (place_equal < K))


def topk(pre_NF: torch.Tensor, k: int) -> torch.Tensor:
    """idx_NK (int32) of the k largest entries of every row, float32 or bfloat16. Among equal entries at the edge the
    lower index; NaN counts as the largest. Rows too long for one program are cut into segments, whose winners meet.
    """
    rows, latents = pre_NF.shape
    size = min(triton.next_power_of_2(latents), SEGMENT)
    segments = triton.cdiv(latents, size)
    if k >= size < latents:  # segments would leave nothing out
        return pre_NF.sort(dim=1, descending=True, stable=True).indices[:, :k].int()
    idx_NSK = torch.zeros(rows, segments, min(k, size), dtype=torch.int32, device=pre_NF.device)
    bits = 16 if pre_NF.dtype == torch.bfloat16 else 32
    _topk_kernel[(rows, segments)](
        pre_NF, idx_NSK, latents, idx_NSK.shape[2], pre_NF.stride(0), segments,
        SIZE=size, BITS=bits, num_warps=_warps(size), enable_fp_fusion=True,
    )  # fmt: skip
    if segments == 1:
        return idx_NSK[:, 0]
    last = latents - (segments - 1) * size  # entries of the last segment: it may have given fewer
    idx_NC = idx_NSK.flatten(1)[:, : (segments - 1) * idx_NSK.shape[2] + min(last, idx_NSK.shape[2])].long()
    return idx_NC.gather(1, topk(pre_NF.gather(1, idx_NC), k).long()).int()


# ---- row by row: values, reconstruction, gradient of the values ----


@triton.jit
def _encoded(centred, W_enc_FD, b_enc_F, latent, at, wanted, there):
    """<W_enc[latent], centred> + b_enc[latent] of a block of latents; `at` are the places of their rows."""
    encoder = tl.load(W_enc_FD + at, mask=there, other=0.0).to(tl.float32)
    return tl.sum(encoder * centred[None, :], axis=1) + tl.load(b_enc_F + latent, mask=wanted, other=0.0)


@triton.jit
def _rows_kernel(
    u_ND, b_dec_D, W_enc_FD, b_enc_F, W_dec_FD, idx_NK, centred_ND, grad_ND, vals_NK, grad_vals_NK, error_N,
    D, K, scale, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    u = tl.load(u_ND + row * D + column, mask=inside, other=0.0).to(tl.float32)
    centred = u - tl.load(b_dec_D + column, mask=inside, other=0.0)
    tl.store(centred_ND + row * D + column, centred, mask=inside)
    error = -centred  # u_hat - u
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        latent = tl.load(idx_NK + row * K + k, mask=k < K, other=0).to(tl.int64)
        at = latent[:, None] * D + column[None, :]
        there = (k < K)[:, None] & inside[None, :]
        value = _encoded(centred, W_enc_FD, b_enc_F, latent, at, k < K, there)
        value = tl.where(value < 0, 0.0, value)  # NaN stays
        value = tl.where(k < K, value, 0.0)
        tl.store(vals_NK + row * K + k, value, mask=k < K)
        decoder = tl.load(W_dec_FD + at, mask=there, other=0.0).to(tl.float32)
        error += tl.sum(decoder * value[:, None], axis=0)
    tl.store(error_N + row, tl.sum(error * error))
    grad = error * scale
    tl.store(grad_ND + row * D + column, grad, mask=inside)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        latent = tl.load(idx_NK + row * K + k, mask=k < K, other=0).to(tl.int64)
        there = (k < K)[:, None] & inside[None, :]
        decoder = tl.load(W_dec_FD + latent[:, None] * D + column[None, :], mask=there, other=0.0).to(tl.float32)
        tl.store(grad_vals_NK + row * K + k, tl.sum(decoder * grad[None, :], axis=1), mask=k < K)


@triton.jit
def _values_kernel(
    centred_ND, W_enc_FD, b_enc_F, idx_NC, value_NC, D, C, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    centred = tl.load(centred_ND + row * D + column, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        latent = tl.load(idx_NC + row * C + c, mask=c < C, other=0).to(tl.int64)
        at, there = latent[:, None] * D + column[None, :], (c < C)[:, None] & inside[None, :]
        value = _encoded(centred, W_enc_FD, b_enc_F, latent, at, c < C, there)
        tl.store(value_NC + row * C + c, value, mask=c < C)


def exact_values(
    centred_ND: torch.Tensor, W_enc_FD: torch.Tensor, b_enc_F: torch.Tensor, idx_NC: torch.Tensor
) -> torch.Tensor:
    """W_enc[idx] (u - b_dec) + b_enc[idx], float32, (N, C): the pre-activations of the candidates."""
    rows, width = centred_ND.shape
    value_NC = torch.empty(idx_NC.shape, dtype=torch.float32, device=centred_ND.device)
    block_d, block_c = _blocks(width)
    _values_kernel[(rows,)](
        centred_ND, W_enc_FD, b_enc_F, idx_NC, value_NC, width, idx_NC.shape[1],
        BLOCK_C=block_c, BLOCK_D=block_d, num_warps=_warps(block_d * block_c), enable_fp_fusion=True,
    )  # fmt: skip
    return value_NC


class Rows(NamedTuple):
    """What one pass over the rows gives, float32: u - b_dec, dL/du_hat, a, da, ||u - u_hat||^2."""

    centred_ND: torch.Tensor
    grad_ND: torch.Tensor
    vals_NK: torch.Tensor
    grad_vals_NK: torch.Tensor
    error_N: torch.Tensor


def rows_pass(
    u_ND: torch.Tensor,
    b_dec_D: torch.Tensor,
    W_enc_FD: torch.Tensor,
    b_enc_F: torch.Tensor,
    W_dec_FD: torch.Tensor,
    idx_NK: torch.Tensor,
) -> Rows:
    """a = ReLU(W_enc[idx] (u - b_dec) + b_enc[idx]), u_hat, g = 2/N (u_hat - u), da = <g, W_dec[idx]> where a > 0."""
    rows, width = u_ND.shape
    shapes = ((rows, width), (rows, width), idx_NK.shape, idx_NK.shape, (rows,))
    found = Rows._make(torch.empty(shape, dtype=torch.float32, device=u_ND.device) for shape in shapes)
    block_d, block_k = _blocks(width)
    _rows_kernel[(rows,)](
        u_ND, b_dec_D, W_enc_FD, b_enc_F, W_dec_FD, idx_NK, *found, width, idx_NK.shape[1], 2.0 / rows,
        BLOCK_K=block_k, BLOCK_D=block_d, num_warps=_warps(block_d * block_k), enable_fp_fusion=True,
    )  # fmt: skip
    return found._replace(grad_vals_NK=found.grad_vals_NK * (found.vals_NK > 0))


# ---- latent by latent: gradient and update ----


class Pairs(NamedTuple):
    """The pairs (row, latent) with a value that is not zero, by latent and then by row; those of latent i lie from
    start_F1[i] to start_F1[i + 1]. Behind the last start: the pairs of value zero."""

    start_F1: torch.Tensor
    row_P: torch.Tensor
    val_P: torch.Tensor
    grad_val_P: torch.Tensor


def pairs_by_latent(latents: int, idx_NK: torch.Tensor, vals_NK: torch.Tensor, grad_vals_NK: torch.Tensor) -> Pairs:
    """Sorted stably, so that the sums over a latent's rows go in one order."""
    key_P = torch.where(vals_NK == 0, latents, idx_NK).flatten()
    latent_P, order_P = key_P.sort(stable=True)
    marks_F1 = torch.arange(latents + 1, dtype=latent_P.dtype, device=latent_P.device)
    start_F1 = torch.searchsorted(latent_P, marks_F1, out_int32=True)
    row_P = (order_P // idx_NK.shape[1]).int()
    return Pairs(start_F1, row_P, vals_NK.flatten()[order_P], grad_vals_NK.flatten()[order_P])


@triton.jit
def _sum_by_latent_kernel(start_F1, value_P, sum_F, BLOCK: tl.constexpr):
    latent = tl.program_id(0)
    start, stop = tl.load(start_F1 + latent), tl.load(start_F1 + latent + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(value_P + at, mask=at < stop, other=0.0)
    tl.store(sum_F + latent, tl.sum(total))


def sum_by_latent(pairs: Pairs) -> torch.Tensor:
    """db_enc: the sum of da over the pairs of each latent."""
    sum_F = torch.empty(len(pairs.start_F1) - 1, dtype=torch.float32, device=pairs.val_P.device)
    _sum_by_latent_kernel[(len(sum_F),)](
        pairs.start_F1, pairs.grad_val_P, sum_F, BLOCK=PAIRS, num_warps=1, enable_fp_fusion=True
    )
    return sum_F


@triton.jit
def _adam(weight, m, v, grad, beta1, beta2, eps, step_size, root_correction):
    """torch.optim.Adam; a latent without a gradient moves too."""
    m = m + (1.0 - beta1) * (grad - m)
    v = beta2 * v + (1.0 - beta2) * grad * grad
    return weight - step_size * (m / (tl.sqrt(v) / root_correction + eps)), m, v


@triton.jit
def _latents_kernel(
    order_F, start_F1, row_P, val_P, grad_val_P, centred_ND, grad_ND, extra_of_F, extra_enc_MD, extra_dec_MD,
    W_enc_FD, W_enc_m, W_enc_v, W_dec_FD, W_dec_m, W_dec_v,
    D, beta1, beta2, eps, step_size, root_correction,
    HAS_EXTRA: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    latent = tl.load(order_F + tl.program_id(0)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    start, stop = tl.load(start_F1 + latent), tl.load(start_F1 + latent + 1)
    enc, dec = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, stop, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        row = tl.load(row_P + p, mask=p < stop, other=0).to(tl.int64)
        value = tl.load(val_P + p, mask=p < stop, other=0.0)
        grad_value = tl.load(grad_val_P + p, mask=p < stop, other=0.0)
        at = row[:, None] * D + column[None, :]
        there = (p < stop)[:, None] & inside[None, :]
        enc += tl.sum(tl.load(centred_ND + at, mask=there, other=0.0).to(tl.float32) * grad_value[:, None], axis=0)
        dec += tl.sum(tl.load(grad_ND + at, mask=there, other=0.0).to(tl.float32) * value[:, None], axis=0)
    if HAS_EXTRA:
        at = tl.load(extra_of_F + latent).to(tl.int64) * D + column
        there = inside & (at >= 0)
        enc += tl.load(extra_enc_MD + at, mask=there, other=0.0)
        dec += tl.load(extra_dec_MD + at, mask=there, other=0.0)
    at = latent * D + column
    weight = tl.load(W_enc_FD + at, mask=inside, other=0.0)
    m, v = tl.load(W_enc_m + at, mask=inside, other=0.0), tl.load(W_enc_v + at, mask=inside, other=0.0)
    weight, m, v = _adam(weight, m, v, enc, beta1, beta2, eps, step_size, root_correction)
    tl.store(W_enc_FD + at, weight, mask=inside)
    tl.store(W_enc_m + at, m, mask=inside)
    tl.store(W_enc_v + at, v, mask=inside)
    weight = tl.load(W_dec_FD + at, mask=inside, other=0.0)
    dec -= tl.sum(dec * weight) * weight  # what is along the row would only change its norm
    m, v = tl.load(W_dec_m + at, mask=inside, other=0.0), tl.load(W_dec_v + at, mask=inside, other=0.0)
    weight, m, v = _adam(weight, m, v, dec, beta1, beta2, eps, step_size, root_correction)
    weight = tl.where(inside, weight, 0.0)
    norm = tl.sqrt(tl.sum(weight * weight))
    tl.store(W_dec_FD + at, weight / tl.where(norm == 0, 1.0, norm), mask=inside)  # a row of zeros stays
    tl.store(W_dec_m + at, m, mask=inside)
    tl.store(W_dec_v + at, v, mask=inside)


class AdamStep(NamedTuple):
    """Adam's numbers of one step: step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t)."""

    beta1: float
    beta2: float
    eps: float
    step_size: float
    root_correction: float


class Extra(NamedTuple):
    """Gradients that come from elsewhere (AuxK): those of latent i are row of_F[i], -1: none."""

    of_F: torch.Tensor
    W_enc_MD: torch.Tensor
    W_dec_MD: torch.Tensor


def latents_pass_(
    W_enc_3: tuple[torch.Tensor, ...],
    W_dec_3: tuple[torch.Tensor, ...],
    pairs: Pairs,
    centred_ND: torch.Tensor,
    grad_ND: torch.Tensor,
    adam: AdamStep,
    extra: Extra | None = None,
) -> None:
    """Gradients of W_enc and W_dec, projection, Adam, unit decoder rows: a latent's gradient never reaches memory.

    `W_enc_3`, `W_dec_3`: weights, first and second moments, each (F, D) float32, changed in place. Latents with most
    pairs are started first, so that none of them is waited for at the end.
    """
    width = centred_ND.shape[1]
    counts_F = pairs.start_F1.diff()
    order_F = counts_F.argsort(descending=True).int()
    block_d, block_p = _blocks(width, tables=2)
    nothing = pairs.start_F1  # a pointer that is not followed
    _latents_kernel[(len(counts_F),)](
        order_F, *pairs, centred_ND, grad_ND, *(extra or (nothing, nothing, nothing)), *W_enc_3, *W_dec_3,
        width, *adam, HAS_EXTRA=extra is not None, BLOCK_P=block_p, BLOCK_D=block_d,
        num_warps=_warps(2 * block_d * block_p), enable_fp_fusion=True,
    )  # fmt: skip


def _blocks(width: int, tables: int = 1) -> tuple[int, int]:
    """Columns, and rows, of the blocks of one table, or several, that are read at once."""
    columns = max(16, triton.next_power_of_2(width))
    return columns, max(1, min(16, TILE // (tables * columns)))


def _warps(entries: int) -> int:
    return min(16, max(4, entries // 1024))
