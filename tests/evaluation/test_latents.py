"""Per-latent columns of an SAE at one hook point against float64 arrays that hold everything densely."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.latents import dictionary_summary, latent_columns, searched_latents
from sae.latent_statistics import LatentStatistics
from tests.sae.toy import random_weights

N, D, F, K = 200, 8, 40, 4


@pytest.fixture
def sae():
    """Weights, statistics of made-up rows, their scatter."""
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=D, latents=F, k=K)
    x_ND, noise_ND = rng.standard_normal((2, N, D)).astype(np.float32)
    idx_NK = np.stack([rng.permutation(F)[:K] for _ in range(N)]).astype(np.int32)
    statistics = LatentStatistics(w.W_dec_FD)
    statistics.update(x_ND, x_ND + noise_ND, idx_NK, rng.random((N, K), np.float32))
    return w, statistics, float(((x_ND - x_ND.mean(axis=0)) ** 2).sum())


def cosines(W_FD):
    unit = W_FD.astype(np.float64) / np.linalg.norm(W_FD.astype(np.float64), axis=1, keepdims=True)
    table = unit @ unit.T
    np.fill_diagonal(table, -np.inf)
    return table


def test_both_matrices_have_their_own_neighbours_and_norms(sae):
    w, statistics, scatter = sae
    columns = latent_columns(w, statistics, scatter, searched=0, seed=0)
    for name, W_FD in (("decoder", w.W_dec_FD), ("encoder", w.W_enc_FD)):
        np.testing.assert_allclose(columns[f"{name}_nearest"], cosines(W_FD).max(axis=1), atol=1e-6)
        np.testing.assert_array_equal(columns[f"{name}_nearest_latent"], cosines(W_FD).argmax(axis=1))
        np.testing.assert_allclose(columns[f"{name}_norm"], np.linalg.norm(W_FD, axis=1), rtol=1e-6)
    dot_F = (w.W_enc_FD.astype(np.float64) * w.W_dec_FD).sum(axis=1)
    norms_F = np.linalg.norm(w.W_enc_FD, axis=1) * np.linalg.norm(w.W_dec_FD, axis=1)
    np.testing.assert_allclose(columns["encoder_decoder_cosine"], dot_F / norms_F, atol=1e-6)
    np.testing.assert_array_equal(columns["encoder_bias"], w.b_enc_F)
    for name, column in statistics.result(scatter).items():
        np.testing.assert_array_equal(columns[name], column)


def test_a_search_of_some_latents_finds_the_same_neighbours_among_all_and_the_same_latents_again(sae):
    w, statistics, scatter = sae
    whole = latent_columns(w, statistics, scatter, searched=0, seed=0)
    some, again, other = (latent_columns(w, statistics, scatter, searched=15, seed=seed) for seed in (3, 3, 4))
    known_F = some["decoder_nearest_latent"] >= 0
    assert known_F.sum() == 15
    np.testing.assert_array_equal(some["decoder_nearest"][known_F], whole["decoder_nearest"][known_F])
    assert np.isnan(some["decoder_nearest"][~known_F]).all()
    for name in some:
        np.testing.assert_array_equal(some[name], again[name])
    assert not np.array_equal(known_F, other["decoder_nearest_latent"] >= 0)
    summary = dictionary_summary(some)
    assert (summary["searched"], dictionary_summary(whole)["searched"]) == (15, F)
    assert summary["decoder_nearest"]["mean"] == pytest.approx(np.nanmean(some["decoder_nearest"]), rel=1e-6)
    assert sum(summary["encoder_decoder_cosine"]["counts"]) == F


@pytest.mark.parametrize("searched", [0, 40, 41])
def test_without_a_limit_or_with_one_of_all_latents_every_one_is_searched(searched):
    np.testing.assert_array_equal(searched_latents(F, searched, 0), np.arange(F))
