"""Statistics of sparse firings against plain loops over a dense matrix."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis.firings import collect_firings, latent_stats, of_latent, strongest_rows

ROWS, LATENTS, K = 300, 12, 3


@pytest.fixture
def searched():
    rng = np.random.default_rng(0)
    token_N = rng.choice([3, 3, 3, 5, 5, 9, 11, *range(20, 60)], ROWS).astype(np.int32)
    token_N[5::17] = np.arange(100, 100 + len(token_N[5::17]))  # once each
    window_N = np.repeat(np.arange(ROWS // 20), 20)
    dense_NF = np.zeros((ROWS, LATENTS), np.float32)
    for n in range(ROWS):
        for f in rng.choice(LATENTS - 2, K, replace=False):
            dense_NF[n, f] = rng.random() + 0.1
    dense_NF[:, 0] = np.where(token_N == 3, 2 + 0.1 * rng.random(ROWS), 0)  # says nothing but "token 3"
    dense_NF[:, LATENTS - 2] = np.where(window_N % 5 == 0, 1 + rng.random(ROWS), 0)  # says nothing of the token
    table = SimpleNamespace(token_N=token_N, window_N=window_N)
    idx = np.argsort(-dense_NF, axis=1)[:, : K + 2].astype(np.int32)
    vals = np.take_along_axis(dense_NF, idx, axis=1)
    parts = [(np.arange(a, a + 75), idx[a : a + 75], vals[a : a + 75]) for a in range(0, ROWS, 75)]
    return dense_NF, token_N, window_N, collect_firings(parts, table, LATENTS)


def test_firings_hold_exactly_the_positive_entries(searched):
    dense_NF, _, _, firings = searched
    rebuilt = np.zeros_like(dense_NF)
    rebuilt[firings.row_E, firings.latent_E] = firings.value_E
    np.testing.assert_array_equal(rebuilt, dense_NF)


def test_leave_one_out_r2_equals_the_loop_over_rows(searched):
    dense_NF, token_N, window_N, firings = searched
    r2_F = latent_stats(firings, window_N).token_r2_F
    for f in range(LATENTS - 1):
        a = dense_NF[:, f].astype(np.float64)
        prediction = np.empty(ROWS)
        for n in range(ROWS):
            same = (token_N == token_N[n]) & (np.arange(ROWS) != n)
            prediction[n] = a[same].mean() if same.any() else np.delete(a, n).mean()
        expected = 1 - ((a - prediction) ** 2).sum() / ((a - a.mean()) ** 2).sum()
        assert r2_F[f] == pytest.approx(expected, abs=1e-9)
    assert r2_F[0] > 0.99
    assert r2_F[LATENTS - 2] < 0.1
    assert np.isnan(r2_F[LATENTS - 1])  # never fires


def test_counts_maxima_breadth_and_top_tokens_equal_loops(searched):
    dense_NF, token_N, window_N, firings = searched
    stats = latent_stats(firings, window_N)
    np.testing.assert_array_equal(stats.count_F, (dense_NF > 0).sum(axis=0))
    np.testing.assert_array_equal(stats.max_F, dense_NF.max(axis=0))
    np.testing.assert_allclose(stats.mean_square_F, (dense_NF.astype(np.float64) ** 2).mean(axis=0))
    for f in range(LATENTS - 1):
        fires = dense_NF[:, f] > 0
        square_N = dense_NF[:, f].astype(np.float64) ** 2
        shares = np.array([square_N[window_N == w].sum() for w in range(ROWS // 20)]) / square_N.sum()
        assert stats.breadth_F[f] == pytest.approx(1 / (shares**2).sum())
        tokens, counts = np.unique(token_N[fires], return_counts=True)
        assert stats.top_token_F[f] == tokens[counts.argmax()]
        assert stats.top_share_F[f] == pytest.approx(counts.max() / fires.sum())
    assert stats.top_token_F[LATENTS - 1] == -1
    assert stats.breadth_F[LATENTS - 1] == 0
    assert stats.groups == ROWS // 20
    assert latent_stats(firings, 7 * window_N + 3).groups == ROWS // 20  # of documents that no row was searched of none


def test_strongest_rows_come_from_different_windows_strongest_first(searched):
    dense_NF, _, window_N, firings = searched
    rows, values = of_latent(firings, np.array([2, 4]))[4]
    np.testing.assert_array_equal(rows, np.flatnonzero(dense_NF[:, 4] > 0))
    np.testing.assert_array_equal(values, dense_NF[rows, 4])
    best = strongest_rows(rows, values, window_N, np.zeros(ROWS, int), 5)
    per_window = {w: dense_NF[window_N == w, 4].max() for w in set(window_N.tolist())}
    np.testing.assert_array_equal(dense_NF[best, 4], sorted(per_window.values(), reverse=True)[:5])
    assert len(set(window_N[best].tolist())) == 5


def test_documents_come_once_each_before_a_second_window_of_one(searched):
    dense_NF, _, window_N, firings = searched
    rows, values = of_latent(firings, np.array([4]))[4]
    document_N = window_N // 5  # three documents of five windows
    best = strongest_rows(rows, values, window_N, document_N, 3)
    expected = sorted((dense_NF[document_N == d, 4].max() for d in range(3)), reverse=True)
    np.testing.assert_array_equal(dense_NF[best, 4], expected)
    more = strongest_rows(rows, values, window_N, document_N, 7)
    assert set(best.tolist()) <= set(more.tolist())
    assert len(set(window_N[more].tolist())) == 7
    assert (np.diff(dense_NF[more, 4]) <= 0).all()


def test_of_equal_firings_the_earlier_row_comes_first():
    rows, values = np.array([2, 5, 9, 14]), np.array([1.0, 3.0, 3.0, 3.0], np.float32)
    best = strongest_rows(rows, values, np.arange(20) // 4, np.zeros(20, int), 4)
    np.testing.assert_array_equal(best, [5, 9, 14, 2])
