"""Small SAEs of every variant, moved away from their start, and their losses as the papers write them, in numpy."""

from __future__ import annotations

import numpy as np
import torch

from sae.losses import LossSettings
from sae.options import SAEOptions
from sae.variants import VARIANTS

D, F, K, N = 24, 192, 6, 160
V = 40.0  # v of LossSettings
AUXK = 10
# wide enough for the straight-through kernel to see some pre-activations of a small batch
OPTIONS = {
    "jumprelu": {"bandwidth": 0.5, "threshold_start": 0.8, "l0_coef": 0.01},  # thresholds of about 1
    "relu": {"decoder_rows": "free", "l1_coef": 5.0},
    "gated": {"l1_coef": 5.0},
}


def make(name, *, seed=0, scale=4.0, k=K, **options):
    """An SAE with nothing zero, tied or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    extra = {"deviation": V**0.5} if name == "jumprelu" else {}
    model = VARIANTS[name](
        d_in=D, num_latents=F, k=k, mean_D=np.random.default_rng(seed).standard_normal(D), scale=scale,
        generator=generator, options=SAEOptions(**OPTIONS.get(name, {}) | options), **extra,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is not model.W_dec_FD and parameter is not model.b_dec_D:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if not model.unit_rows:
            model.W_dec_FD *= 0.5 + torch.rand(F, 1, generator=generator)
    return model


def batch(seed=0, rows=N):
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, D)) * np.geomspace(0.3, 3, D) + 0.5).astype(np.float32))


def loss_settings(**extra):
    return LossSettings(variance=V, auxk_k=AUXK, auxk_coef=1 / 32, **extra)


def mask(count):
    """`count` of the latents, spread out, are dead."""
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.randperm(F, generator=torch.Generator().manual_seed(1))[:count]] = True
    return dead_F


def arrays(model):
    return {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---- the losses, one function each: p (parameters), u_ND -> sum over rows / N ----


def relu(x):
    return np.maximum(x, 0)


def pre_acts(p, u_ND):
    return (u_ND - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"]


def squared(p, u_ND, acts_NF):
    return ((u_ND - acts_NF @ p["W_dec_FD"] - p["b_dec_D"]) ** 2).sum() / len(u_ND)


def row_topk(ranked_NF, k):
    """Mask of the k largest of each row."""
    chosen_NF = np.zeros(ranked_NF.shape, bool)
    np.put_along_axis(chosen_NF, np.argsort(-ranked_NF, axis=1, kind="stable")[:, :k], True, axis=1)
    return chosen_NF


def batch_topk(ranked_NF, k):
    """Mask of the k N largest of the batch."""
    flat = ranked_NF.ravel()
    chosen = np.zeros(flat.shape, bool)
    chosen[np.argsort(-flat, kind="stable")[: k * len(ranked_NF)]] = True
    return chosen.reshape(ranked_NF.shape)


def norms(p):
    return np.linalg.norm(p["W_dec_FD"], axis=1)


def topk_loss(p, u_ND, **_):
    pre_NF = pre_acts(p, u_ND)
    return squared(p, u_ND, relu(pre_NF) * row_topk(pre_NF, K))


def topk_free_loss(p, u_ND, **_):
    pre_NF = pre_acts(p, u_ND)
    return squared(p, u_ND, relu(pre_NF) * row_topk(pre_NF * norms(p), K))


def multi_topk_loss(p, u_ND, **_):
    pre_NF = pre_acts(p, u_ND)
    return topk_loss(p, u_ND) + squared(p, u_ND, relu(pre_NF) * row_topk(pre_NF, 4 * K)) / 8


def batchtopk_loss(p, u_ND, **_):
    acts_NF = relu(pre_acts(p, u_ND))
    return squared(p, u_ND, acts_NF * batch_topk(acts_NF, K))


def batchtopk_free_loss(p, u_ND, **_):
    acts_NF = relu(pre_acts(p, u_ND))
    return squared(p, u_ND, acts_NF * batch_topk(acts_NF * norms(p), K))


def matryoshka_loss(p, u_ND, **_):
    acts_NF = relu(pre_acts(p, u_ND))
    acts_NF = acts_NF * batch_topk(acts_NF, K)
    return np.mean([squared(p, u_ND, acts_NF * (np.arange(F) < size)) for size in (12, 24, 48, 96, 192)])


def groupmax_loss(p, u_ND, **_):
    pre_NF = pre_acts(p, u_ND)
    chosen_NF = np.concatenate([row_topk(part, 1) for part in np.split(pre_NF, K, axis=1)], axis=1)
    return squared(p, u_ND, relu(pre_NF) * chosen_NF)


def jumprelu_loss(p, u_ND, **_):
    pre_NF = pre_acts(p, u_ND)
    fires_NF = pre_NF > np.exp(p["log_theta_F"])
    return squared(p, u_ND, pre_NF * fires_NF) + 0.01 * V * fires_NF.sum() / len(u_ND)


def relu_loss(p, u_ND, **_):
    acts_NF = relu(pre_acts(p, u_ND))
    return squared(p, u_ND, acts_NF) + 5 * (V / D) ** 0.5 * (acts_NF * norms(p)).sum() / len(u_ND)


def gated_loss(p, u_ND, frozen, **_):
    """`frozen`: the parameters whose W_dec and b_dec the auxiliary reconstruction holds."""
    gate_NF = pre_acts(p, u_ND)
    mag_NF = np.exp(p["r_F"]) * ((u_ND - p["b_dec_D"]) @ p["W_enc_FD"].T) + p["b_mag_F"]
    aux_ND = u_ND - relu(gate_NF) @ frozen["W_dec_FD"] - frozen["b_dec_D"]
    aux = (aux_ND**2).sum() / len(u_ND)
    sparsity = 5 * (V / D) ** 0.5 * relu(gate_NF).sum() / len(u_ND)
    return squared(p, u_ND, (gate_NF > 0) * relu(mag_NF)) + sparsity + aux


LOSSES = {
    "topk": ({}, topk_loss),
    "topk free": ({"decoder_rows": "free"}, topk_free_loss),
    "topk multi": ({"multi_k": 4 * K}, multi_topk_loss),
    "batchtopk": ({}, batchtopk_loss),
    "batchtopk free": ({"decoder_rows": "free"}, batchtopk_free_loss),
    "matryoshka": ({}, matryoshka_loss),
    "groupmax": ({}, groupmax_loss),
    "jumprelu": ({}, jumprelu_loss),
    "relu": ({}, relu_loss),
    "gated": ({}, gated_loss),
}
