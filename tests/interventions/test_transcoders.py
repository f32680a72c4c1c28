"""Transcoders at work in the model: latents of one hook point, read, steered, clamped and replaced at another.

Oracles: the equations in float64 on captured rows of both points, and HF with the same change of the MLP's output.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.generate import generate, token_logprobs
from pipeline.interventions.ablate import Ablate
from pipeline.interventions.base import Where
from pipeline.interventions.clamp import Clamp, clamp_change
from pipeline.interventions.inputs import InputRows
from pipeline.interventions.replace import Reconstruct
from pipeline.interventions.steer import Steer
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.llama.session import Hook, Rows, capture
from pipeline.readout import Reader
from sae.errors import ConfigError, HookError, ShapeError
from sae.weights import SAEWeights

from .tiny import D, hf_logits, prompt, relative, run, session, tiny

MID, OUT, INSIDE = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"
F, K = 96, 6


def rows_at(tokens, *names):
    """Float64 rows of hook points of the clean run."""
    (found,) = capture(session(), [tokens], [HookPoint.parse(name) for name in names], stop_early=False)
    return [found[name].astype(np.float64) for name in names]


def transcoder(reads=MID, writes=OUT, *, skip=False, **more) -> SAEWeights:
    """Random directions, at the scale of the rows on both sides, so that its latents fire and its edits matter."""
    rng = np.random.default_rng(3)
    x_TD, y_TO = (rows[1:] for rows in rows_at(prompt(), reads, writes))
    W_enc_FD = rng.standard_normal((F, x_TD.shape[1])) / np.sqrt(x_TD.shape[1])
    W_dec_FO = rng.standard_normal((F, y_TO.shape[1]))
    W_dec_FO *= y_TO.std() * np.sqrt(y_TO.shape[1]) / np.linalg.norm(W_dec_FO, axis=1, keepdims=True)
    scaled_FD = W_enc_FD / x_TD.std()
    mean_O = y_TO.mean(0)
    fields = {
        "W_enc_FD": scaled_FD, "b_enc_F": -scaled_FD @ x_TD.mean(0), "W_dec_FD": W_dec_FO, "b_dec_D": mean_O,
        "mean_D": mean_O, "variance": float(((y_TO - mean_O) ** 2).sum(1).mean()), "k": K, "hook": reads,
        "hook_out": writes, "b_dec_subtracted": False,
    }  # fmt: skip
    if skip:
        fields["W_skip_OD"] = 0.3 * rng.standard_normal((y_TO.shape[1], x_TD.shape[1])) / np.sqrt(x_TD.shape[1])
    return SAEWeights(**(fields | more))


def acts(w, x_ND):
    """a_NF in float64: the k largest after ReLU, or what is above the threshold."""
    pre_NF = x_ND @ w.W_enc_FD.astype(np.float64).T + w.b_enc_F
    if w.threshold_F is not None:
        return np.where(pre_NF > w.threshold_F, pre_NF, 0)
    a_NF = np.maximum(pre_NF, 0)
    a_NF[a_NF < np.sort(a_NF, axis=1)[:, [-w.k]]] = 0
    return a_NF


def made_of(w, x_ND):
    """y_hat in float64."""
    skipped = 0 if w.W_skip_OD is None else x_ND @ w.W_skip_OD.astype(np.float64).T
    return acts(w, x_ND) @ w.W_dec_FD.astype(np.float64) + w.b_dec_D + skipped


def firing(w, x_ND, count=3):
    return tuple(np.argsort(-acts(w, x_ND)[1:].sum(0))[:count].tolist())


def at_out(delta_TO, block=1):
    """The edit of HF's MLP that adds these rows, BOS left alone."""

    def change(y_TO):
        out = y_TO.copy()
        out[1:] += delta_TO[1:]
        return out

    return {(block, "mlp"): change}


WIRINGS = {
    "plain": {},
    "skip": {"skip": True},
    "threshold": {"variant": "threshold", "threshold_F": np.full(F, 0.8)},
    "ports": {"ports": ((MID, D), (OUT, D))},
    "another width": {"writes": INSIDE},
    "the norm's output": {"reads": "ggml:ffn_norm-1"},
    "another block": {"reads": "blocks.0.hook_resid_post", "writes": "blocks.3.hook_resid_post", "skip": True},
}


@pytest.mark.parametrize("encoder", ["numpy", "ggml"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_readings_are_the_transcoders_equations_on_the_rows_of_both_points(wiring, encoder):
    w = transcoder(**WIRINGS[wiring])
    own = GgmlEncoder(w, n_threads=1) if encoder == "ggml" else None
    events = list(generate(session(), tiny()[0], prompt(), readers=[Reader(w, top=4, encoder=own)], max_tokens=4))
    x_TI, y_TO = rows_at(np.array([e.token for e in events], np.int32), w.hook, w.hook_out)
    assert y_TO.shape[1] == w.d_out
    a_TF = acts(w, x_TI)
    fvu_T = ((y_TO - made_of(w, x_TI)) ** 2).sum(1) / w.variance
    assert events[0].readings == ()
    for event in events[1:]:
        order = np.argsort(-a_TF[event.pos])[: min(4, event.l0)]
        assert [latent for latent, _ in event.latents] == order.tolist()
        np.testing.assert_allclose([a for _, a in event.latents], a_TF[event.pos, order], rtol=1e-4)
        assert event.l0 == (a_TF[event.pos] > 0).sum() > 0
        assert event.fvu == pytest.approx(fvu_T[event.pos], rel=1e-4)
        (reading,) = event.to_dict()["readings"]
        assert (reading["hook"], reading["hook_out"]) == (w.hook, w.hook_out)


def test_a_prompt_in_several_batches_and_micro_batches_is_read_and_edited_alike():
    tokens, w = prompt("def add(self, first, second):\n" * 4), transcoder(skip=True)
    edits = [Ablate(point=HookPoint.parse(OUT), weights=w, latents=firing(w, rows_at(tokens, MID)[0]))]
    runs = [
        list(generate(session(**sizes), tiny()[0], tokens, interventions=edits, readers=[Reader(w)], max_tokens=4))
        for sizes in ({}, {"n_batch": 32}, {"n_ubatch": 16}, {"n_batch": 32, "n_ubatch": 8})
    ]
    assert len(tokens) > 64
    for other in runs[1:]:
        assert [e.token for e in other] == [e.token for e in runs[0]]
        for a, b in zip(other[1:], runs[0][1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-5)
            assert a.fvu == pytest.approx(b.fvu, rel=1e-4)


def test_steering_moves_the_output_by_the_decoder_row_and_by_zero_changes_no_bit():
    tokens, w, s = prompt(), transcoder(), session()
    clean = run(s, tokens).copy()
    zero = Steer(point=HookPoint.parse(OUT), weights=w, latents=(5,), coeffs=(0.0,))
    np.testing.assert_array_equal(run(s, tokens, [zero]), clean)
    steer = Steer(point=HookPoint.parse(OUT), weights=w, latents=(5, 9), coeffs=(2.0, -1.0))
    direction_O = 2 * w.W_dec_FD[5].astype(np.float64) - w.W_dec_FD[9]
    oracle = hf_logits(tokens, at_out(np.tile(direction_O, (len(tokens), 1))))
    assert relative(run(s, tokens, [steer]), oracle) < 1e-5
    assert relative(oracle, clean) > 1e-2


@pytest.mark.parametrize("encoder", ["numpy", "ggml"])
@pytest.mark.parametrize("wiring", ["plain", "skip", "threshold"])
def test_clamp_and_ablate_add_what_the_inputs_latents_lack_at_the_output(wiring, encoder):
    tokens, w, s = prompt(), transcoder(**WIRINGS[wiring]), session()
    (x_TI,) = rows_at(tokens, w.hook)
    latents = firing(w, x_TI)
    own = GgmlEncoder(w, n_threads=1) if encoder == "ggml" else None
    common = {"point": HookPoint.parse(OUT), "weights": w, "latents": latents, "encoder": own}
    clean = run(s, tokens).copy()
    for edit, values in ((Ablate(**common), (0, 0, 0)), (Clamp(**common, values=(3.0, 0.0, 1.5)), (3.0, 0.0, 1.5))):
        delta_TO = (values - acts(w, x_TI)[:, latents]) @ w.W_dec_FD[list(latents)].astype(np.float64)
        found = run(s, tokens, [edit]).copy()
        assert relative(found, hf_logits(tokens, at_out(delta_TO))) < 1e-5
        by_hand = Hook(
            HookPoint.parse(OUT), edit=lambda rows, d=delta_TO: np.float32(d * (np.arange(len(d)) > 0)[:, None])
        )
        assert relative(found, run(s, tokens, hooks=[by_hand])) < 1e-5
        assert relative(found, clean) > 1e-2


def test_a_change_is_as_wide_as_the_output():
    w = transcoder(**WIRINGS["another width"])
    (x_TI,) = rows_at(prompt(), MID)
    assert w.d_out != w.d_in
    for latents in ((), (1, 2)):
        change_TO = clamp_change(w, x_TI.astype(np.float32), latents, (1.0,) * len(latents))
        assert change_TO.shape == (len(x_TI), w.d_out)
        assert change_TO.any() == bool(latents)


def test_ablating_silent_latents_changes_no_bit():
    tokens, w, s = prompt(), transcoder(), session()
    silent = tuple(np.flatnonzero(acts(w, rows_at(tokens, MID)[0])[1:].max(0) == 0).tolist())
    assert len(silent) > 3
    clean = run(s, tokens).copy()
    np.testing.assert_array_equal(
        run(s, tokens, [Ablate(point=HookPoint.parse(OUT), weights=w, latents=silent)]), clean
    )


@pytest.mark.parametrize("skip", [False, True])
def test_the_output_replaced_is_hfs_with_the_reconstruction_and_with_the_error_the_clean_run(skip):
    tokens, w, s = prompt(), transcoder(skip=skip), session()
    clean = run(s, tokens).copy()
    x_TI, y_TO = rows_at(tokens, MID, OUT)
    common = {"point": HookPoint.parse(OUT), "weights": w}
    spliced = run(s, tokens, [Reconstruct(**common)]).copy()
    assert relative(spliced, hf_logits(tokens, at_out(made_of(w, x_TI) - y_TO))) < 1e-5
    assert relative(spliced, clean) > 1e-2
    assert relative(run(s, tokens, [Reconstruct(**common, keep_error=True)]), clean) < 1e-5


def test_the_latents_are_those_of_the_input_after_the_edits_there():
    """The reading and the edit of a transcoder see what a steering at its input led to."""
    tokens, w = prompt(), transcoder()
    push = Steer(point=HookPoint.parse(MID), weights=dataclasses.replace(w, hook_out=MID), latents=(7,), coeffs=(1.0,))
    moved_TI = rows_at(tokens, MID)[0]
    moved_TI[1:] += w.W_dec_FD[7].astype(np.float64)
    a_TF = acts(w, moved_TI)
    latents = firing(w, moved_TI)
    ablate = Ablate(point=HookPoint.parse(OUT), weights=w, latents=latents)
    events = list(
        generate(session(), tiny()[0], tokens, interventions=[ablate, push], readers=[Reader(w)], max_tokens=0)
    )
    for event in events[1:]:
        assert [latent for latent, _ in event.latents] == np.argsort(-a_TF[event.pos])[:3].tolist()
    delta_TO = -a_TF[:, latents] @ w.W_dec_FD[list(latents)].astype(np.float64)
    by_hand = Hook(
        HookPoint.parse(OUT), edit=lambda rows: np.float32(delta_TO * (np.arange(len(delta_TO)) > 0)[:, None])
    )
    expected = run(session(), tokens, [push], hooks=[by_hand])
    assert relative(run(session(), tokens, [ablate, push]), expected) < 1e-5
    assert relative(run(session(), tokens, [push]), expected) > 1e-3


@pytest.mark.parametrize("phase", ["all", "response"])
def test_a_generation_edited_by_transcoders_equals_the_whole_sequence_from_scratch(phase):
    tokens, where = prompt(), Where(phase=phase)
    w, later = transcoder(), transcoder("blocks.2.hook_resid_mid", "blocks.3.hook_mlp_out", skip=True)
    edits = [
        Reconstruct(point=HookPoint.parse("blocks.3.hook_mlp_out"), weights=later, where=where),
        Clamp(point=HookPoint.parse(OUT), weights=w, latents=(1, 2), values=(2.0, 0.0), where=where),
    ]
    events = list(generate(session(), tiny()[0], tokens, interventions=edits, max_tokens=8))
    ids = np.array([e.token for e in events], np.int32)
    logits = run(session(), ids, edits, prompt_tokens=len(tokens))
    np.testing.assert_allclose([e.logprob for e in events[1:]], token_logprobs(logits[:-1], ids[1:]), atol=2e-5)
    plain = list(generate(session(), tiny()[0], tokens, max_tokens=8))
    assert ids.tolist() != [e.token for e in plain]


def test_what_the_edits_are_named_by_holds_the_input_and_the_skip():
    w = transcoder(skip=True)
    others = [
        w,
        dataclasses.replace(w, hook="blocks.0.hook_resid_post"),
        dataclasses.replace(w, W_skip_OD=2 * w.W_skip_OD),
        dataclasses.replace(w, hook=OUT, hook_out="", W_skip_OD=None),
    ]
    assert len({Reconstruct(point=HookPoint.parse(OUT), weights=other).key() for other in others}) == len(others)


def test_what_cannot_run_is_one_line():
    w, s, tokens = transcoder(), session(), prompt()

    def start(**changes):
        other = dataclasses.replace(w, **changes)
        edit = Ablate(point=HookPoint.parse(other.hook_out), weights=other, latents=(1,))
        generate(s, tiny()[0], tokens, interventions=[edit], max_tokens=0)

    with pytest.raises(ConfigError, match=f"input before its output, and '{OUT}' is not before '{MID}'"):
        start(hook=OUT, hook_out=MID)
    with pytest.raises(ConfigError, match=r"is not before 'blocks\.2\.hook_resid_pre'"):  # one tensor under two names
        start(hook="blocks.1.hook_resid_post", hook_out="blocks.2.hook_resid_pre")
    with pytest.raises(HookError, match=r"no hook point 'blocks\.9"):
        start(hook="blocks.9.hook_resid_mid")
    with pytest.raises(ConfigError, match="not before"):
        generate(s, tiny()[0], tokens, readers=[Reader(dataclasses.replace(w, hook=OUT, hook_out=MID))], max_tokens=0)
    crosscoder = dataclasses.replace(w, hook_out="", ports=((MID, 24), (OUT, 40)))
    with pytest.raises(ConfigError, match=f"a transcoder of one input and one output, this one is over {MID}, {OUT}"):
        Reader(crosscoder)
    with pytest.raises(ConfigError, match="this one is over"):
        Reconstruct(point=HookPoint.parse(OUT), weights=crosscoder)
    for reads, writes, what in (
        (MID, INSIDE, "the SAE is 64 wide"),
        (INSIDE, OUT, "the transcoder's input is 64 wide"),
    ):
        edit = Reconstruct(point=HookPoint.parse(writes), weights=dataclasses.replace(w, hook=reads))
        with pytest.raises(ShapeError, match=what):
            run(s, tokens, [edit])


def test_rows_of_the_input_are_found_by_sequence_and_position_and_missing_ones_are_refused():
    kept = InputRows(HookPoint.parse(MID))
    seq_N, pos_N = np.array([1, 0, 1, 0], np.int32), np.array([4, 4, 5, 3], np.int32)
    with pytest.raises(ConfigError, match="has no rows"):
        kept.take(seq_N[:1], pos_N[:1])
    values_ND = np.arange(8, dtype=np.float32).reshape(4, 2)
    kept.hook().read(Rows(values_ND, seq_N, pos_N))
    values_ND += 100  # the callback's memory is used again
    np.testing.assert_array_equal(kept.take(seq_N[[3, 0, 2]], pos_N[[3, 0, 2]]), [[6, 7], [0, 1], [4, 5]])
    for seq, pos in ((0, 5), (2, 4), (1, 6), (0, 2)):
        with pytest.raises(ConfigError, match="has no rows"):
            kept.take(np.array([1, seq]), np.array([4, pos]))
