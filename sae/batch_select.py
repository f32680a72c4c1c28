"""The k N largest pre-activations of a batch of N rows, without sorting the batch (BatchTopK's choice).

A guess of the smallest chosen value, just below the last batch's, keeps a few entries more than wanted; among those
the exact edge is found. A guess that was too high is lowered and the batch passed again, so the result does not
depend on it. Equal values at the edge: the earlier row, then the lower latent.

Where bfloat16 chooses, it only names candidates: every entry of at least (1 - MARGIN) times the bfloat16 edge. The
k N largest of these by their float32 values are taken.

Where ranks share the rows of a batch the edge is that of all: each offers its entries of at least the lowest of the
ranks' own edges, and every rank takes its own above the edge. The rows of a rank come before those of the next.

Shape letters: N rows, F latents, P entries, H groups that hold an entry, G latents of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .ranks import Ranks

MARGIN = 2.0**-6  # twice the rounding of a bfloat16 number
LEAST_SLACK, MOST_SLACK = 0.03, 0.5
ALONE = Ranks()


class Entries(NamedTuple):
    """Some entries of an (N, F) matrix, row after row."""

    row_P: torch.Tensor
    latent_P: torch.Tensor
    value_P: torch.Tensor


class Edge(NamedTuple):
    """The smallest chosen value of a batch, and how many of the entries that equal it are chosen on this rank."""

    value: float
    tied: int


@torch.no_grad()
def select_batch(
    values_NF: torch.Tensor, count: int, by_NF: torch.Tensor | None = None, ranks: Ranks = ALONE
) -> torch.Tensor:
    """True for the `count` largest positive entries, of W ranks the W `count` largest of all: the general path. `by_NF`
    in bfloat16 names candidates as the module says."""
    values_NF = values_NF.clamp_min(0)
    if by_NF is not None:
        by_NF = by_NF.float()
        values_NF = values_NF * (by_NF >= batch_edge(by_NF[by_NF > 0], count, ranks).value * (1 - MARGIN))
    edge = batch_edge(values_NF[values_NF > 0], count, ranks)
    chosen_NF = values_NF > edge.value
    chosen_NF.view(-1)[(values_NF.flatten() == edge.value).nonzero().squeeze(1)[: edge.tied]] = True
    return chosen_NF


def batch_edge(positive_P: torch.Tensor, count: int, ranks: Ranks = ALONE) -> Edge:
    """The edge of the `count` largest of these positive entries, of W ranks of the W `count` largest of all."""
    if ranks.world > 1:
        own = torch.tensor(edge_of(positive_P, count), dtype=torch.float64, device=positive_P.device)
        positive_P = positive_P[positive_P >= float(ranks.least(own))]  # at least `count` of each rank: enough
    parts = ranks.parts(positive_P)
    all_P, wanted = torch.cat(parts), count * ranks.world
    value = edge_of(all_P, wanted)
    earlier = sum(int((part_P == value).sum()) for part_P in parts[: ranks.rank])
    return Edge(value, max(0, wanted - int((all_P > value).sum()) - earlier))


def edge_of(positive_P: torch.Tensor, count: int) -> float:
    """The value of the `count`-th largest entry; the least positive number where there are fewer."""
    if len(positive_P) < count:
        return torch.finfo(torch.float32).tiny
    return float(positive_P.kthvalue(len(positive_P) - count + 1).values)


def entries_from(pre_NF: torch.Tensor, least: float, k: int, first_row: int = 0) -> Entries:
    """The entries of at least `least`, and those that are no number. On a CPU by the maxima of groups first, which vectorise."""
    rows, latents = pre_NF.shape
    group = 1 << max(0, ((latents // k).bit_length() - 1) // 2)
    if pre_NF.device.type != "cpu" or group < 4 or latents % group:
        row_P, latent_P = (~(pre_NF < least)).nonzero(as_tuple=True)
        return Entries(row_P + first_row, latent_P, pre_NF[row_P, latent_P])
    groups = latents // group
    pre_NGg = pre_NF.view(rows, group, groups)  # a group: every groups-th latent
    hit_H = (~(pre_NGg.amax(1) < least)).flatten().nonzero().squeeze(1)
    row_H, group_H = hit_H // groups, hit_H % groups
    at_HG = (row_H * latents + group_H).unsqueeze(1) + torch.arange(0, latents, groups)
    value_HG = pre_NF.reshape(-1)[at_HG.flatten()]
    kept_P = (~(value_HG < least)).nonzero().squeeze(1)
    flat_P = at_HG.flatten()[kept_P]
    return Entries(flat_P // latents + first_row, flat_P % latents, value_HG[kept_P])


def largest(entries: Entries, edge: Edge, num_latents: int) -> torch.Tensor:
    """Mask of the entries above the edge, and of the first of those that equal it."""
    chosen_P = entries.value_P > edge.value
    tied_P = (entries.value_P == edge.value).nonzero().squeeze(1)
    if len(tied_P) > edge.tied:
        place_P = entries.row_P[tied_P] * num_latents + entries.latent_P[tied_P]
        tied_P = tied_P[place_P.argsort()[: edge.tied]]
    chosen_P[tied_P] = True
    return chosen_P


def take(entries: Entries, kept_P: torch.Tensor) -> Entries:
    """The entries of a mask."""
    at = kept_P.nonzero().squeeze(1)
    return Entries(*(part[at] for part in entries))


class Guess:
    """The value above which the next batch's entries are looked at; only a matter of speed."""

    def __init__(self) -> None:
        self.least = 0.0  # 0: none yet
        self._slack = 0.1

    def state(self) -> list[float]:
        """For `load`: a resumed run makes the same guesses."""
        return [self.least, self._slack]

    def load(self, state: list[float]) -> None:
        self.least, self._slack = map(float, state)

    def first(self, sample_NF: torch.Tensor, share: float, ranks: Ranks = ALONE) -> None:
        """Start from a few rows: the value that 1.5 times the wanted share of their entries reaches, of several ranks
        the least of theirs."""
        wanted = max(1, min(sample_NF.numel(), round(1.5 * share * sample_NF.numel())))
        values_P = sample_NF.flatten().float()
        found = float(ranks.least(values_P.kthvalue(len(values_P) - wanted + 1).values))
        self.least = found if found > 0 else torch.finfo(torch.float32).tiny

    def good(self, seen: int, count: int, lowest: float) -> bool:
        """Whether every entry that matters was looked at; moves the guess either way. `seen` entries reached it, and
        `lowest` is the least that matters; any number where fewer than `count` were seen."""
        tiny = torch.finfo(torch.float32).tiny
        lowest = max(tiny, lowest)
        if seen >= count and lowest >= self.least:
            self._slack = max(LEAST_SLACK, self._slack * 0.98)
            self.least = max(tiny, lowest * (1 - self._slack))
            return True
        if self.least <= tiny:
            return True  # every positive entry was
        self._slack = min(MOST_SLACK, 2 * self._slack)
        # far below what rounding or a step of training can do: take all
        lower = (self.least if seen < count else lowest) * (1 - self._slack)
        self.least = lower if lower > 1e-6 * self.least and self._slack < MOST_SLACK else tiny
        return False
