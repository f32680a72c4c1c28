"""Whether the Triton kernels can be had: looked at before they are chosen, since a compiler and a driver are behind them.

Importing this file needs no triton.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess

import numpy as np
import torch

from ..losses import LossSettings
from ..model import TopKSAE
from ..steppers import TorchStepper
from ..train_config import TrainConfig

MOST_DIMENSIONS = 8192  # a row is held in registers
ROWS, MOST_LATENTS = 64, 512  # of the trial step
TOLERANCE = 1e-4

_log = logging.getLogger(__name__)


@functools.cache
def trouble(d_in: int, num_latents: int, k: int, device: torch.device) -> str:
    """Why the kernels are not to be used for these sizes on this device; empty where they gave torch's results.

    On a CPU they run in Triton's interpreter only (TRITON_INTERPRET=1), and are not tried first: that takes minutes.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    from .kernels import interpreted

    if interpreted():
        return "" if device.type == "cpu" else "TRITON_INTERPRET=1 makes them run on a CPU"
    if device.type == "cpu":
        return "on a CPU they need Triton's interpreter, TRITON_INTERPRET=1"
    why = trial(d_in, num_latents, k, device)
    if why:
        _log.warning("training without Triton kernels, which is slower: %s", why)
    return why


def trial(d_in: int, num_latents: int, k: int, device: torch.device) -> str:
    """Why top-k at this size, or a step on a few rows, fails or differs from torch's; empty: they agree."""
    try:
        from triton.errors import TritonError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"this triton is too old or broken: {error}"
    try:
        return _differences(d_in, num_latents, k, device)
    # RuntimeError: the driver, or no C compiler for its stub; the next two: that compiler
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError, ImportError) as error:
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )


def _differences(d_in: int, num_latents: int, k: int, device: torch.device) -> str:
    from .kernels import topk
    from .stepper import TritonStepper

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        pre_NF = torch.randn(8, num_latents, generator=generator).to(device, dtype)
        found_NK = pre_NF.gather(1, topk(pre_NF, k).long()).sort(dim=1, descending=True).values
        if not torch.equal(found_NK, pre_NF.topk(k).values):
            return f"top-k of {dtype} differs from torch's"
    latents = min(num_latents, max(4 * k, MOST_LATENTS))
    config = TrainConfig(num_latents=latents, k=k)
    settings = LossSettings(variance=float(d_in), auxk_k=max(1, d_in // 2), auxk_coef=1 / 32)
    u_ND = torch.randn(ROWS, d_in, generator=generator).to(device)
    dead_F = (torch.arange(latents) % 8 == 0).to(device)
    one, other = (_model(d_in, latents, k, device) for _ in range(2))
    TritonStepper(one, settings, config).step(u_ND, lr=1e-3, dead_F=dead_F)
    TorchStepper(other, settings, config).step(u_ND, lr=1e-3, dead_F=dead_F)
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if not bool((ours - theirs).norm() <= TOLERANCE * theirs.norm()):  # NaN too
            return f"{name} after a step differs from torch's"
    return ""


def _model(d_in: int, latents: int, k: int, device: torch.device) -> TopKSAE:
    generator = torch.Generator().manual_seed(1)
    model = TopKSAE(d_in=d_in, num_latents=latents, k=k, mean_D=np.ones(d_in), scale=1.0, generator=generator)
    return model.to(device)
