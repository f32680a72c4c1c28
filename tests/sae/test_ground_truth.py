"""Mean max cosine and recovered share: against loops in float64, and of trained SAEs on rows whose dictionary is known."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest

from bench.superposition import Superposition
from bench.toy_dictionary import Problem, held_out, trained
from sae import ground_truth
from sae.errors import ConfigError, ShapeError
from sae.ground_truth import best_cosines, dictionary_recovery
from sae.options import SAEOptions


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
    assert dictionary_recovery(np.eye(2), np.eye(2), threshold=1.0)["recovered_share"] == 0  # at it is not above it


def test_dictionaries_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 4\)"):
        best_cosines(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ConfigError, match="empty"):
        best_cosines(np.ones((2, 3)), np.ones((0, 3)))
    with pytest.raises(ConfigError, match="finite"):
        best_cosines(np.full((2, 3), np.nan), np.ones((1, 3)))


# ---- trained SAEs ----

PROBLEM = Problem(d_in=32, truths=128, num_latents=256, k=6, tokens=100_000, batch_tokens=512, lr=2e-2)
DRAWS, L1_COEF = 6, 3.2  # features of a row; the penalty with which about as many latents of a row fire


@functools.cache
def found(variant, seed, k=PROBLEM.k, **options):
    """Both measures, `fvu` and `l0` of a trained SAE."""
    problem = replace(PROBLEM, k=k, seed=seed)
    toy = Superposition(problem.d_in, problem.truths, seed=seed, draws=DRAWS)
    _, weights = trained(toy, problem, {"variant": variant, "options": SAEOptions(**options)})
    numbers = held_out(toy, weights, problem)
    return dictionary_recovery(weights.W_dec_FD, toy.truth_MD) | {key: numbers[key] for key in ("fvu", "l0")}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_topk_finds_more_of_the_dictionary_than_relu_with_an_l1_penalty_at_equal_l0(seed):
    """At one learning rate and the default schedule of the penalty, as Gao et al. 2024 find of reconstruction and probes.

    Seen over five seeds: mean max cosine 0.97 to 0.98 against 0.87 to 0.91 (by 0.07 at least), recovered 95 to 98 %
    against 65 to 77 % (by 21 points at least), FVU 0.15 against 0.49 to 0.51.
    """
    relu = found("relu", seed, l1_coef=L1_COEF, decoder_rows="free")
    topk = found("topk", seed, k=round(relu["l0"]))
    assert abs(topk["l0"] - relu["l0"]) <= 0.5
    assert 4 < relu["l0"] < 9
    assert topk["mean_max_cosine"] > relu["mean_max_cosine"] + 0.04
    assert topk["recovered_share"] > relu["recovered_share"] + 0.1
    assert topk["fvu"] < 0.5 * relu["fvu"]
    assert relu["recovered_share"] > 0.4  # it learned too


def test_a_penalty_that_grows_over_half_of_the_steps_lets_relu_find_the_dictionary_too_at_a_larger_error():
    relu = found("relu", 0, l1_coef=L1_COEF, decoder_rows="free", sparsity_warmup_share=0.5)
    topk = found("topk", 0, k=round(relu["l0"]))
    assert relu["recovered_share"] > found("relu", 0, l1_coef=L1_COEF, decoder_rows="free")["recovered_share"] + 0.1
    assert abs(relu["mean_max_cosine"] - topk["mean_max_cosine"]) < 0.03
    assert topk["fvu"] < 0.5 * relu["fvu"]
