"""The CUDA side of `bench.train`: our step in Triton and in torch beside sparsify's fused one, on one GPU in turns.

sparsify's coder runs its forward in bfloat16 there by itself, with its fused encoder and its Triton decoder; ours takes the
encoder's product in bfloat16 and chooses by float32 values. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.common import Row, compare
from bench.train_cases import Peer, Say, Settings, Shape, Turns, add_peers, ours_worker, start_peers

SHAPE = Shape(d_in=2048, num_latents=32768, k=64, batch=8192)
GOAL_TOKENS_PER_S = 1e6
KERNELS = ("triton", "torch")
PEER = Peer(library="sparsify", name="adam-autocast-bf16", options={"optimizer": "adam"})


def device_name() -> str:
    """What torch calls its GPU; "" where it has none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def torch_build() -> str:
    import torch

    return torch.__version__


def rows(
    shape: Shape,
    settings: Settings,
    say: Say,
    *,
    with_peers: bool,
    kernels: Sequence[str] = KERNELS,
    device: str = "cuda",
) -> Iterator[Row]:
    """tokens/s against sparsify and the goal, and peak memory of the device against sparsify."""
    settings = replace(settings, device=device)
    with Turns(shape, settings, say) as turns:
        for kernel in kernels:
            turns.add(kernel, ours_worker(settings.threads), "ours", {"kernel": kernel})
        started = start_peers(turns, (PEER,) if with_peers else (), settings)
        labels = [label for label, _ in add_peers(turns, started)]
        speeds = turns.speeds(f"_{device}")
        for kernel in kernels:
            case = f"{shape.name}_{device}_{kernel}"
            for label in labels:
                yield compare(case, label, "tokens/s", speeds[kernel], speeds[label])
            goal = [GOAL_TOKENS_PER_S] * len(speeds[kernel])
            target = 1.0 if kernel == "triton" else 0.0
            yield compare(case, "goal", "tokens/s", speeds[kernel], goal, target=target)
        peaks = {name: turns.workers[name].ask("memory")["bytes"] / 1e6 for name in (*kernels, *labels)}
    for kernel in kernels:
        for label in labels:
            ratio = peaks[label] / peaks[kernel]
            yield Row(
                case=f"{shape.name}_{device}_{kernel}_memory", peer=label, unit="MB peak", ours=peaks[kernel],
                theirs=peaks[label], ratio=ratio,
            )  # fmt: skip
