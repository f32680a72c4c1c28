"""Cross entropy, KL and intervals against float64 oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.losses import (
    Reference,
    clustered_mean,
    clustered_ratio,
    cross_entropy,
    kl_divergence,
    log_normaliser,
    t_quantile_975,
)
from pipeline.evaluation.measure import quality, run_losses
from pipeline.evaluation.splice import CLEAN, SpliceResult
from sae.metrics import ReconstructionMetrics


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


def losses_of(rng, documents):
    """A splice with documents of unequal length and cost: zero ablation costs about 4 nats, the SAE about 0.2."""
    sizes = rng.integers(20, 200, documents)
    document_N = np.repeat(np.arange(documents), sizes)

    def per_token(level, of_documents, of_tokens):
        return np.repeat(rng.normal(level, of_documents, documents), sizes) + rng.normal(0, of_tokens, len(document_N))

    clean_N = per_token(3, 0.3, 1.0)
    cost_N = per_token(4, 1.0, 1.0)
    ce = {CLEAN: clean_N, "zero": clean_N + cost_N, "mean": clean_N + 0.5 * cost_N}
    ce["sae"] = clean_N + 0.02 * cost_N + per_token(0.12, 0.1, 0.3)
    ce["joint"] = clean_N + 0.1 * cost_N + per_token(0.3, 0.2, 0.3)
    ce["joint_zero"] = clean_N + 2 * cost_N
    kl = {name: np.abs(values - clean_N) for name, values in ce.items()}
    return SpliceResult(
        ce=ce, kl=kl, document_N=document_N, window_N=document_N, rows=len(document_N), flagged_rows=0
    )  # fmt: skip


RUNS = {
    "sae": ("sae", {}, "ce_recovered", "zero"),
    "sae against the mean": ("sae", {}, "ce_recovered_mean", "mean"),
    "several together": ("joint", {"zero": "joint_zero"}, "ce_recovered", "joint_zero"),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_interval_of_ce_recovered_is_that_of_a_bootstrap_over_documents(case):
    name, of, key, ablation = RUNS[case]
    rng = np.random.default_rng(4)
    losses = losses_of(rng, 150)
    found = run_losses(losses, name, losses.document_N, **of)
    over, under = (
        np.array([(losses.ce[ablation] - losses.ce[run])[losses.document_N == d].sum() for d in range(150)])
        for run in (name, CLEAN)
    )
    assert found[key] == pytest.approx(over.sum() / under.sum(), rel=1e-12)
    drawn = rng.integers(0, 150, (20_000, 150))
    ratios = over[drawn].sum(axis=1) / under[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    (found_low, found_high), width = found[f"{key}_ci95"], high - low
    assert found_high - found_low == pytest.approx(width, rel=0.05)
    assert found_low == pytest.approx(low, abs=0.05 * width)
    assert found_high == pytest.approx(high, abs=0.05 * width)


def test_the_interval_of_ce_recovered_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    expected = 1 - (0.02 * 4 + 0.12) / 4  # of the expectations
    covered = naive_covered = 0
    for _ in range(400):
        losses = losses_of(rng, 30)
        low, high = run_losses(losses, "sae", losses.document_N)["ce_recovered_ci95"]
        covered += low < expected < high
        each = np.arange(len(losses.document_N))
        low, high = run_losses(losses, "sae", each)["ce_recovered_ci95"]
        naive_covered += low < expected < high
    assert 0.91 < covered / 400 < 0.98
    assert naive_covered / 400 < 0.6  # what ignoring the documents would have claimed


def test_ce_recovered_without_a_scale_has_no_interval_and_ablation_itself_recovers_exactly_nothing():
    losses = losses_of(np.random.default_rng(6), 20)
    found = run_losses(losses, "zero", losses.document_N)
    assert (found["ce_recovered"], found["ce_recovered_ci95"]) == (0, [0, 0])
    losses.ce["zero"] = losses.ce[CLEAN] - 0.1  # the model does better on zeros
    found = run_losses(losses, "sae", losses.document_N)
    assert all(math.isnan(value) for value in (found["ce_recovered"], *found["ce_recovered_ci95"]))
    losses.ce["zero"] = losses.ce[CLEAN].copy()  # as where nothing reads the hook point
    found = run_losses(losses, "sae", losses.document_N)
    assert all(math.isnan(value) for value in (found["ce_recovered"], *found["ce_recovered_ci95"]))
    one = clustered_ratio(np.array([1.0, 2.0]), np.array([2.0, 4.0]), np.zeros(2))
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(clustered_ratio(np.empty(0), np.empty(0), np.empty(0)).mean)
    assert math.isnan(clustered_ratio(np.ones(2), np.array([1.0, -1.0]), np.arange(2)).mean)


@pytest.mark.parametrize("rows", [0, 1])
def test_of_fewer_than_two_rows_there_is_no_quality_but_an_answer(rows):
    metrics = ReconstructionMetrics(3, 4)
    metrics.update(*np.ones((2, rows, 3), np.float32), np.zeros((rows, 1), np.int32), np.ones((rows, 1), np.float32))
    found = quality(metrics)
    assert found["rows"] == rows
    assert math.isnan(found["fvu"])


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (60, 2.0003), (1000, 1.9623)],
)
def test_t_quantiles_equal_the_printed_tables(df, expected):
    assert t_quantile_975(df) == pytest.approx(expected, rel=1.5e-3 if df == 3 else 2e-4)
