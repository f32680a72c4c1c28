"""The SAE's equations in numpy float32: the reference for the GGUF path, and what evaluate, apply and report run.

    pre = W_enc (x - b_dec) + b_enc,   a = TopK(ReLU(pre)),   x_hat = sum_i a_i W_dec[i] + b_dec

Other variants, layer norm and transcoders: the equations of `SAEWeights`.

Shape letters: N rows, D d_in, O d_out, F latents, K slots for active latents (k of the variants "topk", "groupmax").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .errors import ShapeError
from .rows import times_transposed
from .weights import SAEWeights

PRE_ACT_BYTES = 4 << 20  # a block of pre-activations: small enough for the cache, large enough for the matmul


def encode(w: SAEWeights, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The active latents of every row.

    Returns idx_NK int32 and vals_NK float32, sorted by value (descending), then by latent. Unused slots have value 0
    and index 0. K is k for the variants "topk" and "groupmax"; for "threshold" it is the largest number of latents that fired on a
    row (at least 1).

    Raises:
        ShapeError: x is not (N, D).
    """
    x_ND = normalised(w, checked_rows(w, x_ND))
    return joined(w, (select(w, pre_NF) for pre_NF in _pre_act_blocks(w, x_ND)))


def encoder_input(w: SAEWeights, x_ND: np.ndarray) -> np.ndarray:
    """What W_enc multiplies, float32 (N, D): the row, normalised with layer norm, less b_dec where it is subtracted.

    Raises:
        ShapeError: x is not (N, D).
    """
    x_ND = normalised(w, checked_rows(w, x_ND))
    return x_ND - w.b_dec_D if w.b_dec_subtracted else x_ND


def select(w: SAEWeights, pre_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents that fire given the pre-activations, as `encode` returns them."""
    if w.variant == "threshold":
        assert w.threshold_F is not None
        return gather(pre_NF, pre_NF > w.threshold_F, None)
    fires_NF = _leads_its_group(pre_NF, w.k) if w.variant == "groupmax" else pre_NF >= _edge(pre_NF, w.k)
    return gather(pre_NF, fires_NF, w.k)


def joined(w: SAEWeights, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(idx, vals) of blocks of rows one below the other, padded with empty slots to the widest."""
    found = list(blocks)
    if len(found) == 1:
        return found[0]
    rows = sum(len(idx) for idx, _ in found)
    width = max((idx.shape[1] for idx, _ in found), default=1 if w.variant == "threshold" else w.k)
    idx_NK, vals_NK = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    start = 0
    for idx, vals in found:
        idx_NK[start : start + len(idx), : idx.shape[1]] = idx
        vals_NK[start : start + len(idx), : idx.shape[1]] = vals
        start += len(idx)
    return idx_NK, vals_NK


def sigma(w: SAEWeights, x_ND: np.ndarray) -> np.ndarray:
    """What a latent's activation is in units of, float32 (N, 1): the row's standard deviation with layer norm, else 1.

    A latent adds a_i sigma W_dec[i] to the row.
    """
    if w.norm_mode == "none":
        return np.ones((len(x_ND), 1), np.float32)
    return x_ND.std(axis=1, keepdims=True, ddof=w.norm_correction, dtype=np.float64).astype(np.float32)


def normalised(w: SAEWeights, x_ND: np.ndarray) -> np.ndarray:
    """The rows as the encoder reads them: (x - mu) / (sigma + eps) with layer norm, else x."""
    if w.norm_mode == "none":
        return x_ND
    return (x_ND - _mu(x_ND)) / (sigma(w, x_ND) + np.float32(w.norm_eps))


def _mu(x_ND: np.ndarray) -> np.ndarray:
    return x_ND.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)


def decode(w: SAEWeights, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray | None = None) -> np.ndarray:
    """x_hat_NO = sum_k vals[k] W_dec[idx[k]] + b_dec, float32. Slots of value 0 add nothing.

    `x_ND`: the rows that were encoded, needed with layer norm (their sigma and mu) and a skip matrix.

    Raises:
        ShapeError: idx and vals do not have the same shape (N, K), or x is needed and not there.
    """
    x_hat_NO = _decode(w, idx_NK, vals_NK)
    if not w.needs_input:
        return x_hat_NO
    if x_ND is None or len(x_ND) != len(x_hat_NO):
        raise ShapeError("this SAE's reconstruction needs the rows that were encoded (layer norm or skip): give x_ND")
    x_ND = checked_rows(w, x_ND)
    if w.W_skip_OD is not None:
        x_hat_NO += x_ND @ w.W_skip_OD.T
    return x_hat_NO if w.norm_mode == "none" else sigma(w, x_ND) * x_hat_NO + _mu(x_ND)


def _decode(w: SAEWeights, idx_NK: np.ndarray, vals_NK: np.ndarray) -> np.ndarray:
    if idx_NK.ndim != 2 or idx_NK.shape != vals_NK.shape:
        raise ShapeError(f"indices and values must both be (N, K), got {idx_NK.shape} and {vals_NK.shape}")
    x_hat_ND = np.empty((len(idx_NK), w.d_out), np.float32)
    step = max(1, PRE_ACT_BYTES // (4 * w.d_out * max(1, idx_NK.shape[1])))
    for start in range(0, len(idx_NK), step):
        rows = slice(start, start + step)
        vals_N1K = vals_NK[rows, None, :].astype(np.float32, copy=False)
        x_hat_ND[rows] = np.matmul(vals_N1K, w.W_dec_FD[idx_NK[rows]])[:, 0]
    x_hat_ND += w.b_dec_D
    return x_hat_ND


def latent_values(
    w: SAEWeights,
    x_ND: np.ndarray,
    latents: Sequence[int] | np.ndarray,
    *,
    encoded: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """a_f of the named latents after ReLU and top-k: float32 (N, len(latents)).

    `encoded`: what an encoder gave for these rows, where that is known already.

    Raises:
        ShapeError: x is not (N, D), or a latent the SAE does not have.
    """
    wanted = np.asarray(latents, dtype=np.int64).reshape(-1)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() < w.num_latents):
        raise ShapeError(f"latents must be between 0 and {w.num_latents - 1}, got {wanted.tolist()}")
    x_ND = checked_rows(w, x_ND)
    slot_F = np.full(w.num_latents, -1, np.int64)
    slot_F[wanted] = np.arange(wanted.size)  # a latent named twice is filled from its last slot below
    out_NL = np.zeros((len(x_ND), wanted.size), np.float32)
    idx_NK, vals_NK = encode(w, x_ND) if encoded is None else encoded
    slots_NK = slot_F[idx_NK]
    row, slot = np.nonzero((slots_NK >= 0) & (vals_NK > 0))
    out_NL[row, slots_NK[row, slot]] = vals_NK[row, slot]
    return out_NL[:, slot_F[wanted]] if wanted.size else out_NL


def checked_rows(w: SAEWeights, x_ND: np.ndarray) -> np.ndarray:
    """The rows in float32. ShapeError where they are not (N, D)."""
    if x_ND.ndim != 2 or x_ND.shape[1] != w.d_in:
        raise ShapeError(f"expected activations of shape (rows, {w.d_in}) for this SAE, got {x_ND.shape}")
    return np.asarray(x_ND, dtype=np.float32)


def _row_blocks(w: SAEWeights, rows: int) -> Iterator[slice]:
    step = max(1, PRE_ACT_BYTES // (4 * w.num_latents))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _pre_act_blocks(w: SAEWeights, x_ND: np.ndarray) -> Iterator[np.ndarray]:
    """pre_NF of some rows at a time; the array is reused, so it is valid until the next block."""
    buffer = np.empty((max(1, PRE_ACT_BYTES // (4 * w.num_latents)), w.num_latents), np.float32)
    for rows in _row_blocks(w, len(x_ND)):
        block_ND = x_ND[rows] - w.b_dec_D if w.b_dec_subtracted else x_ND[rows]
        pre_NF = times_transposed(block_ND, w.W_enc_FD, buffer[: len(block_ND)])
        pre_NF += w.b_enc_F
        yield pre_NF


def _leads_its_group(pre_NF: np.ndarray, k: int) -> np.ndarray:
    """True for the largest entry of each of k groups of neighbours, the first of several, where it is above zero."""
    rows, latents = pre_NF.shape
    pre_NKG = pre_NF.reshape(rows, k, latents // k)
    leads_NKG = np.zeros(pre_NKG.shape, bool)
    np.put_along_axis(leads_NKG, pre_NKG.argmax(axis=2)[:, :, None], True, axis=2)
    return leads_NKG.reshape(rows, latents) & (pre_NF > 0)


def _edge(pre_NF: np.ndarray, k: int) -> np.ndarray:
    """A value per row (N, 1), above zero, that at least k entries reach (or every positive one, if fewer are).

    The k-th largest maximum over groups of latents: k groups hold an entry that large. A partition over the maxima
    costs a sixteenth of one over the row.
    """
    rows, latents = pre_NF.shape
    group = max(1, min(16, latents // (2 * k)))
    groups = latents // group
    max_NG = pre_NF[:, : groups * group].reshape(rows, group, groups).max(axis=1)
    edge_N1 = np.partition(max_NG, groups - k, axis=1)[:, groups - k, None]
    return np.maximum(edge_N1, np.finfo(np.float32).tiny)


def gather(pre_NF: np.ndarray, fires_NF: np.ndarray, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(idx_NK, vals_NK) of the entries that fire: slots sorted by value, then latent; the first k of them (None: all)."""
    rows, latents = pre_NF.shape
    flat_M = np.flatnonzero(fires_NF)
    row_M = flat_M // latents
    count_N = np.bincount(row_M, minlength=rows)
    width = max(k or 1, int(count_N.max(initial=0)))
    slot_M = row_M * width + np.arange(len(flat_M)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    idx_NW, vals_NW = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    idx_NW.reshape(-1)[slot_M] = flat_M % latents
    vals_NW.reshape(-1)[slot_M] = pre_NF.reshape(-1)[flat_M]
    # stable: a row's entries lie in the order of their latents, so equal values keep the lower latent first
    order_NK = np.argsort(-vals_NW, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(idx_NW, order_NK, axis=1), np.take_along_axis(vals_NW, order_NK, axis=1)
