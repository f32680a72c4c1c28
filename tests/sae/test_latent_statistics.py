"""Statistics of single latents and the geometry of dictionaries against float64 oracles that build everything densely."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from sae import latent_statistics
from sae.dictionary import nearest, row_cosines, unit_rows
from sae.errors import ConfigError, ShapeError
from sae.latent_statistics import LatentStatistics

N, D, F, K = 400, 12, 30, 5


@pytest.fixture
def arrays():
    """Latents of very different frequency, the last five silent, and a reconstruction that is theirs."""
    rng = np.random.default_rng(0)
    W_dec_FD = rng.standard_normal((F, D)).astype("f4")
    p_F = np.geomspace(1, 0.001, F - 5)
    idx_NK = np.stack([rng.choice(F - 5, K, replace=False, p=p_F / p_F.sum()) for _ in range(N)]).astype(np.int32)
    vals_NK = (rng.uniform(0.1, 2, (N, K)) * (rng.random((N, K)) < 0.7)).astype("f4")
    a_NF = np.zeros((N, F))
    np.put_along_axis(a_NF, idx_NK, vals_NK, axis=1)
    x_hat_ND = (a_NF @ W_dec_FD + 40).astype("f4")
    x_ND = (x_hat_ND + rng.standard_normal((N, D)) * np.geomspace(0.1, 1, D)).astype("f4")
    return W_dec_FD, a_NF, (x_ND, x_hat_ND, idx_NK, vals_NK)


def scatter_of(x_ND):
    return ((x_ND.astype(np.float64) - x_ND.mean(axis=0, dtype=np.float64)) ** 2).sum()


@pytest.mark.parametrize("block_bytes", [1, 4 * D * 7, 4 << 20])
def test_every_column_equals_the_dense_float64_oracle_in_blocks_of_any_size(arrays, monkeypatch, block_bytes):
    monkeypatch.setattr(latent_statistics, "BLOCK_BYTES", block_bytes)
    W_dec_FD, a_NF, (x_ND, x_hat_ND, idx_NK, vals_NK) = arrays
    statistics = LatentStatistics(W_dec_FD)
    for part in np.array_split(np.arange(N), 7):
        statistics.update(x_ND[part], x_hat_ND[part], idx_NK[part], vals_NK[part])
    result = statistics.result(scatter_of(x_ND))
    fires_NF = a_NF > 0
    on = fires_NF.sum(axis=0)
    np.testing.assert_array_equal(result["density"], fires_NF.mean(axis=0))
    assert ((result["density"] > 0) & (result["density"] < 0.01)).any()
    assert (result["density"] > 0.1).any()
    np.testing.assert_allclose(result["mean_on"], a_NF.sum(axis=0) / np.maximum(on, 1), rtol=1e-12)
    np.testing.assert_allclose(result["max"], a_NF.max(axis=0), rtol=0)
    assert (result["density"][-5:] == 0).all()
    assert (result["mean_on"][-5:] == 0).all()
    x, x_hat = x_ND.astype(np.float64), x_hat_ND.astype(np.float64)
    fvu = ((x - x_hat) ** 2).sum() / scatter_of(x_ND)
    for latent in range(F):
        without = x_hat - np.outer(a_NF[:, latent], W_dec_FD[latent].astype(np.float64))
        rise = ((x - without) ** 2).sum() / scatter_of(x_ND) - fvu
        assert result["explained"][latent] == pytest.approx(rise, rel=1e-4, abs=1e-9)
    assert result["explained"].max() > 0.05


def test_with_layer_norm_a_latent_explains_in_units_of_each_rows_sigma_but_fires_in_its_own(arrays):
    W_dec_FD, a_NF, (x_ND, _, idx_NK, vals_NK) = arrays
    sigma_N1 = np.random.default_rng(4).uniform(0.2, 5, (N, 1)).astype("f4")
    x_hat_ND = (sigma_N1 * (a_NF @ W_dec_FD) + 40).astype("f4")
    statistics = LatentStatistics(W_dec_FD)
    for part in np.array_split(np.arange(N), 7):
        statistics.update(x_ND[part], x_hat_ND[part], idx_NK[part], vals_NK[part], sigma_N1[part])
    result, scatter = statistics.result(scatter_of(x_ND)), scatter_of(x_ND)
    x, x_hat = x_ND.astype(np.float64), x_hat_ND.astype(np.float64)
    for latent in range(F):
        without = x_hat - sigma_N1 * np.outer(a_NF[:, latent], W_dec_FD[latent].astype(np.float64))
        rise = (((x - without) ** 2).sum() - ((x - x_hat) ** 2).sum()) / scatter
        assert result["explained"][latent] == pytest.approx(rise, rel=1e-4, abs=1e-8)
    np.testing.assert_allclose(result["max"], a_NF.max(axis=0), rtol=0)
    on_F = np.maximum((a_NF > 0).sum(axis=0), 1)
    np.testing.assert_allclose(result["mean_on"], a_NF.sum(axis=0) / on_F, rtol=1e-12)


def test_rows_that_do_not_belong_together_and_no_rows_at_all_are_refused(arrays):
    W_dec_FD, _, (x_ND, x_hat_ND, idx_NK, vals_NK) = arrays
    statistics = LatentStatistics(W_dec_FD)
    with pytest.raises(ConfigError, match="rows that differ"):
        statistics.result(1.0)
    with pytest.raises(ShapeError, match="latents"):
        statistics.update(x_ND, x_hat_ND, idx_NK[:3], vals_NK[:3])
    with pytest.raises(ShapeError, match="width 11"):
        statistics.update(x_ND[:, :11], x_hat_ND[:, :11], idx_NK, vals_NK)


@pytest.mark.parametrize("block_bytes", [1, 4 * F * 7, 1 << 20])
def test_the_nearest_other_row_equals_the_whole_matrix_of_cosines_in_blocks_of_any_size(block_bytes):
    W_FD = np.random.default_rng(1).standard_normal((F, D)) * np.geomspace(0.01, 100, F)[:, None]
    unit = W_FD / np.linalg.norm(W_FD, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    cosine_F, index_F = nearest(W_FD.astype("f4"), block_bytes=block_bytes)
    np.testing.assert_array_equal(index_F, cosines.argmax(axis=1))
    np.testing.assert_allclose(cosine_F, cosines.max(axis=1), atol=1e-6)
    some_S = np.array([29, 3, 17])
    cosine_S, index_S = nearest(W_FD.astype("f4"), some_S, block_bytes=block_bytes)
    np.testing.assert_array_equal(index_S, index_F[some_S])
    np.testing.assert_allclose(cosine_S, cosine_F[some_S], atol=1e-6)


def test_neighbours_need_the_memory_of_a_block_and_not_of_the_matrix():
    W_FD = np.random.default_rng(3).standard_normal((4096, 8)).astype("f4")
    tracemalloc.start()
    try:
        nearest(W_FD, block_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # the matrix of cosines: 64 MB


def test_cosines_row_by_row_equal_float64_and_a_zero_row_has_none():
    rng = np.random.default_rng(2)
    A_FD, B_FD = rng.standard_normal((2, F, D)).astype("f4")
    A_FD[4] = 0
    expected = (A_FD.astype(float) * B_FD).sum(1) / np.maximum(
        np.linalg.norm(A_FD.astype(float), axis=1) * np.linalg.norm(B_FD.astype(float), axis=1), 1e-300
    )
    np.testing.assert_allclose(row_cosines(A_FD, B_FD), expected, atol=1e-12)
    assert row_cosines(A_FD, B_FD)[4] == 0
    assert (unit_rows(A_FD)[4] == 0).all()
    with pytest.raises(ShapeError, match="one shape"):
        row_cosines(A_FD, B_FD[:3])
    cosine_F, index_F = nearest(A_FD[:1])
    assert np.isnan(cosine_F[0])
    assert index_F[0] == -1


def test_a_row_and_its_near_copy_find_each_other():
    W_FD = np.eye(8, dtype="f4")
    W_FD[5] = W_FD[2] + 0.1 * W_FD[7]
    cosine_F, index_F = nearest(W_FD)
    assert (index_F[2], index_F[5]) == (5, 2)
    assert cosine_F[2] == pytest.approx(1 / np.sqrt(1.01), rel=1e-6)
