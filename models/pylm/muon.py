"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised, in float32.

torch.optim.Muon iterates in bfloat16, which a CPU without bfloat16 arithmetic runs 50 times slower.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Muon write-up


def orthogonalised(g_BMN: Tensor, iterations: int = 5) -> Tensor:
    """U V^T of each matrix of a stack (B, M, N), approximately (singular values in about 0.7..1.2)."""
    a, b, c = COEFFICIENTS
    wide = g_BMN.shape[-2] <= g_BMN.shape[-1]
    x = g_BMN if wide else g_BMN.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """p <- p (1 - lr wd) - lr 0.2 sqrt(max(M, N)) orthogonalised(nesterov momentum): AdamW's step size."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(p.grad, buffer, group["momentum"]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)
