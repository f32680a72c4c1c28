"""Sums over the active pairs (row, latent) of a batch, without dense latents or copies of the rows they name.

Shape letters: N rows, D d_in, F latents, K latents of a row, P pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

VECTOR_PARTS = 8


class Chosen(NamedTuple):
    """The active latents: (N, K), or the pairs of all rows one after another with their rows and first pairs."""

    idx: torch.Tensor  # (N, K) or (P,)
    offsets_N: torch.Tensor | None = None
    row_P: torch.Tensor | None = None


def offsets_of(row_P: torch.Tensor, rows: int) -> torch.Tensor:
    """Where the pairs of every row begin; rows ascend."""
    return torch.searchsorted(row_P, torch.arange(rows, device=row_P.device))


def sparse_sums(
    latents: int,
    centred_ND: torch.Tensor,
    grad_ND: torch.Tensor,
    chosen: Chosen,
    vals: torch.Tensor,
    grad_vals: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW_enc, dW_dec and db_enc as `kernels.py` writes them, for `latents` latents; the first two in `out` if it is given:
    new arrays of their size cost more in page faults than the sums."""
    latent_P, order_P = chosen.idx.flatten().sort(stable=True)
    row_P = order_P // chosen.idx.shape[1] if chosen.row_P is None else chosen.row_P[order_P]
    start_F1 = torch.searchsorted(latent_P, torch.arange(latents + 1, device=latent_P.device))
    vals_P, grad_vals_P = vals.flatten()[order_P], grad_vals.flatten()[order_P]

    def sums(table_ND: torch.Tensor, weight_P: torch.Tensor) -> torch.Tensor:
        return functional.embedding_bag(row_P, table_ND, start_F1[:-1], per_sample_weights=weight_P, mode="sum")

    ones_N1 = torch.ones(len(centred_ND), 1, dtype=centred_ND.dtype, device=centred_ND.device)
    db_enc_F = sums(ones_N1, grad_vals_P).squeeze(1)
    if out is None or not torch.backends.mkl.is_available():
        return sums(centred_ND, grad_vals_P), sums(grad_ND, vals_P), db_enc_F
    for sum_FD, table_ND, weight_P in ((out[0], centred_ND, grad_vals_P), (out[1], grad_ND, vals_P)):
        size = (latents, len(table_ND))
        pairs_FN = sparse_matrix(start_F1.int(), row_P.int(), weight_P, size)
        torch.addmm(sum_FD, pairs_FN, table_ND, beta=0, out=sum_FD)
    return *out, db_enc_F


def weighted_rows(weight_F: torch.Tensor, table_FD: torch.Tensor) -> torch.Tensor:
    """weight @ table, in parts: torch takes one thread for one of these, all threads for several."""
    parts = VECTOR_PARTS if len(weight_F) % VECTOR_PARTS == 0 else 1
    return torch.bmm(weight_F.view(parts, 1, -1), table_FD.view(parts, -1, table_FD.shape[1])).sum(0)[0]


def sparse_matrix(
    start_M1: torch.Tensor, column_P: torch.Tensor, value_P: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """CSR. torch says once in every process that this is beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(start_M1, column_P, value_P, size=size, check_invariants=False)


def sampled_products(
    a_ND: torch.Tensor, table_FD: torch.Tensor, idx: torch.Tensor, offsets_N: torch.Tensor | None = None
) -> torch.Tensor:
    """<a_n, table[idx_nk]>, (N, K) or (P,), without gathering the rows."""
    if a_ND.device.type == "cpu":  # half the time of embedding_bag's backward
        start_N1 = torch.arange(0, idx.numel() + 1, idx.shape[1]) if offsets_N is None else _ends(offsets_N, idx)
        zero_P = torch.zeros(idx.numel(), dtype=a_ND.dtype)
        pairs_NF = sparse_matrix(start_N1.int(), idx.flatten().int(), zero_P, (len(a_ND), len(table_FD)))
        return torch.sparse.sampled_addmm(pairs_NF, a_ND, table_FD.detach().t(), beta=0).values().view(idx.shape)
    zeros = torch.zeros(idx.shape, dtype=a_ND.dtype, device=a_ND.device)
    _, pull = decode_with_pull(idx, zeros, table_FD, offsets_N)
    return pull(a_ND)


def _ends(offsets_N: torch.Tensor, idx_P: torch.Tensor) -> torch.Tensor:
    return functional.pad(offsets_N, (0, 1), value=len(idx_P))


class Pull:
    """grad_ND -> <grad_n, table[idx_nk]>: embedding_bag's own backward for its weights, through the public API."""

    def __init__(self, bag_ND: torch.Tensor, vals: torch.Tensor) -> None:
        self.bag_ND, self.vals = bag_ND, vals

    def __call__(self, grad_ND: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(self.bag_ND, self.vals, grad_ND)[0]


def decode_with_pull(
    idx: torch.Tensor, vals: torch.Tensor, table_FD: torch.Tensor, offsets_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """(sum_k vals_nk table[idx_nk], its pull-back to vals)."""
    if vals.device.type == "cpu":
        bag_ND = functional.embedding_bag(idx, table_FD.detach(), offsets_N, per_sample_weights=vals, mode="sum")
        return bag_ND, lambda grad_ND: sampled_products(grad_ND, table_FD, idx, offsets_N)
    with torch.enable_grad():
        leaf = vals.detach().requires_grad_()
        bag_ND = functional.embedding_bag(idx, table_FD.detach(), offsets_N, per_sample_weights=leaf, mode="sum")
    return bag_ND.detach(), Pull(bag_ND, leaf)
