"""Latent-parallel training: each process of torchrun holds a part of the dictionary, and sees every row.

A rank has F / W latents: rows of W_enc and W_dec, b_enc, and the optimizer's state of them; b_dec is the same on all.
Of a row each rank offers its k largest latents, and every rank takes the k largest of all offers, so the choice is
that of one process but for ties. Sent in a step: the offers (N W k numbers), the sum of the partial reconstructions
(N D), a vector for b_dec (D), how often latents fired (F); with dead latents the first two again. Gradients of a latent
are made where it lives. With encoder_dtype bfloat16 the offers are chosen by it, and the k among them by exact values.

Shape letters: N rows, D d_in, F latents of all ranks, L = F / W those of this one, K top-k, C candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .kernels import AuxKGradients, FastStep, has_fast_step
from .losses import LossSettings, auxk_denominator
from .model import SparseCoder, select_topk
from .ranks import Ranks
from .sparse_products import Chosen, decode_with_pull, offsets_of, sparse_sums
from .steppers import TorchStepper
from .train_config import TrainConfig

SHARED_OUT = ("W_enc_FD", "W_dec_FD", "b_enc_F")  # parameters of which each rank has its rows


def shard_(model: SparseCoder, *, config: TrainConfig, ranks: Ranks) -> None:
    """Leave this rank's latents in the model.

    Raises:
        ConfigError: a model or an optimizer that needs all latents in one place; latents that cannot be shared out.
    """
    alike = has_fast_step(model) and model.selects == "topk" and not model.wiring.two_sided
    if not alike or config.optimizer == "muon":
        raise ConfigError(
            "parallel=latent is for variant topk with unit decoder rows that reconstructs what it reads, and Adam or signum, got "
            f"{config.variant} with {config.optimizer}; use parallel=data"
        )
    latents, most_k = config.num_latents, max(config.k, config.options.k_start)
    if latents % ranks.world or latents // ranks.world < most_k:
        raise ConfigError(
            f"parallel=latent needs num_latents to be a multiple of the {ranks.world} ranks, with k = {most_k} latents "
            f"or more on each, got {latents}"
        )
    for name in SHARED_OUT:
        own = own_rows(getattr(model, name).detach(), ranks)
        setattr(model, name, nn.Parameter(own.clone()))


def own_rows(whole: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """This rank's part of something with one row for each latent."""
    size = len(whole) // ranks.world
    return whole[ranks.rank * size : (ranks.rank + 1) * size]


class LatentParallelStep(FastStep):
    """The gradients of the latents of this rank, and that of b_dec."""

    def __init__(self, model: SparseCoder, settings: LossSettings, ranks: Ranks) -> None:
        super().__init__(model, settings)
        self.ranks = ranks

    def encode(self, centred_ND: torch.Tensor) -> tuple[Chosen, torch.Tensor]:
        """Pairs of this rank among the k largest of every row."""
        offered, vals_NK = super().encode(centred_ND)
        return self._taken(vals_NK, offered.idx, self.model.k)

    def _taken(self, vals_NC: torch.Tensor, idx_NC: torch.Tensor, count: int) -> tuple[Chosen, torch.Tensor]:
        """What of this rank's offers is among the `count` largest of all ranks' (0: nothing), row after row."""
        ranks, width = self.ranks, vals_NC.shape[1]
        all_NC = ranks.gather(vals_NC, dim=1)  # the same on every rank, and so is what is taken
        _, at_NK = select_topk(all_NC, min(count, all_NC.shape[1]))
        taken_NC = torch.zeros_like(all_NC, dtype=torch.bool).scatter_(1, at_NK, True)
        mine_NC = taken_NC[:, ranks.rank * width : (ranks.rank + 1) * width] & (vals_NC != 0)  # NaN is passed on
        row_P = mine_NC.nonzero()[:, 0]
        return Chosen(idx_NC[mine_NC], offsets_of(row_P, len(vals_NC)), row_P), vals_NC[mine_NC]

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(part)

    def _fired(self, chosen: Chosen, vals: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(super()._fired(chosen, vals))

    def _auxk(self, centred_ND: torch.Tensor, minus_error_ND: torch.Tensor, dead_F: torch.Tensor) -> AuxKGradients:
        """As `kernels.auxk_gradients`, in float32, with the auxiliary latents chosen among the dead of all ranks."""
        model, settings, ranks = self.model, self.settings, self.ranks
        dead_M = own_rows(dead_F, ranks).nonzero().flatten()
        count = min(settings.auxk_k, int(dead_F.sum()))
        width = min(count, int(dead_F.view(ranks.world, -1).sum(1).max()))  # offers of the rank with most dead
        scatter = auxk_denominator(minus_error_ND, model.ranks)
        scale = 2.0 * settings.auxk_coef * settings.variance / scatter
        pre_NM = torch.addmm(model.b_enc_F[dead_M], centred_ND, model.W_enc_FD[dead_M].t())
        best_NC, at_NC = select_topk(pre_NM, min(width, len(dead_M)))
        missing = (0, width - best_NC.shape[1])
        vals_NC, idx_NC = nn.functional.pad(best_NC.relu(), missing), nn.functional.pad(dead_M[at_NC], missing)
        chosen, vals_P = self._taken(vals_NC, idx_NC, count)
        bag_ND, pull = decode_with_pull(chosen.idx, vals_P, model.W_dec_FD, chosen.offsets_N)
        rest_ND = self._total(bag_ND) + minus_error_ND
        grad_ND = rest_ND * scale
        grad_vals_P = pull(grad_ND) * (vals_P > 0)
        sums = sparse_sums(model.num_latents, centred_ND, grad_ND, chosen, vals_P, grad_vals_P)
        W_enc_MD, W_dec_MD, b_enc_M = (part[dead_M] for part in sums)
        loss = rest_ND.pow(2).sum() / scatter
        return AuxKGradients(loss=loss, dead_M=dead_M, W_enc_MD=W_enc_MD, W_dec_MD=W_dec_MD, b_enc_M=b_enc_M)


class LatentParallelStepper(TorchStepper):
    """`LatentParallelStep`, then the optimizer on this rank's latents and, alike on every rank, on b_dec."""

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(model, settings, config)
        self.ranks = ranks
        self.name = f"torch-{ranks.world}-latent-ranks"
        self._gradients = LatentParallelStep(model, settings, ranks)

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._each(state, self.ranks.gather_to_cpu)

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._each(state, lambda tensor: own_rows(tensor, self.ranks))

    def _each(self, state: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """`state` with `change` applied to what has a row for each latent; torch numbers parameters in their order."""
        names: dict[str | int, str] = {name: name for name, _ in self.model.named_parameters()}
        names |= dict(enumerate(list(names.values())))

        def walk(part: Any, name: str) -> Any:
            if isinstance(part, Mapping):
                return {key: walk(value, names.get(key, name)) for key, value in part.items()}
            return change(part) if isinstance(part, torch.Tensor) and part.ndim and name in SHARED_OUT else part

        return walk(state, "")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The model holds the latents of all ranks meanwhile, on the CPU; every rank must enter."""
        with super().evaluation():
            parts = dict(self.model.named_parameters())
            for name, whole in self.whole({name: p.detach() for name, p in parts.items()}).items():
                setattr(self.model, name, nn.Parameter(whole.cpu()))
            try:
                yield
            finally:
                for name, part in parts.items():
                    setattr(self.model, name, part)
