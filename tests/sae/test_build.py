"""From settings and statistics to the loss's numbers and the encoder's start, by hand."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from sae.export import mean_fired
from sae.initial import best_encoder_scale
from sae.options import SAEOptions
from sae.train_config import TrainConfig
from sae.variants.build import build, first_active

from . import test_wirings

D, F = 16, 64


def built(x_ND, variant="topk", auxk_k=0, **options):
    config = TrainConfig(
        num_latents=F, k=4, variant=variant, auxk_k=auxk_k, encoder_dtype="float32", options=SAEOptions(**options)
    )
    variance = float(((x_ND - x_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
    return build(
        config, width=D, mean_D=x_ND.mean(axis=0), variance=variance, generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"), sample_ND=x_ND,
    )  # fmt: skip


def rows():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, D)) * np.geomspace(1, 40, D) * rng.uniform(0.5, 2, (500, 1)) + 9).astype("f4")


def test_the_losss_variance_is_that_of_the_rows_as_they_are_reconstructed():
    x_ND = rows()
    model, settings = built(x_ND)
    assert settings.variance == pytest.approx(((x_ND / model.scale).var(axis=0)).sum(), rel=1e-5)
    _, settings = built(x_ND, input_norm="layer")
    n_ND = (x_ND - x_ND.mean(axis=1, keepdims=True)) / (x_ND.std(axis=1, keepdims=True) + 1e-5)
    assert settings.variance == pytest.approx(n_ND.var(axis=0).sum(), rel=1e-4)


@pytest.mark.parametrize("name", test_wirings.WIRINGS)
def test_auxk_takes_half_as_many_latents_as_columns_are_reconstructed(name):
    wiring, statistics = test_wirings.WIRINGS[name], test_wirings.Rows(test_wirings.WIRINGS[name]).statistics()
    for auxk_k, expected in ((0, (wiring.width - (wiring.d_in if wiring.two_sided else 0)) // 2), (5, 5)):
        _, settings = build(
            TrainConfig(num_latents=60, k=5, auxk_k=auxk_k), width=wiring.width, device=torch.device("cpu"),
            generator=torch.Generator(), **statistics,
        )  # fmt: skip
        assert settings.auxk_k == expected


@pytest.mark.parametrize("start", [0.5, 1.5])
def test_the_encoder_starts_for_as_many_latents_as_its_first_thresholds_let_fire(start):
    active = F * (1 - NormalDist().cdf(start))
    model, _ = built(rows(), "jumprelu", threshold_start=start)
    torch.testing.assert_close(model.W_enc_FD, model.W_dec_FD * (0.5 * best_encoder_scale(D, F, active)))
    for variant, expected in (("topk", 4), ("batchtopk", 4), ("relu", F / 2), ("gated", F / 2)):
        assert first_active(TrainConfig(num_latents=F, k=4, variant=variant)) == expected


def test_an_sae_without_a_k_of_its_own_is_of_as_many_latents_as_fired_on_average():
    model, _ = built(rows(), "relu")
    for total, expected in ((3.6, 4), (3.4, 3), (0.2, 1), (2.0 * F, F)):
        assert mean_fired(np.full(F, total / F), model) == expected
    assert mean_fired(None, model) == 4  # none were counted: the configured one
