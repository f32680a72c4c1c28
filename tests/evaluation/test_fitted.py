"""The baselines that are fitted on training rows, and the rows they are fitted on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.evaluation.fitted import PCA_ROWS, SAMPLE_ROWS, first_rows, fitted_baselines
from sae.errors import ModelMismatchError
from sae.runtime import decode, encode
from tests.sae.toy import random_weights

D, F, K = 12, 40, 5


def source(asked):
    """Chunks of rows whose variance changes from chunk to chunk, far from zero."""

    def rows(most):
        asked.append(most)
        rng = np.random.default_rng(0)
        return ((rng.standard_normal((900, D)) * np.geomspace(1, 1 + i, D) + 30).astype("f4") for i in range(7))

    return rows


def weights(k=K, **extra):
    return random_weights(np.random.default_rng(1), d=D, latents=F, k=k, **extra)


def test_rows_are_taken_until_there_are_as_many_as_asked_for_and_no_part_more():
    taken = []

    def parts():
        for start in range(0, 50, 10):
            taken.append(start)
            yield np.arange(start, start + 10)[:, None]

    found = np.concatenate(list(first_rows(parts(), 24)))
    np.testing.assert_array_equal(found[:, 0], np.arange(24))
    assert taken == [0, 10, 20]


def test_pca_has_k_components_of_all_rows_and_the_untrained_saes_scale_is_that_of_the_first():
    asked, w = [], weights()
    found = fitted_baselines(w, source(asked), seed=3)
    assert list(found) == ["pca", "untrained"]
    assert asked == [SAMPLE_ROWS, PCA_ROWS]
    x_ND = np.concatenate(list(source([])(0))).astype(np.float64)
    _, _, vt = np.linalg.svd(x_ND - x_ND.mean(axis=0), full_matrices=False)
    expected_ND = (x_ND - x_ND.mean(axis=0)) @ vt[:K].T @ vt[:K] + x_ND.mean(axis=0)
    np.testing.assert_allclose(found["pca"](x_ND.astype("f4")), expected_ND, atol=1e-3)
    untrained = found["untrained"].weights
    assert (untrained.num_latents, untrained.k, untrained.hook) == (F, K, w.hook)
    np.testing.assert_array_equal(untrained.b_dec_D, w.mean_D)
    tied = replace(untrained, W_enc_FD=untrained.W_dec_FD)
    sample_ND = x_ND[:SAMPLE_ROWS].astype("f4")
    r_ND = decode(tied, *encode(tied, sample_ND)).astype(np.float64) - w.mean_D
    factor = ((sample_ND - w.mean_D) * r_ND).sum() / (r_ND**2).sum()
    np.testing.assert_allclose(untrained.W_enc_FD, factor * untrained.W_dec_FD, rtol=1e-4)


def test_the_sae_of_a_random_model_stands_in_this_one_and_must_be_as_wide_and_of_its_k():
    w = weights(host={"name": "ours"})
    other = weights(host={"name": "random"})
    found = fitted_baselines(w, source([]), 0, other)["random_model"].weights
    assert found.host == {"name": "ours"}
    np.testing.assert_array_equal(found.W_enc_FD, other.W_enc_FD)
    thresholds = {"variant": "threshold", "threshold_F": np.zeros(F)}
    for mine, theirs in ((w, weights(k=9, **thresholds)), (weights(k=9, **thresholds), other)):
        assert "random_model" in fitted_baselines(mine, source([]), 0, theirs)  # there k is what came out
    for wrong in (weights(k=9), random_weights(np.random.default_rng(1), d=8, latents=F, k=K)):
        with pytest.raises(ModelMismatchError, match=f"expected width {D} and k={K}, got"):
            fitted_baselines(w, source([]), 0, wrong)
