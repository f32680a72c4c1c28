"""Muon by its equations in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sae.optimizers import Muon
from sae.train_config import TrainConfig

from .variant_models import F, K, arrays, make

LR, MOMENTUM = 0.03, 0.9


def orthogonal(matrix):
    """Five rounds of x' = a x + (b x x^T + c (x x^T)^2) x (Jordan et al. 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def unit(rows_FD):
    return rows_FD / np.linalg.norm(rows_FD, axis=1, keepdims=True)


def test_muon_steps_along_the_orthogonal_factor_of_nesterovs_momentum():
    model = make("topk")
    config = replace(TrainConfig(num_latents=F, k=K), optimizer="muon", momentum=MOMENTUM)
    optimizer, rng = Muon(model, config), np.random.default_rng(0)
    p = arrays(model)
    m = {name: np.zeros_like(p[name]) for name in ("W_enc_FD", "W_dec_FD")}
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32)) * step
        grads = {name: parameter.grad.double().numpy().copy() for name, parameter in model.named_parameters()}
        grads["W_dec_FD"] -= (grads["W_dec_FD"] * p["W_dec_FD"]).sum(axis=1, keepdims=True) * p["W_dec_FD"]
        optimizer.update_(LR)
        for name in m:
            m[name] = MOMENTUM * m[name] + (1 - MOMENTUM) * grads[name]
            direction = orthogonal(((1 - MOMENTUM) * grads[name] + MOMENTUM * m[name]).T).T
            p[name] = p[name] - LR * 0.2 * np.sqrt(max(p[name].shape)) * direction
        p["W_dec_FD"] = unit(p["W_dec_FD"])
        for name in m:
            np.testing.assert_allclose(getattr(model, name).detach().numpy(), p[name], rtol=0, atol=2e-5)
