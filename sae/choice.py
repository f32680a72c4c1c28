"""Which latents a batch takes, as pairs of a row and a latent: the k largest of every row, of groups, or of the batch.

Three ways, by `encoder_dtype` and the processor:
- float32 where `pre_acts.finds_by_bounds`: upper bounds from 8-bit products leave few candidates, whose exact values
  decide. Where one that was left out may be among the k largest, more candidates are taken, then exact values only.
- float32 elsewhere: dense pre-activations.
- bfloat16: dense ones in bfloat16 name a few more than k, whose exact values decide.

Shape letters: N rows, D d_in, F latents, K top-k, C candidates of a row, P pairs, M rows that are done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .batch_select import MARGIN, Entries, Guess, batch_edge, entries_from, largest, take
from .model import SparseCoder, named_count, select_topk
from .pre_acts import Bounds, PreActs, finds_by_bounds
from .sparse_products import offsets_of, sampled_products
from .variants.groupmax import group_candidates, group_leaders, group_winners

SAMPLE_ROWS = 32  # whose pre-activations give BatchTopK's first guess
SPARSE_SHARE = 32  # more candidates than this part of the entries: all values are computed instead
SAMPLED_ROW = 16  # in how many: whose candidates are counted
# latents of a row that bounds name beside the k: this share of k, but at least so many; first, and where that is not enough
NAMED = ((0.5, 8), (3.0, 32))
TINY = torch.finfo(torch.float32).tiny


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


def largest_bounds(bound_NF: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`grouped_topk` of bounds, float32, that are numbers: whole numbers are compared a third faster.

    Bits of positive floats are in their order. Those below zero, in reverse order, come after them: what is left out has no
    larger bound, or none above zero.
    """
    bits_NC, idx_NC = grouped_topk(bound_NF.view(torch.int32), count)
    return bits_NC.view(torch.float32), idx_NC


class RowPairs:
    """The latents of every row and their pre-activations: TopK's k largest, GroupMax's largest of k groups."""

    def __init__(self, model: SparseCoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._pre_acts, self._bounds = PreActs(model, dtype), Bounds(model)

    def __call__(self, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """idx_NK and vals_NK, in float32, unsorted."""
        model, low, group = self.model, self.dtype == torch.bfloat16, self.model.selects == "groupmax"
        if not low and finds_by_bounds(model, model.k):
            return self._by_bounds(centred_ND)
        choose = (group_candidates if low else group_leaders) if group else grouped_topk
        count = model.k if group else named_count(model.k, model.num_latents, self.dtype)
        vals_NC, idx_NC = _each(choose, self._pre_acts, centred_ND, count)
        if not low:
            return idx_NC, vals_NC
        vals_NK, at_NK = (group_winners if group else select_topk)(_exact(model, centred_ND, idx_NC), model.k)
        return idx_NC.gather(1, at_NK), vals_NK

    def _by_bounds(self, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx_NK, vals_NK, open_M = self._named(centred_ND, NAMED[0])
        if len(open_M):
            dense_M = open_M
            if 2 * len(open_M) <= len(centred_ND):  # else wide bounds are the rule
                idx_NK[open_M], vals_NK[open_M], still = self._named(centred_ND[open_M], NAMED[1], again=True)
                dense_M = open_M[still]
            if len(dense_M):
                found = _each(grouped_topk, self._pre_acts, centred_ND[dense_M], self.model.k)
                vals_NK[dense_M], idx_NK[dense_M] = found
        return idx_NK, vals_NK

    def _named(
        self, centred_ND: torch.Tensor, spare: tuple[float, int], *, again: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """idx_NK, vals_NK among the latents with the largest bounds, and the rows for which that may not be all."""
        k, (share, least) = self.model.k, spare
        count = min(self.model.num_latents, k + max(least, int(share * k)))
        bound_NC, idx_NC = _each(largest_bounds, partial(self._bounds, again=again), centred_ND, count)
        vals_NK, at_NK = select_topk(_exact(self.model, centred_ND, idx_NC), k)
        # what was left out is at most the least bound, and nothing below zero fires; NaN leaves it open
        open_N = ~(bound_NC.amin(1) <= vals_NK.amin(1).clamp_min_(0))
        return idx_NC.gather(1, at_NK), vals_NK, open_N.nonzero().squeeze(1)


def _exact(
    model: SparseCoder, centred_ND: torch.Tensor, idx: torch.Tensor, offsets_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Float32 pre-activations of these latents, (N, C) or (P,)."""
    return sampled_products(centred_ND, model.W_enc_FD, idx, offsets_N) + model.b_enc_F[idx]


def _each(
    choose: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    values: Callable[[torch.Tensor], Iterator[tuple[slice, torch.Tensor]]],
    centred_ND: torch.Tensor,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose` on every block of rows."""
    found = [choose(values_NF, count) for _, values_NF in values(centred_ND)]
    vals_NC, idx_NC = (torch.cat(columns) for columns in zip(*found, strict=True))
    return vals_NC, idx_NC


class BatchPairs:
    """BatchTopK's pairs: the k largest pre-activations of a batch times its rows, those of this rank's rows row after
    row, all above zero."""

    def __init__(self, model: SparseCoder, dtype: torch.dtype) -> None:
        self.model, self.guess = model, Guess()
        self._bounded = dtype == torch.float32 and finds_by_bounds(model, model.k)
        self._margin = MARGIN if dtype == torch.bfloat16 else 0.0
        self._pre_acts, self._bounds = PreActs(model, dtype), Bounds(model)

    def __call__(self, centred_ND: torch.Tensor) -> Entries:
        model, rows, ranks, margin = self.model, len(centred_ND), self.model.ranks, self._margin
        count = model.k * rows
        if not self.guess.least:
            some_NF = torch.addmm(model.b_enc_F, centred_ND[:: max(1, rows // SAMPLE_ROWS)], model.W_enc_FD.t())
            self.guess.first(some_NF, model.k / model.num_latents, ranks)
        while True:
            found = self._reaching(centred_ND, self.guess.least)
            broken = take(found, found.value_P.isnan())
            if len(broken.value_P):
                found = take(found, ~found.value_P.isnan())
            edge = batch_edge(found.value_P.float(), count, ranks)
            seen = int(ranks.sum(torch.tensor(len(found.value_P), device=centred_ND.device)))
            if self.guess.good(seen, count * ranks.world, edge.value * (1 - margin)):
                break
        if margin:
            found = self._exact(centred_ND, take(found, found.value_P.float() >= edge.value * (1 - margin)))
            edge = batch_edge(found.value_P[found.value_P > 0], count, ranks)
        if len(broken.value_P):  # the loss tells of them
            row_P, latent_P, value_P = (part_P[:count] for part_P in broken)
            return Entries(row_P, latent_P, value_P.to(centred_ND.dtype))
        return take(found, largest(found, edge, model.num_latents))

    def _reaching(self, centred_ND: torch.Tensor, least: float) -> Entries:
        """The entries of at least `least`, and those that are no number, by their values in the dtype that chooses."""
        if self._bounded and least > TINY:
            found = self._entries(self._bounds, centred_ND, least, only_few=True)
            if found is not None:
                found = self._exact(centred_ND, found)
                return take(found, ~(found.value_P < least))
        found = self._entries(self._pre_acts, centred_ND, least)
        assert found is not None
        return found

    def _entries(
        self, values: PreActs | Bounds, centred_ND: torch.Tensor, least: float, *, only_few: bool = False
    ) -> Entries | None:
        """None with `only_few` where they are not few, by some rows of a block."""
        parts = []
        for part, values_NF in values(centred_ND):
            some_NF = values_NF[::SAMPLED_ROW]
            if only_few and int((~(some_NF < least)).sum()) * SPARSE_SHARE > some_NF.numel():
                return None
            parts.append(entries_from(values_NF, least, self.model.k, part.start))
        return Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _exact(self, centred_ND: torch.Tensor, found: Entries) -> Entries:
        """With float32 values."""
        offsets_N = offsets_of(found.row_P, len(centred_ND))
        return found._replace(value_P=_exact(self.model, centred_ND, found.latent_P, offsets_N))
