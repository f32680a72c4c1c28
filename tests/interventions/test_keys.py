"""What names a forward pass: equal keys only where the numbers are equal. And what no edit is made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.interventions.ablate import Ablate
from pipeline.interventions.base import Sequences, Where, digest, edits_key
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.patch import Patch
from pipeline.interventions.replace import Mean, Reconstruct, Zero
from pipeline.interventions.steer import AddVector, Steer
from pipeline.llama.hooks import HookPoint
from sae.encoders import NumpyEncoder
from sae.errors import ConfigError, ShapeError

from .tiny import D, prompt, relative, residual, run, sae_at, session

POINT = HookPoint.parse("blocks.1.hook_resid_post")
AT = {"point": POINT}
ROWS = np.arange(2 * D, dtype=np.float32).reshape(2, D)


def patch(source_PD=ROWS, positions=(1, 2), sequences=None, **more):
    return Patch(point=POINT, source_PD=source_PD, where=Where(positions=positions, sequences=sequences), **more)


def different_edits():
    """No two of them change the same in the same way."""
    w, ones_D = sae_at(1), np.ones(D, np.float32)
    late, first, of_one = Where(phase="response"), Where(positions=(1,)), Where(sequences=(1,))
    changed = [
        {"W_enc_FD": 2 * w.W_enc_FD},
        {"b_enc_F": 2 * w.b_enc_F},
        {"W_dec_FD": 2 * w.W_dec_FD},
        {"b_dec_D": 2 * w.b_dec_D},
        {"k": 3},
        {"variant": "threshold", "threshold_F": np.full(128, 0.1, np.float32)},
        {"variant": "threshold", "threshold_F": np.full(128, 0.2, np.float32)},
        {"b_dec_subtracted": False},
        {"norm_mode": "layer"},
        {"norm_mode": "layer", "norm_eps": 1e-3},
    ]
    edits = [Reconstruct(**AT, weights=dataclasses.replace(w, **change)) for change in changed]
    for where in (Where(), late, Where(phase="prompt"), first, of_one, Where(flagged=True)):
        edits += [
            Ablate(**AT, weights=w, latents=(1,), where=where),
            Clamp(**AT, weights=w, latents=(1,), values=(2.0,), where=where),
            Steer(**AT, weights=w, latents=(1,), coeffs=(2.0,), where=where),
            AddVector(**AT, vector_D=ones_D, where=where),
            Mean(**AT, mean_D=ones_D, where=where),
            Zero(**AT, where=where),
            Reconstruct(**AT, weights=w, where=where),
        ]
    edits += [
        Reconstruct(**AT, weights=w, keep_error=True),
        Ablate(**AT, weights=w, latents=(2,)),
        Clamp(**AT, weights=w, latents=(1,), values=(2.0000001,)),
        Clamp(**AT, weights=w, latents=(1, 2), values=(2.0, 3.0)),
        Clamp(**AT, weights=w, latents=(2, 1), values=(2.0, 3.0)),
        Steer(**AT, weights=w, latents=(1,), coeffs=(3.0,)),
        AddVector(**AT, vector_D=2 * ones_D),
        Mean(**AT, mean_D=2 * ones_D),
    ]
    columns = [np.arange(3), np.arange(1, 4)]
    edits += [patch(), patch(2 * ROWS), patch(positions=(2, 1)), patch(targets=(0, 1)), patch(sequences=(0,))]
    return edits + [patch(columns=some) for some in columns]


def test_different_edits_have_different_keys():
    keys = [edit.key() for edit in different_edits()]
    assert len(set(keys)) == len(keys)
    assert [edit.key() for edit in different_edits()] == keys
    assert digest(ROWS) != digest(ROWS.reshape(D, 2))


def test_the_key_of_several_has_their_order_and_prompt_lengths_where_a_phase_asks_for_them():
    w = sae_at(1)
    one, two = Zero(point=POINT), AddVector(point=POINT, vector_D=np.ones(D, np.float32))
    short, long = Sequences(), Sequences()
    for sequences, count in ((short, 3), (long, 5)):
        sequences.start(0, [False] * count)
    assert edits_key([], short) == ""
    assert len({edits_key(edits, short) for edits in ([one], [two], [one, two], [two, one])}) == 4
    assert edits_key([one, two], short) == edits_key([one, two], long)
    for phase in ("prompt", "response"):
        late = Ablate(**AT, weights=w, latents=(1,), where=Where(phase=phase))
        assert edits_key([one, late], short) != edits_key([one, late], long)


def test_flags_and_lengths_are_those_of_each_sequence_and_of_its_newest_prompt():
    sequences = Sequences()
    sequences.start(0, [True, True])
    sequences.start(0, [True, False, False])
    sequences.start(2, [False])
    sequences.append(0, True)
    seq_N, pos_N = np.array([2, 0, 0, 0, 0, 2]), np.array([0, 0, 1, 3, 4, 1])
    assert sequences.flagged(seq_N, pos_N).tolist() == [False, True, False, True, False, False]
    assert sequences.prompt_lengths(seq_N).tolist() == [1, 3, 3, 3, 3, 1]
    with pytest.raises(ConfigError, match=r"sequences \[1\] were not started, only \[0, 2\]"):
        sequences.prompt_lengths(np.array([0, 1]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Patch(point=POINT, source_PD=ROWS), "a patch needs positions"),
        (lambda: patch(positions=(1,)), "1 positions needs 1 source rows"),
        (lambda: patch(ROWS[0]), "2 positions needs 2 source rows"),
        (lambda: patch(targets=(0,)), "2 positions needs 2 target sequences, got 1"),
        (lambda: patch(positions=(1, 1)), "the same position of the same sequence twice"),
        (lambda: patch(positions=(1, 1), targets=(0, 0)), "the same position of the same sequence twice"),
        (lambda: Where(phase="late"), "phase: expected one of all, prompt, response, got 'late'"),
        (lambda: Where(positions=(3, -1)), r"positions count from 0, got \[3, -1\]"),
        (lambda: Ablate(**AT, weights=sae_at(1), latents=(128,)), r"latents \[128\] do not exist"),
        (lambda: Ablate(**AT, weights=sae_at(1), latents=(3, 3)), "a latent is named twice"),
        (lambda: Clamp(**AT, weights=sae_at(1), latents=(3, 4), values=(1.0,)), "2 latents and 1 values"),
        (lambda: Steer(**AT, weights=sae_at(1), latents=(3, -1), coeffs=(1.0, 2.0)), r"latents \[-1\] do not exist"),
        (lambda: Steer(**AT, weights=sae_at(1), latents=(3,), coeffs=(1.0,), unit="row"), "unit: expected one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises((ConfigError, ShapeError), match=said):
        make()


@pytest.mark.parametrize(
    "edit",
    [
        patch(ROWS[:, :3]),
        Mean(**AT, mean_D=np.ones(3, np.float32)),
        AddVector(**AT, vector_D=np.ones(1, np.float32)),
        Steer(point=HookPoint.parse("blocks.1.mlp.hook_post"), weights=sae_at(1), latents=(1,), coeffs=(1.0,)),
    ],
)
def test_rows_of_another_width_are_refused(edit):
    with pytest.raises(ShapeError, match=r"wide, the hook point \d+"):
        run(session(), prompt(), [edit])


def test_two_rows_may_go_to_one_position_of_two_sequences():
    x_ND, seq_N, pos_N = np.ones((3, D), np.float32), np.array([1, 0, 0]), np.array([1, 1, 2])
    delta_ND = patch(positions=(1, 1), targets=(0, 1)).change(x_ND, seq_N, pos_N)
    np.testing.assert_array_equal(x_ND + delta_ND, [ROWS[1], ROWS[0], np.ones(D)])


@pytest.mark.parametrize("value", [1e-8, 3e7])
def test_a_row_that_is_set_is_the_value_to_the_bit(value):
    tokens, value_D = prompt(), np.float32(value) * np.linspace(0.1, 0.7, D, dtype=np.float32)
    for edit in (Mean(**AT, mean_D=value_D), patch(np.tile(value_D, (len(tokens), 1)), range(len(tokens)))):
        rows_TD = residual(session(), tokens, str(POINT), [edit])[1:]
        np.testing.assert_array_equal(rows_TD, np.tile(value_D, (len(rows_TD), 1)))


def test_latents_are_those_of_the_encoder_that_is_given():
    tokens, w, s = prompt(), sae_at(1), session()
    other = dataclasses.replace(w, b_enc_F=w.b_enc_F + 0.2)
    latents = tuple(range(w.num_latents))
    for make in (
        lambda **given: Ablate(**AT, latents=latents, **given),
        lambda **given: Clamp(**AT, latents=latents, values=(0.5,) * len(latents), **given),
        lambda **given: Reconstruct(**AT, **given),
    ):
        found, expected, plain = (
            run(s, tokens, [edit]).copy()
            for edit in (make(weights=w, encoder=NumpyEncoder(other)), make(weights=other), make(weights=w))
        )
        np.testing.assert_array_equal(found, expected)
        assert relative(plain, expected) > 1e-4


def test_each_decoder_row_has_its_own_norm_and_one_of_zeros_no_direction():
    w = sae_at(1)
    W_dec_FD = w.W_dec_FD.copy()
    W_dec_FD[3], W_dec_FD[4] = 0, 9 * W_dec_FD[4]
    steer = Steer(
        **AT, weights=dataclasses.replace(w, W_dec_FD=W_dec_FD), latents=(3, 4, 5), coeffs=(2.0, 3.0, 4.0), unit="norm"
    )
    np.testing.assert_allclose(steer.direction(), 3 * w.W_dec_FD[4] + 4 * w.W_dec_FD[5], rtol=1e-5, atol=1e-6)


def test_a_vector_is_added():
    tokens, vector_D = prompt(), np.linspace(-1, 1, D, dtype=np.float32)
    before, after = (
        residual(session(), tokens, str(POINT), edits) for edits in ([], [AddVector(**AT, vector_D=vector_D)])
    )
    np.testing.assert_allclose(after[1:] - before[1:], np.tile(vector_D, (len(tokens) - 1, 1)), atol=1e-5)
