"""Promoted tokens and steering on the tiny model, against transformers' own arithmetic and each other."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.analysis.promoted import direct_effect, extremes
from pipeline.analysis.steering import clearest, complete, random_directions, responses, steering_curves
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.splice import SpliceConfig, split_windows
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from pipeline.llama.unembed import Unembedding
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
LAST = HookPoint("resid_post", 3)
TEXT = "def f(x):\n    return [x, x + 1]\n" * 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("steering") / "tiny.gguf"
    weights = write_tiny_llama(path)
    with Model(path) as model:
        yield model, weights, split_windows(windows(model, [Document(name="a.py", text=TEXT)], 40))


@pytest.fixture
def direction():
    d = np.random.default_rng(0).normal(size=64)
    return (d / np.linalg.norm(d)).astype(np.float32)


def test_the_direct_effect_is_the_change_of_the_centred_logits_at_a_fixed_norm(tiny, direction):
    model, weights, _ = tiny
    x = np.random.default_rng(1).normal(size=64)
    gain, unembed = weights["model.norm.weight"].astype(np.float64), weights["lm_head.weight"].astype(np.float64)
    change = unembed @ (gain * (x + direction)) - unembed @ (gain * x)
    np.testing.assert_allclose(direct_effect(model.unembed(), direction), change - change.mean(), atol=1e-5)


def test_layer_norm_takes_the_mean_of_the_direction_away(direction):
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(9, 64)).astype(np.float32)
    unembedding = Unembedding(
        kind="layer", eps=1e-5, weight_D=np.ones(64, np.float32), bias_D=None, W_VD=matrix, b_V=None, softcap=0.0,
        scale=1.0, tied=False,
    )  # fmt: skip
    shifted = direct_effect(unembedding, direction + 3)
    np.testing.assert_allclose(shifted, direct_effect(unembedding, direction), atol=1e-4)


def test_extremes_are_ordered_and_leave_out_what_is_excluded():
    up, down = extremes(np.array([0.0, 3.0, -1.0, 3.0, 9.0]), 2, np.array([False, False, False, False, True]))
    assert up.tolist() == [1, 3]
    assert down.tolist() == [2, 0]


def test_the_curve_equals_unembedding_the_shifted_residual_of_the_last_block(tiny, direction):
    model, _, cut = tiny
    unembedding = model.unembed()
    promoted = extremes(direct_effect(unembedding, direction), 4)[0]
    coeffs = [-4.0, 0.0, 2.0, 6.0]
    curves = steering_curves(model, cut, LAST, {"own": direction}, promoted, coeffs, config=SpliceConfig(session=ONE))
    with Session(model, n_ctx=512, n_seq_max=8, **ONE) as session:
        x_ND = np.concatenate([c[str(LAST)][1:-1] for c in capture(session, [w.tokens for w in cut], [LAST])])

    def log_p(coeff):
        logits = unembedding.logits(x_ND + np.float32(coeff) * direction).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    plain = log_p(0)
    for i, coeff in enumerate(coeffs):
        steered = log_p(coeff)
        assert curves["own"].log_prob[i] == pytest.approx(steered[:, promoted].mean(), abs=2e-4)
        assert curves["own"].kl[i] == pytest.approx((np.exp(plain) * (plain - steered)).sum(axis=1).mean(), abs=2e-4)
    assert curves["own"].positions == len(x_ND)


def test_steering_raises_the_promoted_tokens_step_by_step_above_random_directions(tiny, direction):
    model, _, cut = tiny
    promoted = extremes(direct_effect(model.unembed(), direction), 4)[0]
    directions = {"own": direction, **random_directions(direction, 2, np.random.default_rng(3))}
    curves = steering_curves(
        model, cut, LAST, directions, promoted, [0.0, 1.0, 2.0, 4.0], config=SpliceConfig(session=ONE)
    )
    own = curves.pop("own")
    assert (np.diff(own.log_prob) > 0).all()
    assert (np.diff(own.kl) > 0).all()
    for control in curves.values():
        assert own.log_prob[-1] - own.log_prob[0] > 3 * abs(control.log_prob[-1] - control.log_prob[0])


def test_random_directions_have_the_norm_and_no_common_direction():
    drawn = random_directions(np.full(256, 0.5), 3, np.random.default_rng(4))
    stacked = np.stack(list(drawn.values()))
    np.testing.assert_allclose(np.linalg.norm(stacked, axis=1), 8, rtol=1e-5)
    cosines = stacked @ stacked.T / 64
    assert np.abs(cosines - np.eye(3)).max() < 0.3


def test_responses_are_differences_of_the_latents_own_curves(tiny, direction):
    model, _, cut = tiny
    config = SpliceConfig(session=ONE)
    tried = {}
    for latent, d, coeff in ((5, direction, 2.0), (51, np.roll(direction, 5), 3.0)):
        tried[latent] = (d, coeff, extremes(direct_effect(model.unembed(), d), 3)[0])
    changes = responses(model, cut, LAST, tried, [-0.5, 1.0], config=config)
    for latent, (d, coeff, promoted) in tried.items():
        at = [0.0, -0.5 * coeff, coeff]
        curve = steering_curves(model, cut, LAST, {"own": d}, promoted, at, config=config)["own"]
        expected = np.array(curve.log_prob[1:]) - curve.log_prob[0]
        np.testing.assert_allclose(changes[latent], expected, atol=1e-6)


def test_the_clearest_latent_rises_at_every_step():
    factors = [-0.5, 0.5, 1.0]
    assert clearest({1: [-1, 1, 2], 2: [0.5, 3, 9], 3: [-2, 4, 3.9]}, factors) == 1  # 2 rises below zero, 3 falls back
    assert clearest({1: [-1, 0, 2], 2: [-1, 0.1, 1]}, factors) == 2  # 1 does not rise at first
    assert clearest({2: [0.5, 3, 9], 3: [-2, 4, 3.9]}, factors) == 2  # none rises: the largest


def test_completions_are_greedy_and_steering_by_nothing_changes_nothing(tiny, direction):
    model, weights, _ = tiny
    import torch

    from tests.tiny_llama import hf_model

    prompt = b"def f(x):"
    text = complete(model, prompt, LAST, None, max_tokens=6, session=ONE)
    assert complete(model, prompt, LAST, 0 * direction, max_tokens=6, session=ONE) == text
    tokens = [model.bos, *model.tokenize(prompt).tolist()]
    hf, start = hf_model(weights), len(tokens)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(hf(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert text == b"".join(model.piece(t) for t in tokens[start:])


def test_a_strongly_steered_completion_repeats_the_promoted_token(tiny, direction):
    model, _, _ = tiny
    top = int(extremes(direct_effect(model.unembed(), direction), 1)[0][0])
    assert complete(model, b"def", LAST, np.float32(1e4) * direction, max_tokens=3, session=ONE) == model.piece(top) * 3
