"""The choice of the k largest latents where ranks share out the dictionary: ours against torch's DTensor.

`torchrun --nproc-per-node=2 -m bench.latent_choice [--rows N --latents F --k K --rounds R]`

Each rank has pre-activations of its F / W latents. Ours (`sae/latent_ranks.py`): every rank offers its k largest of a
row, the k largest offers are taken. DTensor: `torch.topk` of the (N, F) tensor that is split over its latents. Rank 0
prints the collectives of one call as torch's CommDebugMode counts them, the bytes that they fill on each rank, and the
times, one side after the other in turns. Letters: N rows, F latents, K top-k, W ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

from sae.model import select_topk
from sae.ranks import Ranks, torchrun_ranks

Choice = Callable[
    [torch.Tensor, int], torch.Tensor
]  # pre_NL of this rank, k -> the chosen values, (N, K), largest first


class Counted(CommDebugMode):
    """CommDebugMode, and the bytes of the tensors that each kind of collective fills on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            filled = tree_leaves(args[0] if func.namespace == "c10d" else found)
            size = sum(tensor.nbytes for tensor in filled if isinstance(tensor, torch.Tensor))
            self.bytes[func.__name__] = self.bytes.get(func.__name__, 0) + size
        return found


def ours(ranks: Ranks) -> Choice:
    """The choice of `latent_ranks.LatentParallelStep`."""

    def choose(pre_NL: torch.Tensor, k: int) -> torch.Tensor:
        all_NC = ranks.gather(select_topk(pre_NL, k)[0], dim=1)
        return select_topk(all_NC, k)[0].sort(dim=1, descending=True).values

    return choose


def dtensor(ranks: Ranks) -> Choice:
    """`torch.topk` of a DTensor."""
    mesh = init_device_mesh("cpu", (ranks.world,))

    def choose(pre_NL: torch.Tensor, k: int) -> torch.Tensor:
        whole_NF = DTensor.from_local(pre_NL, mesh, [Shard(1)], run_check=False)
        values_NK: Any = torch.topk(whole_NF, k, dim=1).values
        return values_NK.full_tensor()

    return choose


def counted(choose: Choice, pre_NL: torch.Tensor, k: int) -> dict[str, Any]:
    """The collectives of one call, by name, and what they fill."""
    with Counted() as mode:
        choose(pre_NL, k)
    return {"collectives": mode.get_total_counts(), "bytes": mode.bytes}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 512), ("latents", 4096), ("k", 32), ("rounds", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torchrun_ranks(torch.device("cpu")) as ranks:
        generator = torch.Generator().manual_seed(0)
        pre_NF = torch.randn(given.rows, given.latents, generator=generator)
        pre_NL = pre_NF.chunk(ranks.world, dim=1)[ranks.rank].contiguous()
        sides = {"ours": ours(ranks), "dtensor": dtensor(ranks)}
        found = {name: counted(choose, pre_NL, given.k) for name, choose in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, choose in sides.items():
                distributed.barrier()
                started = time.perf_counter()
                values_NK = choose(pre_NL, given.k)
                seconds[name].append(time.perf_counter() - started)
                assert torch.equal(values_NK, pre_NF.topk(given.k, dim=1).values), name
        for name, times in seconds.items():
            found[name] |= {"ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times)}
        if ranks.first:
            print(json.dumps(found), flush=True)
        ranks.meet()
        os._exit(0)  # DTensor keeps the group, and a thread of gloo that still holds a tensor as Python ends aborts it


if __name__ == "__main__":
    main()
