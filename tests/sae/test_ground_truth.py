"""Mean max cosine and recovered share against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sae import ground_truth
from sae.errors import ConfigError, ShapeError
from sae.ground_truth import best_cosines, dictionary_recovery


def by_loops(W_dec_FD: np.ndarray, truth_MD: np.ndarray) -> list[float]:
    def cosine(a, b) -> float:
        dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
        norms = math.sqrt(math.fsum(float(x) ** 2 for x in a)) * math.sqrt(math.fsum(float(y) ** 2 for y in b))
        return dot / norms if norms else 0.0

    return [max(cosine(row, truth) for row in W_dec_FD) for truth in truth_MD]


def test_best_cosines_are_those_of_the_loops_whatever_the_block(monkeypatch):
    rng = np.random.default_rng(0)
    W_dec_FD = rng.standard_normal((11, 5)).astype(np.float32) * rng.uniform(0.1, 9, (11, 1)).astype(np.float32)
    W_dec_FD[3] = 0
    truth_MD = rng.standard_normal((7, 5))
    expected = by_loops(W_dec_FD, truth_MD)
    for block in (1, 3, 7, 100):
        monkeypatch.setattr(ground_truth, "BLOCK_FEATURES", block)
        assert best_cosines(W_dec_FD, truth_MD) == pytest.approx(expected, abs=1e-12)


def test_a_permuted_scaled_dictionary_is_wholly_recovered_and_a_negated_one_is_not():
    rng = np.random.default_rng(1)
    truth_MD = np.eye(6)
    found = dictionary_recovery(truth_MD[rng.permutation(6)] * rng.uniform(0.5, 2, (6, 1)), truth_MD)
    assert found == {"mean_max_cosine": pytest.approx(1.0), "recovered_share": 1.0}
    assert dictionary_recovery(-truth_MD, truth_MD) == {"mean_max_cosine": 0.0, "recovered_share": 0.0}


def test_only_features_above_the_threshold_count():
    angles = np.array([0.0, 0.3, 0.5, 1.2])  # cosines 1, 0.955, 0.878, 0.362 with (1, 0)
    truth_MD = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = dictionary_recovery(np.array([[2.0, 0.0]]), truth_MD)
    assert found["recovered_share"] == 0.5
    assert found["mean_max_cosine"] == pytest.approx(np.cos(angles).mean())
    assert dictionary_recovery(np.array([[2.0, 0.0]]), truth_MD, threshold=0.85)["recovered_share"] == 0.75


def test_dictionaries_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 4\)"):
        best_cosines(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ConfigError, match="empty"):
        best_cosines(np.ones((2, 3)), np.ones((0, 3)))
    with pytest.raises(ConfigError, match="finite"):
        best_cosines(np.full((2, 3), np.nan), np.ones((1, 3)))
