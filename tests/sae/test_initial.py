"""The scale of the encoder when training starts, against least squares in float64 on data of different kinds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.initial import best_encoder_scale, share_above
from sae.trainer import TrainConfig, Trainer

from .toy import D, Toy

BASE = TrainConfig(num_latents=256, k=6, batch_tokens=512, tokens=40 * 512, lr=1e-3, warmup_steps=0, decay_share=0)


def fitted_scale(u_ND: np.ndarray, rows_FD: np.ndarray, k: int) -> float:
    """argmin_c sum ||u - c r||^2, r from the k rows with the largest <w, u>."""
    pre_NF = u_ND @ rows_FD.T
    idx_NK = np.argsort(-pre_NF, axis=1)[:, :k]
    r_ND = np.einsum("nk,nkd->nd", np.take_along_axis(pre_NF, idx_NK, 1), rows_FD[idx_NK])
    return float((u_ND * r_ND).sum() / (r_ND**2).sum())


def isotropic(rng, rows, d):
    return rng.standard_normal((rows, d))


def lopsided(rng, rows, d):
    """Most of the variance in a few directions, rows of very different lengths."""
    return rng.standard_normal((rows, d)) * np.arange(1, d + 1) ** -1.0 * rng.lognormal(0, 1, (rows, 1))


@pytest.mark.parametrize("data", [isotropic, lopsided])
@pytest.mark.parametrize(("d_in", "latents", "k"), [(128, 1024, 16), (256, 512, 32), (64, 64, 64)])
def test_the_scale_is_that_of_least_squares_whatever_the_data(data, d_in, latents, k):
    rng = np.random.default_rng(0)
    rows_FD = rng.standard_normal((latents, d_in))
    rows_FD /= np.linalg.norm(rows_FD, axis=1, keepdims=True)
    fitted = fitted_scale(data(rng, 400, d_in), rows_FD, k)
    assert fitted < 0.8  # 1 would overshoot: there is something to find
    assert best_encoder_scale(d_in, latents, k) == pytest.approx(fitted, rel=0.08)  # one dictionary of finite size


@pytest.mark.parametrize(("latents", "k"), [(4096, 32), (1024, 100), (64, 32), (64, 60)])
def test_the_scale_has_the_moments_of_the_largest_of_normal_numbers(latents, k):
    g = np.linspace(-12, 12, 2_000_001)
    density = np.exp(-(g**2) / 2) / np.sqrt(2 * np.pi)
    above = np.cumsum(density[::-1])[::-1] * (g[1] - g[0])  # P(> g)
    chosen = above <= k / latents
    m2, m4 = (np.average(g[chosen] ** power, weights=density[chosen]) for power in (2, 4))
    for d_in in (16, 512):
        expected = 1 / (1 + k * m2 / d_in - m4 / (m2 * d_in))
        assert best_encoder_scale(d_in, latents, k) == pytest.approx(expected, rel=1e-4)


def test_the_scale_of_nearly_all_latents_reaches_that_of_all():
    assert best_encoder_scale(16, 64, 64) == pytest.approx(best_encoder_scale(16, 64, 64 - 1e-7), rel=1e-5)


def test_as_many_latents_start_above_a_threshold_as_normal_numbers_do():
    drawn = np.random.default_rng(0).standard_normal(1_000_000)
    for z in (-0.7, 0.0, 1.5, 2.5):
        assert share_above(z) == pytest.approx((drawn > z).mean(), abs=2e-3)
    assert share_above(0.0) == 0.5


def trainer(tmp_path, **changed) -> Trainer:
    toy = Toy(batch=BASE.batch_tokens)
    return Trainer(dataclasses.replace(BASE, **changed), toy, **toy.statistics(), folder=tmp_path)


def test_training_starts_with_the_encoder_at_that_scale_or_at_the_one_given(tmp_path):
    for setting, expected in ((0.0, 0.5 * best_encoder_scale(D, 256, 6)), (0.25, 0.25)):
        model = trainer(tmp_path, init_scale=setting).model
        assert torch.equal(model.W_enc_FD, model.W_dec_FD * expected)
        norm_F = torch.linalg.vector_norm(model.W_dec_FD, dim=1)
        torch.testing.assert_close(norm_F, torch.ones_like(norm_F))


def test_the_scale_lowers_fvu_at_the_start_and_after_equal_tokens(tmp_path):
    fvus = {}
    for scale in (1.0, 0.0):
        lines: list[dict] = []
        toy = Toy(batch=BASE.batch_tokens)
        config = dataclasses.replace(BASE, init_scale=scale, log_steps=1)
        folder = tmp_path / str(scale)
        Trainer(config, toy, **toy.statistics(), folder=folder, log=lines.append).fit()
        fvus[scale] = [line["fvu"] for line in lines]
    assert fvus[0.0][0] < fvus[1.0][0] - 0.05
    assert fvus[0.0][-1] < fvus[1.0][-1]


def test_a_scale_below_zero_is_refused():
    with pytest.raises(ConfigError, match="init_scale must be 0 or more, got -1"):
        dataclasses.replace(BASE, init_scale=-1)
