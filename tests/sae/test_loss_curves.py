"""Every fast kernel learns as fast as TopK written down once more: dense autograd in float32, torch's Adam, nothing of ours.

The reference shares the start, the batches and the unit of the rows with the trainer; equations, schedule and the
constraint on the decoder's rows are its own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from sae.trainer import TrainConfig, Trainer

from .toy import Toy

LATENTS, K, BATCH, LR, LOG_STEPS = 256, 4, 512, 3e-3, 20
WARMUP_STEPS, DECAY_SHARE, BETAS = 10, 0.3, (0.8, 0.999)
NAMES = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")
QUICK, WHOLE = 40_960, 409_600


def config(tokens: int, kernel: str, dtype: str) -> TrainConfig:
    return TrainConfig(
        num_latents=LATENTS, k=K, batch_tokens=BATCH, tokens=tokens, lr=LR, kernel=kernel, encoder_dtype=dtype,
        warmup_steps=WARMUP_STEPS, decay_share=DECAY_SHARE, betas=BETAS, auxk_coef=0.0, log_steps=LOG_STEPS,
        checkpoint_steps=0,
    )  # fmt: skip


def reconstructed(p: dict[str, Any], u_ND: torch.Tensor) -> torch.Tensor:
    pre_NF = torch.relu((u_ND - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"])
    kept = pre_NF.topk(K, dim=1)
    acts_NF = torch.zeros_like(pre_NF).scatter(1, kept.indices, kept.values)
    return acts_NF @ p["W_dec_FD"] + p["b_dec_D"]


@functools.cache
def reference(tokens: int) -> tuple[list[float], float]:
    """FVU of every LOG_STEPS steps' batches, and of 8,192 rows that were not trained on."""
    toy, statistics = Toy(batch=BATCH), Toy().statistics()
    start = Trainer(config(tokens, "torch", "float32"), toy, **statistics, folder="unused").model
    p: dict[str, Any] = {name: getattr(start, name).detach().clone().requires_grad_() for name in NAMES}
    scale, mean_D = float(start.scale), torch.from_numpy(statistics["mean_D"])
    adam = torch.optim.Adam(p.values(), lr=LR, betas=BETAS)
    curve, error, scatter, steps = [], 0.0, 0.0, tokens // BATCH
    for step in range(steps):
        x_ND = torch.from_numpy(toy.next())
        loss = (x_ND / scale - reconstructed(p, x_ND / scale)).pow(2).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        rows_FD = p["W_dec_FD"]
        with torch.no_grad():
            rows_FD.grad -= (rows_FD.grad * rows_FD).sum(1, keepdim=True) * rows_FD
            warm, decay = (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps)
            adam.param_groups[0]["lr"] = LR * min(1.0, warm) * min(1.0, decay)
            adam.step()
            rows_FD /= rows_FD.norm(dim=1, keepdim=True)
        error += float(loss.detach()) * BATCH * scale**2
        scatter += float((x_ND - mean_D).pow(2).sum())
        if (step + 1) % LOG_STEPS == 0:
            curve.append(error / scatter)
            error = scatter = 0.0
    with torch.no_grad():
        held_ND = torch.from_numpy(held_out())
        return curve, fvu(held_ND.numpy(), (scale * reconstructed(p, held_ND / scale)).numpy())


def held_out() -> np.ndarray:
    return Toy().rows(8192, 777)


def fvu(x_ND: np.ndarray, x_hat_ND: np.ndarray) -> float:
    x_ND = x_ND.astype(np.float64)
    return float(((x_ND - x_hat_ND) ** 2).sum() / ((x_ND - x_ND.mean(0)) ** 2).sum())


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [("float32", WHOLE), ("bfloat16", QUICK), pytest.param("bfloat16", WHOLE, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_the_loss_curve_of_a_fast_kernel_is_that_of_plain_autograd(tmp_path, kernel, dtype, tokens):
    toy, rows = Toy(batch=BATCH), []
    trainer = Trainer(config(tokens, kernel, dtype), toy, **toy.statistics(), folder=tmp_path, log=rows.append)
    assert trainer.learner.stepper.name == kernel
    weights = trainer.fit()
    expected, expected_held_out = reference(tokens)
    found = [row["fvu"] for row in rows]
    np.testing.assert_allclose(found, expected, atol=0.005)
    x_ND = held_out().astype(np.float64)
    pre_NF = np.maximum((x_ND - weights.b_dec_D) @ weights.W_enc_FD.T.astype(np.float64) + weights.b_enc_F, 0)
    acts_NF = np.where(pre_NF >= np.sort(pre_NF, axis=1)[:, [-K]], pre_NF, 0)
    assert fvu(x_ND, acts_NF @ weights.W_dec_FD + weights.b_dec_D) == pytest.approx(expected_held_out, abs=0.005)
    assert found[-1] < (0.5 if tokens == WHOLE else 0.9) * found[0]
