"""Matching two dictionaries: permuted and noised copies, and every permutation tried where there are few."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tracemalloc

import numpy as np
import pytest

from pipeline.evaluation import stability
from pipeline.evaluation.optional import needed
from pipeline.evaluation.stability import match, seed_stability
from sae.errors import ConfigError, ShapeError
from sae.weights import SAEWeights

pytest.importorskip("scipy")
F, D = 96, 24


def sae(W_enc_FD, W_dec_FD, hook="blocks.1.hook_resid_post"):
    latents, width = W_dec_FD.shape
    return SAEWeights(
        W_enc_FD=W_enc_FD, W_dec_FD=W_dec_FD, b_enc_F=np.zeros(latents), b_dec_D=np.zeros(width), mean_D=np.zeros(width),
        variance=1.0, k=4, hook=hook,
    )  # fmt: skip


@pytest.fixture
def pair():
    """b is a, permuted and scaled, with noise that grows from latent to latent; the encoder of a quarter is another."""
    rng = np.random.default_rng(0)
    W_enc_FD, W_dec_FD = rng.standard_normal((2, F, D))
    noise_F1 = np.linspace(0, 2, F)[:, None]
    order = rng.permutation(F)
    other_dec = (W_dec_FD + noise_F1 * rng.standard_normal((F, D))) * rng.uniform(0.1, 9, (F, 1))
    other_enc = W_enc_FD + 0.1 * rng.standard_normal((F, D))
    other_enc[: F // 4] = rng.standard_normal((F // 4, D))
    return sae(W_enc_FD, W_dec_FD), sae(other_enc[order], other_dec[order]), np.argsort(order)


def cosines64(A_FD, B_FD):
    a, b = (M / np.linalg.norm(M, axis=1, keepdims=True) for M in (A_FD.astype(float), B_FD.astype(float)))
    return a @ b.T


def test_a_permuted_and_scaled_copy_is_found_whole():
    rng = np.random.default_rng(1)
    W_FD = rng.standard_normal((F, D)).astype("f4")
    order = rng.permutation(F)
    for matrix_bytes in (1 << 20, 1):
        partner_F, cosine_F, bound, exact = match(W_FD, 3 * W_FD[order], matrix_bytes=matrix_bytes)
        np.testing.assert_array_equal(partner_F, np.argsort(order))
        np.testing.assert_allclose(cosine_F, 1, atol=1e-6)
        assert bound == pytest.approx(1, abs=1e-6)
        assert exact == (matrix_bytes > 1)


def test_no_permutation_of_a_few_latents_has_a_larger_sum():
    rng = np.random.default_rng(2)
    for _ in range(5):
        A_FD, B_FD = rng.standard_normal((2, 6, 3)).astype("f4")
        table = cosines64(A_FD, B_FD)
        best = max(sum(table[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
        for matrix_bytes in (1 << 20, 1):  # with as many candidates as latents both are exact
            partner_F, cosine_F, *_ = match(A_FD, B_FD, matrix_bytes=matrix_bytes)
            assert cosine_F.sum() == pytest.approx(best, abs=1e-5)
            assert sorted(partner_F) == list(range(6))


def test_the_numbers_follow_from_the_matching_in_float64(pair):
    a, b, truth = pair
    result = seed_stability(a, b)
    for name in ("decoder", "encoder"):
        A_FD, B_FD = (getattr(w, f"W_{name[:3]}_FD") for w in (a, b))
        partner_F, *_ = match(A_FD, B_FD)
        table = cosines64(A_FD, B_FD)
        matched_F = table[np.arange(F), partner_F]
        assert result[name]["mean"] == pytest.approx(matched_F.mean(), abs=1e-6)
        assert result[name]["above_0.7"] == (matched_F > 0.7).mean()
        assert result[name]["above_0.9"] == (matched_F > 0.9).mean()
        assert result[name]["bound"] == pytest.approx(table.max(axis=1).mean(), abs=1e-6)
        assert result[name]["mean"] <= result[name]["bound"] + 1e-9
        assert result[name]["exact"]
        kept = matched_F > 0.9
        np.testing.assert_array_equal(partner_F[kept], truth[kept])  # what is alike is matched with its original
    assert 0 < result["shared"] <= min(result["decoder"]["above_0.7"], result["encoder"]["above_0.7"])
    assert result["shared"] <= 0.75  # a quarter has another encoder


def test_candidates_alone_give_nearly_the_matching_of_the_whole_matrix_and_never_a_better_one():
    rng = np.random.default_rng(3)
    A_FD = rng.standard_normal((700, 40)).astype("f4")
    B_FD = A_FD[rng.permutation(700)] + 0.8 * rng.standard_normal((700, 40)).astype("f4")
    B_FD[:300] = rng.standard_normal((300, 40))
    _, whole_F, *_ = match(A_FD, B_FD)
    partner_F, cosine_F, bound, exact = match(A_FD, B_FD, matrix_bytes=1, candidates=16)
    assert not exact
    assert sorted(partner_F) == list(range(700))
    assert whole_F.mean() - 5e-3 < cosine_F.mean() <= whole_F.mean() + 1e-9 < bound


def test_latents_whose_nearest_are_all_the_same_few_find_partners_among_those_they_are_nearest_to():
    rng = np.random.default_rng(0)
    A_FD = rng.standard_normal(12) + 0.5 * rng.standard_normal((60, 12))
    B_FD = A_FD + 0.6 * rng.standard_normal((60, 12))
    B_FD[:3] = A_FD.mean(axis=0)  # nearest to nearly all
    _, whole_F, *_ = match(A_FD.astype("f4"), B_FD.astype("f4"))
    _, cosine_F, *_ = match(A_FD.astype("f4"), B_FD.astype("f4"), matrix_bytes=1, candidates=2)
    assert whole_F.mean() - 0.03 < cosine_F.mean() <= whole_F.mean()


def test_only_latents_that_both_matchings_pair_alike_are_shared():
    W_enc_FD, W_dec_FD = np.random.default_rng(6).standard_normal((2, 8, 32))
    a, order = sae(W_enc_FD, W_dec_FD), np.r_[1, 0, 2:8]
    assert seed_stability(a, sae(W_enc_FD[order], W_dec_FD[order]))["shared"] == 1
    crossed = seed_stability(a, sae(W_enc_FD, W_dec_FD[order]))
    assert (crossed["decoder"]["above_0.9"], crossed["encoder"]["above_0.9"]) == (1, 1)
    assert crossed["shared"] == 6 / 8


def test_beyond_the_limit_of_the_matrix_the_memory_is_that_of_the_blocks_and_candidates(monkeypatch):
    monkeypatch.setattr(stability, "BLOCK_BYTES", 1 << 20)
    A_FD, B_FD = np.random.default_rng(5).standard_normal((2, 3000, 16)).astype("f4")
    tracemalloc.start()
    try:
        match(A_FD, B_FD, matrix_bytes=1, candidates=8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20  # the matrix alone: 36 MB of float32, 72 MB of float64


def test_latents_that_have_no_candidate_left_are_still_paired():
    rng = np.random.default_rng(4)
    A_FD = np.tile(rng.standard_normal(8), (50, 1)) + 1e-3 * rng.standard_normal((50, 8))
    B_FD = rng.standard_normal((50, 8))
    partner_F, *_ = match(A_FD.astype("f4"), B_FD.astype("f4"), matrix_bytes=1, candidates=2)
    assert sorted(partner_F) == list(range(50))


def test_an_sae_of_another_hook_or_width_is_refused(pair):
    a, b, _ = pair
    with pytest.raises(ConfigError, match=r"expected an SAE of blocks\.1\.hook_resid_post"):
        seed_stability(a, dataclasses.replace(b, hook="blocks.2.hook_resid_post"))
    with pytest.raises(ShapeError, match="expected 96 latents of width 24, got 90 of 24"):
        seed_stability(a, sae(b.W_enc_FD[:90], b.W_dec_FD[:90]))


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(
        ConfigError, match=r"evaluate.probe needs the package scikit-learn: pip install 'ggscope\[eval\]'"
    ):
        needed("sklearn.linear_model", "evaluate.probe")
