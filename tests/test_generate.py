from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.generate import generate, sample, token_logprobs
from pipeline.interventions.base import Where, edit_hooks, edits_key
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.replace import Reconstruct
from pipeline.interventions.steer import AddVector, Steer
from pipeline.llama.hooks import HookPoint
from pipeline.readout import Reader, TextPieces
from sae.errors import ConfigError

from .interventions.tiny import dense_acts, hf_logits, prompt, residual, run, sae_at, session, tiny
from .tiny_llama import BOS_ID, EOS_ID

POST = "blocks.{}.hook_resid_post"


def point(block):
    return HookPoint.parse(POST.format(block))


def events_of(s, tokens, **options):
    return list(generate(s, tiny()[0], tokens, **({"max_tokens": 8} | options)))


def log_softmax(logits_TV):
    logits_TV = logits_TV.astype(np.float64)
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))


def test_greedy_generation_is_hfs_and_every_logprob_too():
    tokens = prompt()
    events = events_of(session(), tokens)
    assert [e.token for e in events[: len(tokens)]] == tokens.tolist()
    assert [e.phase for e in events] == ["prompt"] * len(tokens) + ["response"] * 8
    assert [e.pos for e in events] == list(range(len(tokens) + 8))
    ids = np.array([e.token for e in events])
    log_p = log_softmax(hf_logits(ids, {}))
    assert log_p[len(tokens) - 1 : -1].argmax(axis=1).tolist() == ids[len(tokens) :].tolist()
    assert events[0].logprob is None
    expected = log_p[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([e.logprob for e in events[1:]], expected, atol=2e-5)


def test_readings_are_the_saes_equations_on_hfs_rows():
    import torch

    from .interventions.tiny import twin

    sae, tokens = sae_at(2), prompt()
    events = events_of(session(), tokens, readers=[Reader(sae, top=4)])
    ids = torch.tensor([[e.token for e in events]])
    with torch.no_grad():
        x_TD = twin()(ids, output_hidden_states=True).hidden_states[3][0].double().numpy()
    a_TF = dense_acts(sae, x_TD)
    gap_T = ((x_TD - a_TF @ sae.W_dec_FD - sae.b_dec_D) ** 2).sum(axis=1) / sae.variance
    assert events[0].flagged
    assert (events[0].latents, events[0].l0, events[0].fvu) == ((), None, None)
    for event in events[1:]:
        order = np.argsort(-a_TF[event.pos])[:4]
        assert [latent for latent, _ in event.latents] == order.tolist()
        np.testing.assert_allclose([a for _, a in event.latents], a_TF[event.pos, order], rtol=1e-4)
        assert event.l0 == (a_TF[event.pos] > 0).sum()
        assert event.fvu == pytest.approx(gap_T[event.pos], rel=1e-4)


def test_readers_at_several_blocks_the_last_included_are_read_in_order():
    readers = [Reader(sae_at(3)), Reader(sae_at(0), top=1)]
    events = events_of(session(), prompt(), readers=readers)
    for event in events[1:]:
        assert [r.hook for r in event.readings] == [POST.format(3), POST.format(0)]
        assert len(event.readings[1].latents) <= 1


def test_a_reader_sees_the_value_before_an_edit_at_its_point_and_after_edits_before_it():
    tokens, sae, s = prompt(), sae_at(2), session()
    push = np.full(64, 3.0, np.float32)
    plain, here, earlier = (
        events_of(s, tokens, readers=[Reader(sae)], interventions=edits, max_tokens=0)
        for edits in (
            [],
            [AddVector(point=HookPoint.parse("blocks.3.hook_resid_pre"), vector_D=push)],  # the same tensor
            [AddVector(point=point(1), vector_D=push)],
        )
    )
    assert [e.latents for e in here] == [e.latents for e in plain]
    assert [e.latents for e in earlier] != [e.latents for e in plain]
    assert here[-1].logprob != plain[-1].logprob


@pytest.mark.parametrize("phase", ["all", "response"])
def test_a_steered_generation_equals_the_whole_sequence_computed_from_scratch(phase):
    tokens, s = prompt(), session()
    first, second = sae_at(1), sae_at(3)
    where = Where(phase=phase)
    edits = [
        Steer(point=point(1), weights=first, latents=(7,), coeffs=(6.0,), where=where),
        Clamp(point=point(2), weights=sae_at(2), latents=(1, 2), values=(2.0, 0.0), where=where),
        Reconstruct(point=point(3), weights=second, where=where),
    ]
    events = events_of(s, tokens, interventions=edits, max_tokens=12)
    ids = np.array([e.token for e in events], np.int32)
    assert len(ids) == len(tokens) + 12
    logits = run(session(), ids, edits, prompt_tokens=len(tokens))
    np.testing.assert_allclose([e.logprob for e in events[1:]], token_logprobs(logits[:-1], ids[1:]), atol=2e-5)
    assert logits[len(tokens) - 1 : -1].argmax(axis=1).tolist() == ids[len(tokens) :].tolist()
    plain = events_of(s, tokens, max_tokens=12)
    assert [e.token for e in plain] != ids.tolist()
    if phase == "response":  # the prompt's own log-probabilities are untouched, the last position acts on what follows
        assert [e.logprob for e in events[: len(tokens)]] == [e.logprob for e in plain[: len(tokens)]]


def test_a_plain_generation_after_a_steered_one_is_the_one_of_a_fresh_context():
    tokens, s = prompt(), session()
    events_of(s, tokens, interventions=[Steer(point=point(1), weights=sae_at(1), latents=(7,), coeffs=(20.0,))])
    assert events_of(s, tokens) == events_of(session(), tokens)


def test_a_prompt_longer_than_a_batch_is_decoded_in_parts_with_the_same_result():
    tokens, sae = prompt("def add(self, first, second):\n" * 6), sae_at(2)
    edits = [Steer(point=point(1), weights=sae, latents=(7,), coeffs=(6.0,))]
    whole = events_of(session(), tokens, readers=[Reader(sae)], interventions=edits)
    parts = events_of(session(n_batch=16), tokens, readers=[Reader(sae)], interventions=edits)
    assert len(tokens) > 40
    assert [e.token for e in parts] == [e.token for e in whole]
    np.testing.assert_allclose([e.logprob for e in parts[1:]], [e.logprob for e in whole[1:]], atol=2e-5)
    for a, b in zip(parts[1:], whole[1:], strict=True):
        assert a.fvu == pytest.approx(b.fvu, rel=1e-4)


def test_an_end_token_stops_the_generation_and_gives_no_event():
    unembedding = tiny()[0].unembed()
    toward_eos = AddVector(point=point(3), vector_D=1000 * unembedding.W_VD[EOS_ID], where=Where(phase="response"))
    tokens = prompt()
    assert len(events_of(session(), tokens, interventions=[toward_eos])) == len(tokens)
    late = Where(phase="response", positions=(len(tokens) + 2,))
    edits = [AddVector(point=point(3), vector_D=1000 * unembedding.W_VD[EOS_ID], where=late)]
    events = events_of(session(), tokens, interventions=edits)
    assert len(events) == len(tokens) + 3  # the edit acts on the token after position len + 2
    assert EOS_ID not in [e.token for e in events]


def test_text_is_whole_characters_and_loses_nothing():
    text = "x = 'é→漢🙂'  # ok\n"
    tokens = prompt(text)
    events = events_of(session(), tokens, max_tokens=0)
    assert len(events) > len(text)  # several tokens for one character
    assert "".join(e.text for e in events[1:]) == text
    assert {"é", "→", "漢", "🙂"} <= set("".join(e.text for e in events))
    assert "" in [e.text for e in events]  # held back
    assert not any("\ufffd" in e.text for e in events)


def test_an_unfinished_character_at_the_end_is_given_up_with_the_last_token():
    tokens = prompt("ab 漢")[:-1]
    events = events_of(session(), tokens, max_tokens=0)
    assert events[-1].text == "\ufffd"
    pieces = TextPieces()
    assert [pieces.feed(b"\xe6"), pieces.feed(b"\xbc"), pieces.feed(b"\xa2a")] == ["", "", "漢a"]


def test_sampling_follows_the_seed():
    tokens, s = prompt(), session()
    ids = [[e.token for e in events_of(s, tokens, temperature=1.5, seed=seed)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_samples_have_the_softmaxs_frequencies():
    rng = np.random.default_rng(0)
    logits_V, temperature, n = np.array([1.0, 0.0, -1.0, 2.0, -30.0]), 0.7, 20_000
    p_V = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    counts_V = np.bincount([sample(logits_V, temperature, rng) for _ in range(n)], minlength=5)
    assert (np.abs(counts_V - n * p_V) < 4.5 * np.sqrt(n * p_V * (1 - p_V)) + 1).all()
    assert sample(logits_V, 0.0, rng) == 3


def test_an_event_is_one_line_of_json_with_the_documented_fields():
    sae = sae_at(2)
    events = events_of(session(), prompt(), readers=[Reader(sae)], max_tokens=1)
    for event in (events[0], events[-1]):
        assert "\n" not in event.to_json()
        values = json.loads(event.to_json())
        assert values.keys() == {
            "token", "text", "pos", "phase", "flagged", "logprob", "latents", "l0", "fvu", "readings",
        }  # fmt: skip
    assert values["latents"] == [[latent, pytest.approx(a)] for latent, a in events[-1].latents]
    assert values["readings"][0]["hook"] == POST.format(2)
    assert values["phase"] == "response"


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([BOS_ID, 512], {}, r"should be 0\.\.511, got 0\.\.512"),
        ([BOS_ID, 5], {"max_tokens": 300}, "the context holds 256"),
        ([BOS_ID, 5], {"temperature": -1.0}, "should be at least 0"),
        ([BOS_ID, 5], {"temperature": float("nan")}, "should be at least 0"),
        ([BOS_ID, 5], {"max_tokens": -1}, "should be at least 0"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_runs(tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(session(), tiny()[0], tokens, **({"max_tokens": 2} | options))


def test_a_named_intervention_key_changes_with_everything_that_changes_the_numbers():
    sae, other = sae_at(2), sae_at(2, seed=1)
    steer = {"point": point(2), "weights": sae, "latents": (1,), "coeffs": (2.0,)}
    clamp = {"point": point(2), "weights": sae, "latents": (1,), "values": (2.0,)}
    keys = [
        Steer(**steer).key(),
        Steer(**(steer | {"point": point(1)})).key(),
        Steer(**(steer | {"weights": other})).key(),
        Steer(**(steer | {"latents": (2,)})).key(),
        Steer(**(steer | {"coeffs": (2.5,)})).key(),
        Steer(**steer, where=Where(phase="prompt")).key(),
        Steer(**steer, where=Where(positions=(3,))).key(),
        Clamp(**clamp).key(),
        Clamp(**(clamp | {"values": (2.5,)})).key(),
        Clamp(**(clamp | {"weights": other})).key(),
        Reconstruct(point=point(2), weights=sae).key(),
        Reconstruct(point=point(2), weights=sae, keep_error=True).key(),
    ]
    assert len(set(keys)) == len(keys)
    assert Steer(**steer).key() == Steer(**steer).key()


def test_prompt_length_is_part_of_the_key_where_a_phase_depends_on_it():
    from pipeline.interventions.base import Sequences

    steer = Steer(point=point(2), weights=sae_at(2), latents=(1,), coeffs=(2.0,), where=Where(phase="response"))
    keys = []
    for length in (4, 5):
        sequences = Sequences()
        sequences.start(0, [False] * length)
        keys.append(edits_key([steer], sequences))
    assert keys[0] != keys[1]
    assert edits_key([], sequences) == ""
    assert edit_hooks([], sequences) == []


def test_the_residual_read_in_a_generation_is_the_captured_one():
    tokens, sae, s = prompt(), sae_at(2), session()
    events = events_of(s, tokens, readers=[Reader(sae, top=6)], max_tokens=0)
    a_TF = dense_acts(sae, residual(s, tokens, POST.format(2)))
    assert [latent for latent, _ in events[3].latents] == np.argsort(-a_TF[3])[: events[3].l0].tolist()
