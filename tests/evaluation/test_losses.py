"""Cross entropy, KL and intervals against float64 oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.losses import (
    Reference,
    clustered_mean,
    cross_entropy,
    kl_divergence,
    log_normaliser,
    t_quantile_975,
)


def log_softmax64(logits_NV):
    z = logits_NV.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    a = (rng.normal(0, 4, (700, 1999)) + 30).astype(np.float32)
    return a, (a + rng.normal(0, 0.2, a.shape)).astype(np.float32)


def test_cross_entropy_equals_a_float64_log_softmax(logits):
    a, _ = logits
    targets = np.random.default_rng(1).integers(0, a.shape[1], len(a))
    expected = -log_softmax64(a)[np.arange(len(a)), targets]
    np.testing.assert_allclose(cross_entropy(a, log_normaliser(a), targets), expected, rtol=0, atol=2e-6)


def test_kl_equals_a_float64_sum_over_the_vocabulary(logits):
    a, b = logits
    log_a, log_b = log_softmax64(a), log_softmax64(b)
    expected = (np.exp(log_a) * (log_a - log_b)).sum(axis=1)
    ours = kl_divergence(Reference(logits_NV=a, log_z_N=log_normaliser(a)), b, log_normaliser(b))
    assert expected.min() > 1e-4
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_kl_of_equal_logits_is_exactly_zero(logits):
    a, _ = logits
    assert (kl_divergence(Reference(logits_NV=a, log_z_N=log_normaliser(a)), a, log_normaliser(a)) == 0).all()


def test_huge_and_infinite_logits_do_not_overflow():
    a = np.array([[1e30, 0.0, -np.inf], [80.0, 80.0, 80.0]], np.float32)
    np.testing.assert_allclose(log_normaliser(a), [1e30, 80 + math.log(3)], rtol=1e-7)


def test_the_interval_covers_the_true_mean_when_tokens_of_a_document_move_together():
    rng = np.random.default_rng(2)
    covered = naive_covered = 0
    for _ in range(400):
        sizes = rng.integers(5, 60, 30)
        cluster = np.repeat(np.arange(30), sizes)
        values = np.repeat(rng.normal(0, 1, 30), sizes) + rng.normal(0, 0.3, len(cluster))
        interval = clustered_mean(values, cluster)
        covered += interval.low < 0 < interval.high
        naive_covered += abs(values.mean()) < 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert 0.90 < covered / 400 < 0.985
    assert naive_covered / 400 < 0.6  # what ignoring the documents would have claimed


def test_the_interval_of_single_token_clusters_is_student_t():
    values = np.random.default_rng(3).normal(5, 2, 12)
    interval = clustered_mean(values, np.arange(12))
    half = 2.200985 * values.std(ddof=1) / math.sqrt(12)
    assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-4)


def test_one_cluster_or_no_token_gives_no_interval_instead_of_a_false_one():
    one = clustered_mean(np.array([1.0, 3.0]), np.zeros(2))
    assert one.mean == 2
    assert math.isnan(one.low)
    assert math.isnan(clustered_mean(np.empty(0), np.empty(0)).mean)


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (60, 2.0003), (1000, 1.9623)],
)
def test_t_quantiles_equal_the_printed_tables(df, expected):
    assert t_quantile_975(df) == pytest.approx(expected, rel=1.5e-3 if df == 3 else 2e-4)
