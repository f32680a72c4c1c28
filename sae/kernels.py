"""The training step without dense latents: the same gradients as `losses.dense_step`, a fraction of the work.

Of the five matrix products of dense autograd one is left, the encoder's. With idx_NK the chosen latents and
g = 2/N (u_hat - u):

    dW_dec[i] = sum over (n, k) with idx = i of a_nk g_n           dW_enc[i] = sum of da_nk (u - b_dec)_n
    da_nk     = <g_n, W_dec[idx_nk]> where a_nk > 0                db_enc[i] = sum of da_nk
    db_dec    = sum_n g_n - db_enc W_enc

The sums over the rows of a latent are a sparse matrix product, or an embedding_bag, over the pairs (n, k) sorted by
latent; sums run in one fixed order, so equal input gives equal bits. Dense pre-activations exist for one block of rows
at a time. TopK, GroupMax and BatchTopK share all of this but the choice; BatchTopK's pairs are not K to a row, so they
come with offsets.

Shape letters: N rows, D d_in, F latents, K top-k, A auxiliary k, P = N K pairs, M dead latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from .batch_select import MARGIN, Entries, Guess, batch_edge, entries_from, largest, take
from .errors import ConfigError
from .losses import LossSettings, StepResult, auxk_denominator
from .model import SparseCoder, named_count, select_topk
from .ranks import Ranks
from .variants.groupmax import group_candidates, group_leaders, group_winners

BLOCK_BYTES = 8 << 20  # dense pre-activations held at a time on a CPU
BLOCK_ROWS = 512  # but never fewer rows than this: W_enc is read once per block
DENSE_DEAD_SHARE = 4  # up to this multiple of auxk_k, dead latents go through plain matrix products

ENCODER_DTYPES = {"float32": torch.float32, "f32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def encoder_dtype(
    name: str, device: torch.device, *, float32_is_fast: bool = False, key: str = "encoder_dtype"
) -> torch.dtype:
    """The dtype that names the latents to choose from. "auto": bfloat16 on CUDA and on CPUs with bfloat16 matrix instructions.

    `float32_is_fast`: a kernel runs that chooses by exact float32 values in less time than that. `key`: the setting.

    Raises:
        ConfigError: an unknown name.
    """
    if name in ENCODER_DTYPES:
        return ENCODER_DTYPES[name]
    if name != "auto":
        raise ConfigError(f"{key} must be auto, float32 or bfloat16, got {name!r}")
    if float32_is_fast:
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # without these instructions a bfloat16 product is 30 times slower than a float32 one
        has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        fast = device.type == "cpu" and any(check() for check in has if check is not None)
    return torch.bfloat16 if fast else torch.float32


def has_fast_step(model: SparseCoder) -> bool:
    """Whether `FastStep` gives this model's gradients; the others go through autograd."""
    return bool(model.selects) and model.unit_rows and not model.wiring.two_sided and not model.options.multi_k


def grouped_topk(pre_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_topk` in two stages: the k groups of latents with the largest maxima hold the k largest entries.

    Half the time on a CPU, where torch.topk is the second largest part of the step. Elsewhere, and where groups would
    not pay, it is `select_topk`. Among equal entries at the edge it may take another one.
    """
    rows, latents = pre_NF.shape
    group = 1 << max(
        0, ((latents // k).bit_length() - 1) // 2
    )  # about sqrt(F / k): both stages then see as many entries
    if pre_NF.device.type != "cpu" or group < 4 or latents % group:
        return select_topk(pre_NF, k)
    groups = latents // group
    pre_NgG = pre_NF.view(rows, group, groups)  # a group: every groups-th latent, so that the maximum vectorises
    _, group_NK = grouped_topk(pre_NgG.amax(1), k)
    candidates_NC = pre_NgG.gather(2, group_NK.unsqueeze(1).expand(rows, group, k)).view(rows, group * k)
    vals_NK, at_NK = grouped_topk(candidates_NC, k)
    return vals_NK, group_NK.gather(1, at_NK % k) + (at_NK // k) * groups


class Chosen(NamedTuple):
    """The active latents: (N, K), or the pairs of all rows one after another with their rows and first pairs."""

    idx: torch.Tensor  # (N, K) or (P,)
    offsets_N: torch.Tensor | None = None
    row_P: torch.Tensor | None = None


def offsets_of(row_P: torch.Tensor, rows: int) -> torch.Tensor:
    """Where the pairs of every row begin; rows ascend."""
    return torch.searchsorted(row_P, torch.arange(rows, device=row_P.device))


class PreActs:
    """Dense pre-activations of one block of rows at a time, in the dtype that chooses; the buffer is kept."""

    def __init__(self, model: SparseCoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._pre = torch.empty(0)

    def __call__(self, centred_ND: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, pre_NF) block by block; the array is reused for the next block."""
        model, rows, dtype = self.model, len(centred_ND), self.dtype
        weight_DF, bias_F, input_ND = model.W_enc_FD.to(dtype).t(), model.b_enc_F.to(dtype), centred_ND.to(dtype)
        block = rows
        if centred_ND.device.type == "cpu":
            block = min(rows, max(BLOCK_ROWS, BLOCK_BYTES // (4 * model.num_latents)))
        if self._pre.shape != (block, model.num_latents):
            self._pre = torch.empty(block, model.num_latents, dtype=dtype, device=centred_ND.device)
        for start in range(0, rows, block):
            part = slice(start, min(rows, start + block))
            pre_NF = self._pre[: part.stop - start]
            torch.addmm(bias_F, input_ND[part], weight_DF, out=pre_NF)
            yield part, pre_NF


class BatchPairs:
    """BatchTopK's pairs: the k largest pre-activations of a batch times its rows, those of this rank's rows row after
    row, all above zero."""

    def __init__(self, model: SparseCoder, dtype: torch.dtype) -> None:
        self.model, self.guess = model, Guess()
        self._pre_acts = PreActs(model, dtype)

    def __call__(self, centred_ND: torch.Tensor) -> Entries:
        model, rows, low = self.model, len(centred_ND), self._pre_acts.dtype == torch.bfloat16
        count, margin, ranks = model.k * rows, MARGIN if low else 0.0, model.ranks
        while True:
            parts = []
            for part, pre_NF in self._pre_acts(centred_ND):
                if not self.guess.least:
                    self.guess.first(pre_NF[:: max(1, len(pre_NF) // 32)], model.k / model.num_latents, ranks)
                parts.append(entries_from(pre_NF, self.guess.least, model.k, part.start))
            found = Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
            broken = take(found, found.value_P.isnan())
            if len(broken.value_P):
                found = take(found, ~found.value_P.isnan())
            edge = batch_edge(found.value_P.float(), count, ranks)
            seen = int(ranks.sum(torch.tensor(len(found.value_P), device=centred_ND.device)))
            if self.guess.good(seen, count * ranks.world, edge.value * (1 - margin)):
                break
        if low:
            found = take(found, found.value_P.float() >= edge.value * (1 - margin))
            latent_P, offsets_N = found.latent_P, offsets_of(found.row_P, rows)
            exact_P = sampled_products(centred_ND, model.W_enc_FD, latent_P, offsets_N) + model.b_enc_F[latent_P]
            found = found._replace(value_P=exact_P)
            edge = batch_edge(exact_P[exact_P > 0], count, ranks)
        if len(broken.value_P):  # the loss tells of them
            row_P, latent_P, value_P = (part_P[:count] for part_P in broken)
            return Entries(row_P, latent_P, value_P.to(centred_ND.dtype))
        return take(found, largest(found, edge, model.num_latents))


class FastStep:
    """Callable like `dense_step` with the model and settings bound; keeps its buffer between batches."""

    def __init__(self, model: SparseCoder, settings: LossSettings) -> None:
        self.model = model
        self.settings = settings
        self._pre_acts = PreActs(model, settings.encoder_dtype)
        self._batch = BatchPairs(model, settings.encoder_dtype) if model.selects == "batchtopk" else None
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None  # the gradients' memory, on a CPU

    @torch.no_grad()
    def __call__(self, u_ND: torch.Tensor, dead_F: torch.Tensor | None = None) -> StepResult:
        """Write the gradients of L to .grad and return the batch's numbers. `dead_F`: bool, None if none is dead."""
        model = self.model
        batch = model.prepare(u_ND)
        centred_ND = batch.input_ND - model.b_dec_D
        chosen, vals = self.encode(centred_ND)
        scale = 2.0 / len(u_ND)
        bag_ND, pull = decode_with_pull(chosen.idx, vals, model.W_dec_FD, chosen.offsets_N)
        minus_error_ND = self._total(bag_ND).sub_(centred_ND)
        grad_ND = minus_error_ND * scale
        grad_vals = pull(grad_ND) * (vals > 0)
        if self._sums is None and grad_ND.device.type == "cpu":
            self._sums = torch.empty_like(model.W_enc_FD), torch.empty_like(model.W_dec_FD)
        W_enc_FD, W_dec_FD, b_enc_F = sparse_sums(
            model.num_latents, centred_ND, grad_ND, chosen, vals, grad_vals, self._sums
        )
        error = squares(minus_error_ND)
        loss, auxk_loss = error / len(u_ND), torch.zeros_like(error)
        if dead_F is not None and bool(dead_F.any()):
            auxk = self._auxk(centred_ND, minus_error_ND, dead_F)
            W_enc_FD[auxk.dead_M] += auxk.W_enc_MD
            W_dec_FD[auxk.dead_M] += auxk.W_dec_MD
            b_enc_F[auxk.dead_M] += auxk.b_enc_M
            auxk_loss = auxk.loss
            loss = loss + self.settings.auxk_coef * self.settings.variance * auxk_loss
        model.W_enc_FD.grad, model.W_dec_FD.grad, model.b_enc_F.grad = W_enc_FD, W_dec_FD, b_enc_F
        model.b_dec_D.grad = grad_ND.sum(0) - self._total(b_enc_F @ model.W_enc_FD)
        if model.selects == "batchtopk":
            model.observe_(vals)
        if batch.sigma_N1 is not None:
            error = squares(minus_error_ND * batch.sigma_N1)
        return StepResult(error=error, auxk_loss=auxk_loss, loss=loss, fired_F=self._fired(chosen, vals))

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the latents, of what was summed over those of `model`: there are no others."""
        return part

    def _fired(self, chosen: Chosen, vals: torch.Tensor) -> torch.Tensor:
        """Rows on which each latent was above zero."""
        fired_F = torch.zeros(self.model.num_latents, dtype=torch.int64, device=vals.device)
        return fired_F.scatter_add_(0, chosen.idx.flatten(), (vals > 0).flatten().long())

    def _auxk(self, centred_ND: torch.Tensor, minus_error_ND: torch.Tensor, dead_F: torch.Tensor) -> AuxKGradients:
        return auxk_gradients(self.model, self.settings, centred_ND, minus_error_ND, dead_F)

    def encode(self, centred_ND: torch.Tensor) -> tuple[Chosen, torch.Tensor]:
        """The latents of the rows and their values after ReLU."""
        model = self.model
        if self._batch is not None:
            found = self._batch(centred_ND)
            return Chosen(found.latent_P, offsets_of(found.row_P, len(centred_ND)), found.row_P), found.value_P
        low, group = self.settings.encoder_dtype == torch.bfloat16, model.selects == "groupmax"
        choose = (group_candidates if low else group_leaders) if group else grouped_topk
        count = model.k if group else named_count(model.k, model.num_latents, self.settings.encoder_dtype)
        found = [choose(pre_NF, count) for _, pre_NF in self._pre_acts(centred_ND)]
        vals_NC, idx_NC = (torch.cat(columns) for columns in zip(*found, strict=True))
        if not low:
            return Chosen(idx_NC), vals_NC.relu_()
        exact_NC = sampled_products(centred_ND, model.W_enc_FD, idx_NC) + model.b_enc_F[idx_NC]
        vals_NK, at_NK = (group_winners if group else select_topk)(exact_NC, model.k)
        return Chosen(idx_NC.gather(1, at_NK)), vals_NK.relu_()


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxKGradients:
    """L_aux and what it adds to the gradients of the dead latents `dead_M`."""

    loss: torch.Tensor
    dead_M: torch.Tensor
    W_enc_MD: torch.Tensor
    W_dec_MD: torch.Tensor
    b_enc_M: torch.Tensor


def keep_largest_(pre_NM: torch.Tensor, k: int) -> torch.Tensor:
    """ReLU, and all but the k largest entries of every row to zero, in place."""
    acts_NM = pre_NM.relu_()
    # a choice takes as long as a product, and about half of the entries are zero: often all the others are chosen
    if acts_NM.shape[1] > k and int((acts_NM > 0).sum(1, dtype=torch.int32).max()) > k:
        vals_NA, at_NA = select_topk(acts_NM, k)
        acts_NM.zero_().scatter_(1, at_NA, vals_NA)
    return acts_NM


def squares(x_ND: torch.Tensor) -> torch.Tensor:
    """||x||^2 without an array of squares."""
    return torch.linalg.vector_norm(x_ND, dim=1).square().sum()


def rest_(
    product_ND: torch.Tensor, minus_error_ND: torch.Tensor, unit: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """||rest||^2 and scale * rest in the product's dtype, rest = product + unit * minus_error in that of the error.

    In place: new arrays of this size cost more in page faults than the arithmetic.
    """
    # float32 first: torch takes ten times as long to add numbers of two dtypes
    rest_ND = product_ND.to(minus_error_ND.dtype).add_(minus_error_ND, alpha=unit)
    return squares(rest_ND), rest_ND.mul_(scale).to(product_ND.dtype)


def auxk_gradients(
    model: SparseCoder,
    settings: LossSettings,
    centred_ND: torch.Tensor,
    minus_error_ND: torch.Tensor,
    dead_F: torch.Tensor,
    *,
    unit: float = 1.0,
    select: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] = select_topk,
    keep_: Callable[[torch.Tensor, int], torch.Tensor] = keep_largest_,
    rest_: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = rest_,
    denominator: Callable[[torch.Tensor, Ranks], torch.Tensor] = auxk_denominator,
) -> AuxKGradients:
    """Gradients of auxk_coef * v * L_aux (losses.py); u_hat - u is `unit` times `minus_error_ND`, of which `denominator`
    gives the scatter. At least one latent is dead.

    With settings.auxk_dtype bfloat16 the products read and give bfloat16, and choose by it; the error that is left,
    its square and the sums of L_aux are float32.
    """
    dead_M = dead_F.nonzero().flatten()
    count = min(settings.auxk_k, len(dead_M))
    scatter = denominator(minus_error_ND, model.ranks) * unit**2
    scale = 2.0 * settings.auxk_coef * settings.variance / scatter
    low = settings.auxk_dtype == torch.bfloat16
    input_ND = centred_ND.bfloat16() if low else centred_ND
    W_enc_MD, W_dec_MD = (W_FD[dead_M].to(input_ND.dtype) for W_FD in (model.W_enc_FD, model.W_dec_FD))
    W_enc_DM, W_dec_DM = W_enc_MD.t(), W_dec_MD.t()
    if not low:  # copies: on a CPU the float32 products are a third faster than with a transposed view
        W_enc_DM, W_dec_DM = W_enc_DM.contiguous(), W_dec_DM.contiguous()
    pre_NM = torch.addmm(model.b_enc_F[dead_M].to(input_ND.dtype), input_ND, W_enc_DM)
    if len(dead_M) > DENSE_DEAD_SHARE * settings.auxk_k:
        vals_NA, at_NA = select(pre_NM, count)
        vals_NA = vals_NA.to(centred_ND.dtype).relu_()
        bag_ND, pull = decode_with_pull(at_NA, vals_NA, model.W_dec_FD[dead_M])
        square, grad_ND = rest_(bag_ND, minus_error_ND, unit, scale)
        parts = sparse_sums(len(dead_M), centred_ND, grad_ND, Chosen(at_NA), vals_NA, pull(grad_ND) * (vals_NA > 0))
    else:
        acts_NM = keep_(pre_NM, count)
        square, grad_ND = rest_(acts_NM @ W_dec_MD, minus_error_ND, unit, scale)
        grad_acts_NM = torch.ops.aten.threshold_backward(grad_ND @ W_dec_DM, acts_NM, 0)  # ReLU's: zero where acts are
        sums = grad_acts_NM.t() @ input_ND, acts_NM.t() @ grad_ND, grad_acts_NM.sum(0, dtype=centred_ND.dtype)
        parts = tuple(part.to(centred_ND.dtype) for part in sums)
    dW_enc_MD, dW_dec_MD, db_enc_M = parts
    return AuxKGradients(loss=square / scatter, dead_M=dead_M, W_enc_MD=dW_enc_MD, W_dec_MD=dW_dec_MD, b_enc_M=db_enc_M)


def sparse_sums(
    latents: int,
    centred_ND: torch.Tensor,
    grad_ND: torch.Tensor,
    chosen: Chosen,
    vals: torch.Tensor,
    grad_vals: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW_enc, dW_dec and db_enc of the module docstring, for `latents` latents; the first two in `out` if it is given:
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
