"""The training step without dense latents: the same gradients as `losses.dense_step`, a fraction of the work.

Of the five matrix products of dense autograd one is left, the encoder's. With idx_NK the chosen latents and
g = 2/N (u_hat - u):

    dW_dec[i] = sum over (n, k) with idx = i of a_nk g_n           dW_enc[i] = sum of da_nk (u - b_dec)_n
    da_nk     = <g_n, W_dec[idx_nk]> where a_nk > 0                db_enc[i] = sum of da_nk
    db_dec    = sum_n g_n - db_enc W_enc

A transcoder's rows are centred by a mean that does not move, and what is reconstructed is other columns: no second
term in db_dec, and dW_skip = sum_n g_n (u_n - centre)^T where it has a skip matrix.

The sums over the rows of a latent are a sparse matrix product, or an embedding_bag, over the pairs (n, k) sorted by
latent; sums run in one fixed order, so equal input gives equal bits. Dense pre-activations exist for one block of rows
at a time. TopK, GroupMax and BatchTopK share all of this but the choice; BatchTopK's pairs are not K to a row, so they
come with offsets.

Shape letters: N rows, D d_in, F latents, K top-k, A auxiliary k, P = N K pairs, M dead latents, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import pages
from .batch_select import Guess
from .choice import BatchPairs, RowPairs
from .errors import ConfigError
from .losses import LossSettings, StepResult, auxk_denominator, squares
from .model import SparseCoder, select_topk
from .ranks import Ranks
from .sparse_products import Chosen, decode_with_pull, offsets_of, sparse_sums, weighted_rows

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
    one_map = model.wiring.kind != "cross_layer"  # there each latent reads one hook point of several
    return bool(model.selects) and model.unit_rows and one_map and not model.options.multi_k


class FastStep:
    """Callable like `dense_step` with the model and settings bound; keeps its buffer between batches."""

    def __init__(self, model: SparseCoder, settings: LossSettings) -> None:
        self.model = model
        self.settings = settings
        if model.W_dec_FD.device.type == "cpu":
            for matrix in (model.W_enc_FD, model.W_dec_FD):
                pages.move_(matrix)
        self._rows = RowPairs(model, settings.encoder_dtype)
        self._batch = BatchPairs(model, settings.encoder_dtype) if model.selects == "batchtopk" else None
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None  # the gradients' memory, on a CPU

    @property
    def guess(self) -> Guess | None:
        """BatchTopK's: which way finds the same latents, and so the last bits of their values, may depend on it."""
        return None if self._batch is None else self._batch.guess

    @torch.no_grad()
    def __call__(self, u_ND: torch.Tensor, dead_F: torch.Tensor | None = None) -> StepResult:
        """Write the gradients of L to .grad and return the batch's numbers. `dead_F`: bool, None if none is dead."""
        model = self.model
        batch = model.prepare(u_ND)
        centred_ND, two_sided = model.centred(batch.input_ND), model.wiring.two_sided
        chosen, vals = self.encode(centred_ND)
        scale = 2.0 / len(u_ND)
        bag_ND, pull = decode_with_pull(chosen.idx, vals, model.W_dec_FD, chosen.offsets_N)
        if two_sided:
            minus_error_ND = self._total(bag_ND).add_(model.b_dec_D).sub_(batch.target_NO)
            if model.wiring.skip:
                minus_error_ND.addmm_(centred_ND, model.W_skip_OD.t())
        else:  # b_dec is on both sides
            minus_error_ND = self._total(bag_ND).sub_(centred_ND)
        grad_ND = minus_error_ND * scale
        grad_vals = pull(grad_ND) * (vals > 0)
        if self._sums is None and grad_ND.device.type == "cpu":
            enc_FD, dec_FD = (pages.zeros(*W_FD.shape, dtype=W_FD.dtype) for W_FD in (model.W_enc_FD, model.W_dec_FD))
            self._sums = enc_FD, dec_FD
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
        model.b_dec_D.grad = grad_ND.sum(0)
        if not two_sided:
            model.b_dec_D.grad -= self._total(weighted_rows(b_enc_F, model.W_enc_FD))
        elif model.wiring.skip:
            model.W_skip_OD.grad = grad_ND.t() @ centred_ND
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
        if self._batch is not None:
            found = self._batch(centred_ND)
            return Chosen(found.latent_P, offsets_of(found.row_P, len(centred_ND)), found.row_P), found.value_P
        idx_NK, vals_NK = self._rows(centred_ND)
        return Chosen(idx_NK), vals_NK.relu_()


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
    if acts_NM.shape[1] > k:
        # about half of the entries are zero, so that few rows have more than k others; a choice takes twice as long as a product
        many_R = (acts_NM.sign().sum(1, dtype=torch.float32) > k).nonzero().squeeze(1)
        if len(many_R):
            many_RM = acts_NM[many_R]
            vals_RA, at_RA = select_topk(many_RM, k)
            acts_NM[many_R] = many_RM.zero_().scatter_(1, at_RA, vals_RA)
    return acts_NM


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
