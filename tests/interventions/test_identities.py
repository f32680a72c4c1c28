"""Interventions inside llama.cpp, by identity and against HF with the same change made in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.interventions.ablate import Ablate
from pipeline.interventions.base import Where
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.patch import Patch
from pipeline.interventions.replace import Mean, Reconstruct, Zero
from pipeline.interventions.steer import AddVector, Steer
from pipeline.llama.hooks import HookPoint
from sae.errors import ConfigError, ShapeError

from .tiny import BLOCKS, D, dense_acts, hf_logits, prompt, relative, residual, run, sae_at, session

POST = "blocks.{}.hook_resid_post"


def point(block):
    return HookPoint.parse(POST.format(block))


def but_bos(edit):
    """`edit` on all rows but the first."""

    def change(x_TD):
        out = x_TD.copy()
        out[1:] = edit(x_TD[1:])
        return out

    return change


def test_the_oracle_agrees_where_nothing_is_changed():
    tokens = prompt()
    assert relative(run(session(), tokens), hf_logits(tokens, {})) < 1e-5


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("coeff", [-3.0, 0.5, 8.0])
def test_steering_moves_the_hook_by_the_coefficient_times_the_decoder_row(block, coeff):
    tokens, sae, s = prompt(), sae_at(2), session()
    steer = Steer(point=point(block), weights=sae, latents=(5,), coeffs=(coeff,))
    before, after = (residual(s, tokens, POST.format(block), edits) for edits in ([], [steer]))
    expected = before[1:].astype(np.float64) + coeff * sae.W_dec_FD[5].astype(np.float64)
    ulp = np.spacing(np.maximum(np.abs(before[1:]), np.abs(after[1:])))
    assert (np.abs(after[1:] - expected) <= 2 * ulp).all()
    np.testing.assert_array_equal(after[0], before[0])  # BOS


def test_steered_logits_are_those_of_the_same_change_in_hf():
    tokens, sae = prompt(), sae_at(1)
    steer = Steer(point=point(1), weights=sae, latents=(3, 9), coeffs=(4.0, -2.0))
    direction_D = 4.0 * sae.W_dec_FD[3].astype(np.float64) - 2.0 * sae.W_dec_FD[9]
    logits = run(session(), tokens, [steer])
    assert relative(logits, hf_logits(tokens, {1: but_bos(lambda x: x + direction_D)})) < 1e-5
    assert relative(logits, hf_logits(tokens, {})) > 1e-2


def test_unit_norm_takes_the_normalised_row():
    import dataclasses

    sae = sae_at(1)
    doubled = dataclasses.replace(sae, W_dec_FD=2 * sae.W_dec_FD)
    raw = Steer(point=point(1), weights=sae, latents=(3,), coeffs=(4.0,)).direction()
    np.testing.assert_allclose(
        Steer(point=point(1), weights=doubled, latents=(3,), coeffs=(4.0,), unit="norm").direction(), raw, rtol=1e-6
    )
    np.testing.assert_allclose(
        Steer(point=point(1), weights=doubled, latents=(3,), coeffs=(4.0,)).direction(), 2 * raw, rtol=1e-6
    )


def test_with_layer_norm_steering_and_clamping_are_in_units_of_each_tokens_sigma():
    import dataclasses

    tokens, s = prompt(), session()
    sae = dataclasses.replace(sae_at(1), norm_mode="layer", norm_eps=1e-5, b_dec_D=np.zeros(D, np.float32))
    W_FD = sae.W_dec_FD.astype(np.float64)

    def normalised(x):
        return (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-5)

    steer = Steer(point=point(1), weights=sae, latents=(3,), coeffs=(0.8,))
    oracle = hf_logits(tokens, {1: but_bos(lambda x: x + 0.8 * x.std(1, keepdims=True) * W_FD[3])})
    assert relative(run(s, tokens, [steer]), oracle) < 1e-5
    assert relative(oracle, hf_logits(tokens, {})) > 1e-2
    plain = Steer(point=point(1), weights=sae_at(1), latents=(3,), coeffs=(0.8,))
    assert steer.key() != plain.key()
    raw = Steer(point=point(1), weights=sae, latents=(3,), coeffs=(0.8,), unit="norm")
    assert relative(run(s, tokens, [raw]), hf_logits(tokens, {1: but_bos(lambda x: x + 0.8 * W_FD[3])})) < 1e-5
    a_TF = dense_acts(sae, normalised(residual(s, tokens, POST.format(1)).astype(np.float64)))
    latent = int(np.argmax(a_TF[1:].sum(0)))

    def clamped(x):
        change_N1 = (2.0 - dense_acts(sae, normalised(x))[:, [latent]]) * x.std(1, keepdims=True)
        return x + change_N1 * W_FD[latent]

    clamp = Clamp(point=point(1), weights=sae, latents=(latent,), values=(2.0,))
    assert relative(run(s, tokens, [clamp]), hf_logits(tokens, {1: but_bos(clamped)})) < 1e-5


def test_steering_by_zero_is_the_clean_run_bit_for_bit():
    tokens, sae, s = prompt(), sae_at(2), session()
    steer = Steer(point=point(2), weights=sae, latents=(5,), coeffs=(0.0,))
    np.testing.assert_array_equal(run(s, tokens, [steer]), run(s, tokens))


def test_ablating_nothing_and_silent_latents_is_the_clean_run_bit_for_bit():
    tokens, sae, s = prompt(), sae_at(2), session()
    clean = run(s, tokens).copy()
    a_TF = dense_acts(sae, residual(s, tokens, POST.format(2)))
    silent = tuple(np.flatnonzero(a_TF[1:].max(axis=0) == 0).tolist())
    firing = tuple(np.flatnonzero(a_TF[1:].max(axis=0) > 0).tolist())
    assert len(silent) > 3
    assert len(firing) > 3
    np.testing.assert_array_equal(run(s, tokens, [Ablate(point=point(2), weights=sae, latents=())]), clean)
    np.testing.assert_array_equal(run(s, tokens, [Ablate(point=point(2), weights=sae, latents=silent)]), clean)
    assert relative(run(s, tokens, [Ablate(point=point(2), weights=sae, latents=firing)]), clean) > 1e-2


@pytest.mark.parametrize("block", [0, 2, 3])
def test_clamp_and_ablate_are_the_arithmetic_change_that_keeps_the_sae_error(block):
    tokens, sae, s = prompt(), sae_at(block), session()
    a_TF = dense_acts(sae, residual(s, tokens, POST.format(block)))
    latents = tuple(np.argsort(-a_TF[1:].sum(axis=0))[:3].tolist())
    rows = list(latents)
    W_FD = sae.W_dec_FD.astype(np.float64)

    def to(values):
        return but_bos(lambda x: x + (np.array(values) - dense_acts(sae, x)[:, rows]) @ W_FD[rows])

    ablated = run(s, tokens, [Ablate(point=point(block), weights=sae, latents=latents)]).copy()
    assert relative(ablated, hf_logits(tokens, {block: to([0.0, 0.0, 0.0])})) < 1e-5
    clamped = run(s, tokens, [Clamp(point=point(block), weights=sae, latents=latents, values=(5.0, 0.0, 1.5))])
    assert relative(clamped, hf_logits(tokens, {block: to([5.0, 0.0, 1.5])})) < 1e-5


def test_reconstruction_plus_error_is_the_clean_run_and_without_it_is_hf_with_the_reconstruction():
    tokens, s = prompt(), session()
    clean = run(s, tokens).copy()
    for block in range(BLOCKS):
        sae = sae_at(block)
        assert relative(run(s, tokens, [Reconstruct(point=point(block), weights=sae, keep_error=True)]), clean) < 1e-5
        spliced = run(s, tokens, [Reconstruct(point=point(block), weights=sae)])
        oracle = hf_logits(tokens, {block: but_bos(lambda x, w=sae: dense_acts(w, x) @ w.W_dec_FD + w.b_dec_D)})
        assert relative(spliced, oracle) < 1e-5
        assert relative(spliced, clean) > 1e-2


def test_zero_and_mean_replace_every_unflagged_row():
    tokens, s = prompt(), session()
    mean_D = np.random.default_rng(0).standard_normal(D).astype(np.float32)
    for edit, value in ((Zero(point=point(1)), np.zeros(D)), (Mean(point=point(1), mean_D=mean_D), mean_D)):
        np.testing.assert_array_equal(
            residual(s, tokens, POST.format(1), [edit])[1:], np.tile(value, (len(tokens) - 1, 1))
        )
        oracle = hf_logits(tokens, {1: but_bos(lambda x, v=value: np.tile(v.astype(np.float64), (len(x), 1)))})
        assert relative(run(s, tokens, [edit]), oracle) < 1e-5


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_resid_mid", "hook_resid_pre"])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_patching_every_position_of_a_residual_gives_the_clean_prompts_logits(block, site):
    clean, s = prompt(), session()
    corrupted = clean.copy()
    corrupted[[3, 6]] = [40, 50]
    name = f"blocks.{block}.{site}"
    positions = tuple(range(len(clean)))
    patch = Patch(point=HookPoint.parse(name), where=Where(positions=positions), source_PD=residual(s, clean, name))
    logits = run(s, clean).copy()
    assert relative(run(s, corrupted), logits) > 1e-2
    np.testing.assert_array_equal(residual(s, corrupted, name, [patch]), patch.source_PD)
    np.testing.assert_array_equal(run(s, corrupted, [patch]), logits)


def test_patching_one_position_is_the_same_change_in_hf():
    clean, s = prompt(), session()
    corrupted = clean.copy()
    corrupted[3] = 40
    source_TD = residual(s, clean, POST.format(1))
    patch = Patch(point=point(1), where=Where(positions=(3,)), source_PD=source_TD[[3]])

    def change(x_TD):
        out = x_TD.copy()
        out[3] = source_TD[3]
        return out

    assert relative(run(s, corrupted, [patch]), hf_logits(corrupted, {1: change})) < 1e-5


def test_interventions_at_several_blocks_compose_in_graph_order():
    tokens, first, second = prompt(), sae_at(1), sae_at(3, seed=1)
    edits = [
        Reconstruct(point=point(3), weights=second),  # given first, computed last
        Steer(point=point(1), weights=first, latents=(7,), coeffs=(6.0,)),
    ]
    oracle = hf_logits(
        tokens,
        {
            1: but_bos(lambda x: x + 6.0 * first.W_dec_FD[7].astype(np.float64)),
            3: but_bos(lambda x: dense_acts(second, x) @ second.W_dec_FD + second.b_dec_D),
        },
    )
    assert relative(run(session(), tokens, edits), oracle) < 1e-5


def test_interventions_at_one_point_act_in_the_order_given():
    tokens, sae, s = prompt(), sae_at(2), session()
    steer = Steer(point=point(2), weights=sae, latents=(5,), coeffs=(6.0,))
    direction_D = 6.0 * sae.W_dec_FD[5].astype(np.float64)
    splice = Reconstruct(point=HookPoint.parse("blocks.3.hook_resid_pre"), weights=sae)  # the same tensor, another name
    steer_first = hf_logits(
        tokens, {2: but_bos(lambda x: dense_acts(sae, x + direction_D) @ sae.W_dec_FD + sae.b_dec_D)}
    )
    splice_first = hf_logits(
        tokens, {2: but_bos(lambda x: dense_acts(sae, x) @ sae.W_dec_FD + sae.b_dec_D + direction_D)}
    )
    assert relative(run(s, tokens, [steer, splice]), steer_first) < 1e-5
    assert relative(run(s, tokens, [splice, steer]), splice_first) < 1e-5
    assert relative(steer_first, splice_first) > 1e-2


@pytest.mark.parametrize("phase", ["prompt", "response"])
def test_a_phase_limits_the_rows_and_response_includes_the_last_prompt_position(phase):
    tokens, sae, s = prompt(), sae_at(2), session()
    length = len(tokens) - 4
    steer = Steer(point=point(2), weights=sae, latents=(5,), coeffs=(6.0,), where=Where(phase=phase))
    before = residual(s, tokens, POST.format(2))
    after = residual(s, tokens, POST.format(2), [steer], prompt_tokens=length)
    moved = np.flatnonzero((before != after).any(axis=1)).tolist()
    assert moved == (list(range(1, length)) if phase == "prompt" else list(range(length - 1, len(tokens))))


def test_flagged_rows_move_only_when_a_position_names_them():
    tokens, sae, s = prompt(), sae_at(2), session()
    flags = np.zeros(len(tokens), bool)
    flags[[0, 4]] = True
    before = residual(s, tokens, POST.format(2))
    for where, expected in (
        (Where(), [pos for pos in range(len(tokens)) if pos not in (0, 4)]),
        (Where(positions=(0, 4, 5)), [0, 4, 5]),
    ):
        steer = Steer(point=point(2), weights=sae, latents=(5,), coeffs=(6.0,), where=where)
        after = residual(s, tokens, POST.format(2), [steer], flags=flags)
        assert np.flatnonzero((before != after).any(axis=1)).tolist() == expected


def test_a_plain_run_after_a_steered_one_is_bit_identical_to_a_fresh_context():
    tokens, sae, s = prompt(), sae_at(2), session()
    run(s, tokens, [Steer(point=point(2), weights=sae, latents=(5,), coeffs=(20.0,))])
    np.testing.assert_array_equal(run(s, tokens), run(session(), tokens))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.5e38, -1e39])
def test_what_is_not_finite_in_float32_is_refused(value):
    for kind, name in ((Steer, "coeffs"), (Clamp, "values")):
        with pytest.raises(ConfigError, match="must be finite in float32"):
            kind(point=HookPoint.parse("blocks.1.hook_resid_post"), weights=sae_at(1), latents=(3,), **{name: (value,)})


def test_an_sae_of_another_width_is_refused_in_one_line():
    vector = AddVector(point=point(1), vector_D=np.ones(D + 1, np.float32))
    with pytest.raises(ShapeError, match="the vector is 65 wide, the hook point 64"):
        run(session(), prompt(), [vector])
