"""The training step of `kernels.FastStep` and torch's Adam as two compiled passes: over the rows, over the latents.

Rows: choose k latents, their exact float32 values, reconstruction, residual, da. Latents: the gradient of a latent's
weights is summed in cache, projected, taken up by Adam and the row normalised before the next latent's turn. Every
sum has a fixed order: equal input gives equal bits, whatever the number of threads (with encoder_dtype=bfloat16, or
where there are no 8-bit products, as far as torch's matrix product does).

How the latents are chosen:
- encoder_dtype=float32, processor with 8-bit dot products: candidates whose bound on the pre-activation, from an
  8-bit product, reaches the k-th largest (BatchTopK: a guess of the batch's edge); their exact float32
  pre-activations decide.
- else: torch's matrix product in encoder_dtype and an exact top-k, on blocks of rows that stay in cache; in bfloat16 a
  few more than k, of which the exact values decide.

AuxK with auxk_dtype=bfloat16 goes in 8 bits too, where the latents are found so: the search has the dead latents'
pre-activations, auxk.c does the rest. Else through torch's products.

TopK reconstructs a block of rows while it multiplies the next one. BatchTopK cannot before it has seen all rows: it
is one more pass.

Shape letters: N rows, D d_in, F latents, K top-k, P active pairs of a row and a latent, M latents with AuxK gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import pages
from ..batch_select import Guess
from ..choice import SAMPLE_ROWS, BatchPairs
from ..kernels import DENSE_DEAD_SHARE, auxk_gradients
from ..losses import LossSettings, StepResult
from ..model import SparseCoder, named_count
from ..pre_acts import BALANCE_ROWS, balance, dither
from ..ranks import Ranks
from ..sparse_products import offsets_of
from ..steppers import Stepper
from ..train_config import TrainConfig
from .library import AMX, LANES, UNIT, Library, Step, finds_in_int8

BLOCK_BYTES = 16 << 20  # dense pre-activations held at a time
SCATTER_LEAST = 1e-6  # of the squares: errors that are all alike leave nothing but rounding
# of AuxK in 8 bits: sums over more rows are beyond 32 bits, counts of more latents beyond 16
MOST_ROWS, MOST_DEAD = 1 << 16, (1 << 15) - 1
STRIPE_COLUMNS = 32  # of sums.c
SUMS = ("sorted_row_P", "sorted_val_P", "sorted_grad_P", "sum_enc_FD", "sum_dec_FD")
MOST_SUM_BYTES, MOST_STRIPE_ROWS = 8 << 20, 4096
PARAMETERS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


class NativeStepper(Stepper):
    """CPU only. The state is Adam's, and the balance of the 8-bit products."""

    name = "native"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig, library: Library) -> None:
        self.model, self.settings, self._library = model, settings, library
        self._betas, self._steps = config.betas, 0
        self._over_batch = model.selects == "batchtopk"
        self._int8 = settings.encoder_dtype == torch.float32 and finds_in_int8(model, config)
        for name in PARAMETERS:
            pages.move_(getattr(model, name))
        self._pairs = BatchPairs(model, settings.encoder_dtype)
        self._moments = {
            f"{name.rpartition('_')[0]}_{moment}": pages.zeros(*getattr(model, name).shape)
            for name in PARAMETERS
            for moment in "mv"
        }
        self._balance_D = torch.zeros(model.d_in)  # zeros: not measured yet
        latents, d_in = model.num_latents, model.d_in
        self._dither_D = torch.zeros(-(-d_in // LANES) * LANES)
        self._dither_D[:d_in] = dither(d_in)
        self._copies: dict[str, torch.Tensor] = {}
        if self._int8:
            padded, width = library.tile_shape(latents, d_in)
            self._copies = {
                "q_tiles": pages.zeros(padded * width, dtype=torch.int8),
                "q_scale_F": torch.zeros(latents),
                "q_norm_F": torch.zeros(latents),
                "q_shift_F": torch.zeros(latents),
                "q_offset_F": torch.zeros(padded, dtype=torch.int32),
            }
        elif settings.encoder_dtype == torch.bfloat16:
            self._copies = {"bf16_FD": torch.empty(latents, d_in, dtype=torch.bfloat16)}
        self._sums = {
            "fired_F": torch.empty(latents, dtype=torch.int64),
            "start_F1": torch.empty(latents + 1, dtype=torch.int32),
        }
        self._batch: dict[str, torch.Tensor] = {}
        self._pre = torch.empty(0)
        self._named = torch.empty(0, dtype=torch.int32)
        self._pool = torch.empty(0, dtype=torch.int64)
        self._step = Step(
            D=d_in, F=latents, tile=library.tile, beta1=config.betas[0], beta2=config.betas[1], eps=config.eps
        )
        self._step.point(
            **self._moments, **self._copies, **self._sums, balance_D=self._balance_D, dither_D=self._dither_D
        )
        self._dead: dict[str, torch.Tensor] = {}  # AuxK in 8 bits: its results, and for which latents
        self._auxk_memory = torch.empty(0, dtype=torch.uint8)
        self._fresh = False  # whether the copies are those of the weights

    @torch.no_grad()
    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        u_ND = u_ND.contiguous()
        self._prepare(u_ND, lr)
        dead_F = None if dead_F is None or not bool(dead_F.any()) else dead_F
        low_auxk = dead_F is not None and self._aim_auxk(dead_F)
        if self._over_batch:
            self._rows_of_batch(u_ND)
        elif self._int8:
            self._library.run("rows_int8", self._step)
        else:
            self._choose(u_ND)
            self._library.run("rows", self._step)
        error = self._batch["error_N"].sum().float()
        loss, auxk_loss = error / len(u_ND), torch.zeros(())
        extra: tuple[torch.Tensor, ...] = ()  # must live as long as the pass over the latents
        if dead_F is not None:
            if low_auxk:
                self._library.run("auxk", self._step)
                auxk_loss = self._dead["auxk_loss"].float()
            else:
                auxk_loss, extra = self._auxk(dead_F, len(u_ND))
            loss = loss + self.settings.auxk_coef * self.settings.variance * auxk_loss
        self._library.run("latents", self._step)
        del extra
        return StepResult(error=error, auxk_loss=auxk_loss, loss=loss, fired_F=self._sums["fired_F"].clone())

    @torch.no_grad()
    def chosen(self, u_ND: torch.Tensor) -> torch.Tensor:
        """idx_NK of the latents a step with these rows takes; TopK. Where fewer are above zero, 0 fills up."""
        u_ND = u_ND.contiguous()
        self._prepare(u_ND, 0.0)
        self._steps -= 1
        if not self._int8:
            self._choose(u_ND)
        self._library.run("rows_int8" if self._int8 else "rows", self._step)
        return self._batch["idx_P"].view(len(u_ND), -1).long()

    def state_dict(self) -> dict[str, Any]:
        state = {"steps": self._steps, "balance_D": self._balance_D} | self._moments
        return state | ({"guess": self._pairs.guess.state()} if self._over_batch else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        if self._over_batch:
            self._pairs.guess.load(state["guess"])
        self._balance_D.copy_(state["balance_D"])
        for name, moment in self._moments.items():
            moment.copy_(state[name])
        self._fresh = False

    @property
    def candidates_per_row(self) -> float:
        """Latents whose exact value was computed in the last step, per row; k is the least."""
        return float(self._batch["candidates_N"].double().mean())

    def _prepare(self, u_ND: torch.Tensor, lr: float) -> None:
        """Set everything of the structure that this batch decides."""
        model, step, rows = self.model, self._step, len(u_ND)
        if not self._batch or len(self._batch["error_N"]) != rows or model.k != step.K:
            self._batch = self._batch_memory(rows)
            step.point(**(dict.fromkeys(SUMS) | self._batch))
        self._steps += 1
        step.N, step.K, step.threads = rows, model.k, torch.get_num_threads()
        step.step_size = lr / (1 - self._betas[0] ** self._steps)
        step.root_correction = math.sqrt(1 - self._betas[1] ** self._steps)
        step.point(
            **{name: getattr(model, name) for name in PARAMETERS},
            u_ND=u_ND, extra_of_F=None, extra_enc_MD=None, extra_dec_MD=None, extra_bias_M=None, auxk_memory=None,
        )  # fmt: skip
        if not self._fresh:
            if self._int8 and not bool(self._balance_D.any()):
                self._balance_D.copy_(balance(part_ND - model.b_dec_D for part_ND in u_ND.split(BALANCE_ROWS)))
            self._library.run("refresh_all", step)
            self._fresh = True

    def _batch_memory(self, rows: int) -> dict[str, torch.Tensor]:
        model = self.model
        pairs, parts = rows * model.k, -(-rows // UNIT) + -(-model.num_latents // UNIT)
        scratch = self.scratch or pages.Scratch()
        pool = ("pool_used", "pool_at_N", "pool_count_N") if self._over_batch else ()
        return {
            "centred_ND": scratch.array("centred_ND", rows, model.d_in),
            "grad_ND": scratch.array("grad_ND", rows, model.d_in),
            "first_N1": torch.arange(0, pairs + 1, model.k),
            "row_P": torch.arange(rows, dtype=torch.int32).repeat_interleave(model.k),
            "idx_P": torch.empty(pairs, dtype=torch.int32),
            "vals_P": torch.empty(pairs),
            "grad_vals_P": torch.empty(pairs),
            "error_N": torch.empty(rows, dtype=torch.float64),
            "candidates_N": torch.empty(rows, dtype=torch.int64),
            "pair_P": torch.empty(pairs, dtype=torch.int32),
            "partial_D": torch.empty(parts, model.d_in),
            **self._sum_memory(rows, pairs),
            **{name: torch.zeros(rows, dtype=torch.int64) for name in pool},
        }

    def _sum_memory(self, rows: int, pairs: int) -> dict[str, torch.Tensor]:
        """Of sums.c, where it is the faster: the sums stay in the cache, a stripe of all rows in a core's own."""
        latents, d_in = self.model.num_latents, self.model.d_in
        if d_in % STRIPE_COLUMNS or 8 * latents * d_in > MOST_SUM_BYTES or rows > MOST_STRIPE_ROWS:
            return {}
        of_pairs = torch.empty(pairs, dtype=torch.int32), torch.empty(pairs), torch.empty(pairs)
        return dict(zip(SUMS, (*of_pairs, torch.empty(latents, d_in), torch.empty(latents, d_in)), strict=True))

    def _rows_of_batch(self, u_ND: torch.Tensor) -> None:
        """BatchTopK: the pairs of the whole batch, then everything else that goes row by row."""
        batch = self._batch
        if self._int8:
            self._fill_pool(u_ND, self._pairs.guess)
            self._library.run("pairs_of_pool", self._step)
        else:
            torch.sub(u_ND, self.model.b_dec_D, out=batch["centred_ND"])
            found = self._pairs(batch["centred_ND"])
            count = len(found.value_P)
            for name, part_P in zip(("row_P", "idx_P", "vals_P"), found, strict=True):
                batch[name][:count] = part_P
            batch["first_N1"][:-1], batch["first_N1"][-1] = offsets_of(found.row_P, len(u_ND)), count
            batch["candidates_N"].fill_(self.model.num_latents)
        vals_P = batch["vals_P"][: int(batch["first_N1"][-1])]
        if self._int8 and len(vals_P) == len(batch["vals_P"]):
            self._pairs.guess.good(len(vals_P), len(vals_P), float(vals_P.min()))
        self._library.run("rows_of_pairs", self._step)
        self.model.observe_(vals_P)

    def _fill_pool(self, u_ND: torch.Tensor, guess: Guess) -> None:
        """Every pre-activation that may be among the k N largest, with a guess of the least of them."""
        model, step, wanted = self.model, self._step, self.model.k * len(u_ND)
        if not guess.least:
            some_ND = u_ND[:: max(1, len(u_ND) // SAMPLE_ROWS)]
            guess.first(model.pre_acts(some_ND), model.k / model.num_latents)
        room = 2 * wanted
        while True:
            step.least = guess.least
            self._pool_of(room)
            self._library.run("rows_int8", step)
            room = seen = int(self._batch["pool_used"][0])
            whole = seen <= step.pool_capacity
            if whole and (seen >= wanted or guess.good(seen, wanted, 0.0)):
                return

    def _pool_of(self, items: int) -> None:
        """Room for so many at least."""
        if len(self._pool) < items:
            self._pool = torch.empty(items, dtype=torch.int64)
        self._step.point(pool=self._pool)
        self._step.pool_capacity = len(self._pool)

    def _choose(self, u_ND: torch.Tensor) -> None:
        """The candidates, by a dense product on blocks of rows."""
        model, dtype = self.model, self.settings.encoder_dtype
        count = named_count(model.k, model.num_latents, dtype)
        if self._named.shape != (len(u_ND), count):
            self._named = torch.empty(len(u_ND), count, dtype=torch.int32)
            self._step.point(named_NC=self._named)
            self._step.C = count
        weight_FD = self._copies.get("bf16_FD", model.W_enc_FD)
        input_ND, bias_F = (u_ND - model.b_dec_D).to(dtype), model.b_enc_F.to(dtype)
        block = max(1, min(len(u_ND), BLOCK_BYTES // (model.num_latents * dtype.itemsize)))
        if self._pre.shape != (block, model.num_latents):
            self._pre = torch.empty(block, model.num_latents, dtype=dtype)
        for start in range(0, len(u_ND), block):
            part = slice(start, min(len(u_ND), start + block))
            pre_NF = self._pre[: part.stop - start]
            torch.addmm(bias_F, input_ND[part], weight_FD.t(), out=pre_NF)
            self._library.topk(pre_NF, count, self._named[part])

    def _select(self, pre_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `select_topk`."""
        idx_NK = torch.empty(len(pre_NF), k, dtype=torch.int32)
        self._library.topk(pre_NF, k, idx_NK)
        idx_NK = idx_NK.long()
        return pre_NF.gather(1, idx_NK), idx_NK

    def _scatter(self, grad_ND: torch.Tensor, _ranks: Ranks) -> torch.Tensor:
        """`losses.auxk_denominator` of 2/N times the error, whose squares the pass over the rows has summed."""
        rows = len(grad_ND)
        squares = self._batch["error_N"].sum() * (2 / rows) ** 2
        scatter = squares - rows * grad_ND.mean(0).double().square().sum()
        return torch.maximum(scatter, SCATTER_LEAST * squares).float().clamp_min(torch.finfo(torch.float32).tiny)

    def _aim_auxk(self, dead_F: torch.Tensor) -> bool:
        """Whether AuxK goes in 8 bits; then the search for the candidates keeps the dead latents' pre-activations.

        Not with AMX, whose bfloat16 products, which torch has, are faster than these of vectors.
        """
        settings, step, dead_M = self.settings, self._step, dead_F.nonzero().flatten()
        fits = len(dead_M) <= min(DENSE_DEAD_SHARE * settings.auxk_k, MOST_DEAD) and step.N <= MOST_ROWS
        if not (fits and self._int8 and settings.auxk_dtype == torch.bfloat16) or self._library.tile == AMX:
            return False
        latents, d_in = self.model.num_latents, self.model.d_in
        if len(self._dead.get("dead_M", ())) < len(dead_M):
            step.M = min(latents, 2 * len(dead_M))  # the most for which there is room
            self._dead = {
                "dead_M": torch.empty(step.M, dtype=torch.int32),
                "extra_of_F": torch.empty(latents, dtype=torch.int32),
                "extra_enc_MD": torch.empty(step.M, d_in),
                "extra_dec_MD": torch.empty(step.M, d_in),
                "extra_bias_M": torch.empty(step.M),
                "auxk_loss": torch.empty((), dtype=torch.float64),
            }
        step.M = len(self._dead["dead_M"])
        if len(self._auxk_memory) < (needed := self._library.auxk_bytes(step)):
            self._auxk_memory = pages.zeros(needed, dtype=torch.uint8)
        step.M, step.auxk_k = len(dead_M), min(settings.auxk_k, len(dead_M))
        step.auxk_weight = settings.auxk_coef * settings.variance
        self._dead["dead_M"][: step.M] = dead_M
        self._dead["extra_of_F"].fill_(-1)[dead_M] = torch.arange(step.M, dtype=torch.int32)
        step.point(**self._dead, auxk_memory=self._auxk_memory)
        return True

    def _auxk(self, dead_F: torch.Tensor, rows: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """L_aux; its gradients are given to the pass over the latents, and returned so that they stay."""
        auxk = auxk_gradients(
            self.model, self.settings, self._batch["centred_ND"], self._batch["grad_ND"], dead_F,
            unit=rows / 2, select=self._select, keep_=self._library.keep_, rest_=self._library.rest_,
            denominator=self._scatter,
        )  # fmt: skip
        place_F = torch.full((self.model.num_latents,), -1, dtype=torch.int32)
        place_F[auxk.dead_M] = torch.arange(len(auxk.dead_M), dtype=torch.int32)
        extra = (place_F, auxk.W_enc_MD.contiguous(), auxk.W_dec_MD.contiguous(), auxk.b_enc_M.contiguous())
        names = ("extra_of_F", "extra_enc_MD", "extra_dec_MD", "extra_bias_M")
        self._step.point(**dict(zip(names, extra, strict=True)))
        return auxk.loss, extra
