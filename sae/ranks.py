"""Data-parallel training on the processes that torchrun starts: each takes its part of every batch.

Gradients are averaged and the counts of fired latents summed (`steppers.OptimizerStepper`), and what belongs to a batch
(BatchTopK's edge and threshold, AuxK's scatter) is asked of all ranks, so every rank makes the same update, and W ranks
on B / W rows each are one process on B rows, up to the order of sums. Rank r has the r-th part of the rows. All ranks
read all rows of a batch (reading is not shared out); rank 0 alone writes checkpoints and logs. gloo on CPUs, NCCL on GPUs.

Shape letters: N rows of this rank, B of all ranks, P entries of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed.nn.functional
from torch import distributed

from .errors import ConfigError
from .train_config import TrainConfig

Rows = TypeVar("Rows", torch.Tensor, np.ndarray)


class Ranks:
    """This process among the others; the default is the only one, for which nothing is sent."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this process writes what all have."""
        return self.rank == 0

    def part(self, rows_B: Rows) -> Rows:
        """This rank's rows of a batch.

        Raises:
            ConfigError: the rows cannot be shared out evenly.
        """
        if len(rows_B) % self.world:
            raise ConfigError(f"batch_tokens must be a multiple of the {self.world} ranks, got {len(rows_B)}")
        size = len(rows_B) // self.world
        return rows_B[self.rank * size : (self.rank + 1) * size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.world == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def least(self, tensor: torch.Tensor) -> torch.Tensor:
        """The smallest over the ranks, entry by entry."""
        if self.world == 1:
            return tensor
        found = tensor.clone()
        distributed.all_reduce(found, distributed.ReduceOp.MIN)
        return found

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on some rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag), device=device)))

    def gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tensors of all ranks, of one shape, one after another along `dim`."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def parts(self, mine_P: torch.Tensor) -> list[torch.Tensor]:
        """The vectors of all ranks, of any lengths, in the order of the ranks."""
        if self.world == 1:
            return [mine_P]
        sizes = self.gather(torch.tensor([len(mine_P)], device=mine_P.device)).tolist()
        padded = torch.nn.functional.pad(mine_P, (0, max(sizes) - len(mine_P)))
        return [part[:size] for part, size in zip(self.gather(padded).chunk(self.world), sizes, strict=True)]

    def gather_to_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same along the first dimension, on the CPU; the device holds the part of one other rank at a time."""
        parts = []
        for rank in range(self.world):
            part = tensor.detach().clone() if rank == self.rank else torch.empty_like(tensor)
            distributed.broadcast(part, rank)
            parts.append(part.cpu())
        return torch.cat(parts)

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def torchrun_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun's variables name, connected; the one process where there are none.

    Afterwards gloo's threads have ended. They hold the last tensors that were sent, and one that still does while
    Python ends aborts the process. torch.distributed.nn keeps, in the defaults of its functions, the group that is there
    when it is first imported, which torch.optim does: imported before there is one, nothing outlives the end of ours.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield (ranks := Ranks(distributed.get_rank(), world))
        ranks.meet()
    finally:
        distributed.destroy_process_group()


def with_ranks_kernel(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings as they are in one process; on several ranks with the kernel that these have, torch's operations.

    Raises:
        ConfigError: several ranks, and another kernel was asked for.
    """
    if ranks.world == 1:
        return config
    if config.kernel not in ("auto", "torch"):
        raise ConfigError(
            f"kernel={config.kernel} trains in one process; {ranks.world} ranks train by torch's operations: "
            "use kernel=auto or torch"
        )
    return replace(config, kernel="torch")
