from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import ConfigError, ShapeError
from sae.metrics import (
    Moments,
    ReconstructionMetrics,
    density_histogram,
    mean_overlap,
    token_fvu,
    top_k_overlap,
)

D, F, K = 12, 20, 4


def split(rows=300, shift=50.0, seed=0):
    """Shifted, anisotropic rows, an imperfect and biased reconstruction, and made-up latents with unused slots."""
    rng = np.random.default_rng(seed)
    x_ND = (shift * rng.standard_normal(D) + rng.standard_normal((rows, D)) * np.geomspace(0.1, 30, D)).astype("f4")
    x_hat_ND = (0.9 * x_ND + rng.standard_normal((rows, D))).astype("f4")
    idx_NK = np.stack([rng.permutation(F - 3)[:K] for _ in range(rows)]).astype(np.int32)
    vals_NK = (rng.uniform(0.1, 2, (rows, K)) * (rng.random((rows, K)) < 0.7)).astype("f4")
    return x_ND, x_hat_ND, idx_NK, vals_NK


def oracle(x_ND, x_hat_ND, idx_NK, vals_NK):
    """Two passes, float64, over everything at once."""
    x, y = x_ND.astype(np.float64), x_hat_ND.astype(np.float64)
    error, norm, norm_hat = ((x - y) ** 2).sum(), np.sqrt((x**2).sum(1)), np.sqrt((y**2).sum(1))
    dense_NF = np.zeros((len(x), F))
    for row in range(len(x)):
        for latent, value in zip(idx_NK[row], vals_NK[row], strict=True):
            dense_NF[row, latent] += value
    return {
        "rows": len(x),
        "fvu": error / ((x - x.mean(0)) ** 2).sum(),
        "mse": ((x - y) ** 2).mean(),
        "cosine": np.mean((x * y).sum(1) / (norm * norm_hat)),
        "l2_ratio": np.mean(norm_hat / norm),
        "relative_reconstruction_bias": (y**2).sum() / (x * y).sum(),
        "l2_norm_in": norm.mean(),
        "l2_norm_out": norm_hat.mean(),
        "l0": (dense_NF > 0).sum(1).mean(),
        "l1": dense_NF.sum(1).mean(),
        "dead_share": (dense_NF.max(0) == 0).mean(),
        "dense_share": ((dense_NF > 0).mean(0) > 0.1).mean(),
        "density_F": (dense_NF > 0).mean(0),
    }


def streamed(arrays, cuts):
    metrics = ReconstructionMetrics(D, F)
    edges = [0, *sorted(cuts), len(arrays[0])]
    for start, stop in itertools.pairwise(edges):
        metrics.update(*(array[start:stop] for array in arrays))
    return metrics.result()


def assert_same(result, expected, rtol):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=rtol, atol=0, err_msg=name)


@pytest.mark.parametrize("shift", [0.0, 50.0, 3000.0])
def test_every_metric_equals_the_two_pass_oracle_on_shifted_anisotropic_data(shift):
    arrays = split(shift=shift)
    assert_same(streamed(arrays, [7, 100]), oracle(*arrays), rtol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=8))
def test_the_result_does_not_depend_on_how_the_rows_are_cut_into_batches(cuts):
    arrays = split()
    assert_same(streamed(arrays, cuts), streamed(arrays, []), rtol=1e-11)


def test_fvu_uses_the_mean_so_predicting_it_scores_one_and_a_perfect_copy_zero():
    x_ND, _, idx_NK, vals_NK = split()
    mean_ND = np.broadcast_to(x_ND.astype(np.float64).mean(0), x_ND.shape)
    assert streamed((x_ND, mean_ND, idx_NK, vals_NK), [11])["fvu"] == pytest.approx(1, rel=1e-12)
    assert streamed((x_ND, x_ND, idx_NK, vals_NK), [11])["fvu"] == 0


def test_token_fvu_averages_to_the_fvu_of_its_own_split():
    x_ND, x_hat_ND, *_ = arrays = split()
    variance = ((x_ND.astype(np.float64) - x_ND.astype(np.float64).mean(0)) ** 2).sum(1).mean()
    fvu_N = token_fvu(x_ND, x_hat_ND, variance)
    assert fvu_N.shape == (300,)
    assert fvu_N.mean() == pytest.approx(oracle(*arrays)["fvu"], rel=1e-12)


def test_moments_keep_their_digits_when_the_mean_is_a_million_times_the_spread():
    x_ND = 1e6 + np.random.default_rng(0).standard_normal((1000, 3))
    moments = Moments(3)
    for part in np.array_split(x_ND, 17):
        moments.update(part)
    assert moments.variance == pytest.approx(((x_ND - x_ND.mean(0)) ** 2).sum(1).mean(), rel=1e-8)


def test_zero_rows_neither_divide_by_zero_nor_count_as_aligned():
    x_ND = np.array([[0, 0], [3, 4], [1, 0]], np.float32)
    none = np.zeros((3, 1), np.int32), np.zeros((3, 1), np.float32)
    metrics = ReconstructionMetrics(2, 4)
    metrics.update(x_ND, np.array([[1, 0], [3, 4], [0, 0]], np.float32), *none)
    result = metrics.result()
    assert result["cosine"] == pytest.approx(1 / 3)
    assert result["l2_ratio"] == pytest.approx(1 / 2)
    assert result["dead_share"] == 1


def test_a_latent_on_exactly_a_tenth_of_the_rows_is_not_dense():
    x_ND, x_hat_ND, *_ = split(rows=20)
    idx_NK = np.tile(np.arange(3, dtype=np.int32), (20, 1))
    vals_NK = (np.arange(20)[:, None] < [1, 2, 3]).astype("f4")  # on 1, 2 and 3 rows of 20
    assert streamed((x_ND, x_hat_ND, idx_NK, vals_NK), [11])["dense_share"] == 1 / F


def test_the_histogram_counts_every_living_latent_once():
    density_F = np.array([0, 0, 1, 0.5, 0.1, 0.011, 3e-5])
    count_B, edges_B1, dead = density_histogram(density_F)
    assert (count_B.sum(), dead) == (5, 2)
    assert len(edges_B1) == len(count_B) + 1
    assert edges_B1[0] <= 3e-5
    assert edges_B1[-1] == 1
    assert density_histogram(np.zeros(3))[2] == 3


def test_arrays_that_do_not_belong_together_are_refused():
    x_ND, x_hat_ND, idx_NK, vals_NK = split()
    metrics = ReconstructionMetrics(D, F)
    with pytest.raises(ShapeError, match="reconstruction"):
        metrics.update(x_ND, x_hat_ND[:, :5], idx_NK, vals_NK)
    with pytest.raises(ShapeError, match="300 rows"):
        metrics.update(x_ND, x_hat_ND, idx_NK[:9], vals_NK[:9])
    with pytest.raises(ShapeError, match="below 20"):
        metrics.update(x_ND, x_hat_ND, idx_NK + 10, vals_NK)
    with pytest.raises(ShapeError, match="width 12"):
        Moments(D).update(x_ND[:, :3])
    with pytest.raises(ConfigError, match="at least two different rows"):
        ReconstructionMetrics(D, F).result()
    with pytest.raises(ConfigError, match="above zero"):
        token_fvu(x_ND, x_hat_ND, 0.0)


def test_top_k_overlap_is_that_of_sets_and_rows_without_latents_do_not_count():
    rng = np.random.default_rng(0)
    codes = []
    for width in (5, 9):  # "threshold" pads each result to its own widest row
        idx_NK = np.array([rng.permutation(40)[:width] for _ in range(300)], np.int32)
        vals_NK = np.maximum(rng.standard_normal((300, width)), 0).astype(np.float32)
        idx_NK[vals_NK == 0] = 0  # an unused slot names latent 0
        vals_NK[:4] = 0
        codes.append((idx_NK, vals_NK))
    sets = [[{int(i) for i, v in zip(*row, strict=True) if v > 0} for row in zip(*code, strict=True)] for code in codes]
    wanted = [len(a & b) / max(len(a), len(b)) if a or b else np.nan for a, b in zip(*sets, strict=True)]
    found = top_k_overlap(*codes)
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(found[:4]).all()
    assert mean_overlap(found) == pytest.approx(np.nanmean(wanted), rel=1e-12)
    assert mean_overlap(found[:4]) == 1.0
    assert np.nanmin(top_k_overlap(codes[0], codes[0])) == 1
    with pytest.raises(ShapeError, match="300 and 299 rows"):
        top_k_overlap(codes[0], (codes[1][0][1:], codes[1][1][1:]))
