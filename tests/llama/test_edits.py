"""Edits of the forward pass: exact, per sequence, and never left behind in the KV cache."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pipeline.llama.hooks import HookPoint
from pipeline.llama.session import Hook
from sae.errors import LlamaError
from tests.llama.support import HEADS, D, collect, exact, flat, relative, sequences, tiny
from tests.tiny_llama import hf_model

TOKENS = sequences()[0]
ONE = (TOKENS, np.zeros(len(TOKENS), int), np.arange(len(TOKENS)))
EDITABLE = [
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_z",
]


def editing(point: str, delta) -> Hook:
    return Hook(HookPoint.parse(point), edit=lambda rows: np.broadcast_to(delta, rows.values_ND.shape).copy())


def steering(width: int = D, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


@functools.cache
def twin():
    return hf_model(tiny()[1], heads=HEADS)


def hf_edited(place, delta: np.ndarray, *, inputs: bool = False) -> np.ndarray:
    """Logits of HF's model with `delta` added to the output (or input) of the module `place(model)`."""
    import torch

    model, shift = twin(), torch.from_numpy(delta)
    module = place(model)
    if inputs:
        handle = module.register_forward_pre_hook(lambda _m, i: (i[0] + shift, *i[1:]))
    else:
        handle = module.register_forward_hook(
            lambda _m, _i, o: (o[0] + shift, *o[1:]) if isinstance(o, tuple) else o + shift
        )
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS[None].astype(np.int64))).logits[0].numpy()
    handle.remove()
    return logits


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("site", EDITABLE)
def test_adding_nothing_changes_no_bit_of_the_logits(site, block):
    with exact() as session:
        plain = session.decode(*ONE, logits="all")
        session.clear()
        hook = editing(f"blocks.{block}.{site}", np.float32(0))
        assert np.array_equal(session.decode(*ONE, hooks=[hook], logits="all", edits_key="zero"), plain)


@pytest.mark.parametrize(
    ("site", "place", "inputs"),
    [
        ("hook_resid_pre", lambda layer: layer, True),
        ("hook_resid_mid", lambda layer: layer, None),
        ("hook_resid_post", lambda layer: layer, False),
        ("hook_attn_out", lambda layer: layer.self_attn, False),
        ("hook_mlp_out", lambda layer: layer.mlp, False),
        ("mlp.hook_post", lambda layer: layer.mlp.down_proj, True),
        ("attn.hook_q", lambda layer: layer.self_attn.q_proj, False),
        ("attn.hook_k", lambda layer: layer.self_attn.k_proj, False),
        ("attn.hook_v", lambda layer: layer.self_attn.v_proj, False),
        ("attn.hook_z", lambda layer: layer.self_attn.o_proj, True),
    ],
)
@pytest.mark.parametrize("block", [1, 3])
def test_an_edit_equals_the_same_edit_in_transformers(site, place, inputs, block):
    width = {"mlp.hook_post": 96, "attn.hook_k": 32, "attn.hook_v": 32}.get(site, D)
    delta = steering(width)
    with exact() as session:
        mine = session.decode(*ONE, hooks=[editing(f"blocks.{block}.{site}", delta)], logits="all", edits_key="x")
        plain = exact().decode(*ONE, logits="all")
    # resid_mid = resid_pre + attn_out: in HF the edit of attn_out moves resid_mid, and nothing else, by the same
    if inputs is None:
        theirs = hf_edited(lambda m: m.model.layers[block].self_attn, delta)
    else:
        theirs = hf_edited(lambda m: place(m.model.layers[block]), delta, inputs=inputs)
    assert relative(mine, theirs) < 1e-5
    assert relative(plain, theirs) > 1e-2  # the edit matters


@pytest.mark.parametrize(("site", "norm"), [("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")])
def test_an_edit_before_a_norms_gain_is_multiplied_by_it(site, norm):
    delta, weight = steering(), getattr(twin().model.layers[1], norm).weight.detach().numpy()
    assert np.ptp(weight) > 0.01
    with exact() as session:
        hook = editing(f"blocks.1.{site}.hook_normalized", delta)
        mine = session.decode(*ONE, hooks=[hook], logits="all", edits_key="x")
    assert relative(mine, hf_edited(lambda m: getattr(m.model.layers[1], norm), delta * weight)) < 1e-5


def test_a_steered_point_moves_by_exactly_the_vector():
    point, delta = "blocks.2.hook_resid_post", steering()
    before, after = collect(point), collect("blocks.3.hook_resid_pre")
    with exact() as session:
        session.decode(*ONE, hooks=[before[0], editing(point, delta), after[0]], edits_key="steer")
    for place, x in before[1].items():
        assert np.array_equal(after[1][place], x + delta)


def test_an_edit_for_one_sequence_leaves_the_others_as_they_are_alone():
    delta = steering()
    point = HookPoint.parse("blocks.1.hook_resid_post")
    hook = Hook(point, edit=lambda rows: np.where((rows.seq_N == 2)[:, None], delta, np.float32(0)))
    tokens_N, seq_N, pos_N = flat(sequences())
    for kv_unified in (True, False):
        with exact(n_ctx=2560, n_ubatch=16, kv_unified=kv_unified) as session:
            together = session.decode(tokens_N, seq_N, pos_N, hooks=[hook], logits="all", edits_key="one")
        for s, tokens in enumerate(sequences()):
            with exact(n_seq_max=1) as alone:
                hooks = [editing(str(point), delta)] if s == 2 else []
                expected = alone.decode(
                    tokens, np.zeros(len(tokens), int), np.arange(len(tokens)), hooks=hooks, logits="all"
                )
            assert relative(together[seq_N == s], expected) < 1e-5


def test_an_edit_in_the_last_block_reaches_the_logits_asked_for():
    delta = steering()
    with exact() as session:
        hook = editing("blocks.3.hook_resid_post", delta)
        last = session.decode(*ONE, hooks=[hook], logits="last", edits_key="x")
    assert relative(last[0], hf_edited(lambda m: m.model.layers[3], delta)[-1]) < 1e-5


def test_a_plain_prompt_after_a_steered_one_is_bit_identical_to_a_fresh_context():
    with exact() as session, exact() as fresh:
        steered = session.decode(*ONE, hooks=[editing("blocks.1.hook_resid_post", steering())], logits="all")
        session.clear()
        plain = session.decode(*ONE, logits="all")
        expected = fresh.decode(*ONE, logits="all")
    assert np.array_equal(plain, expected)
    assert relative(steered, expected) > 1e-2


def test_tokens_may_not_follow_on_a_kv_made_under_other_edits():
    hook = editing("blocks.1.hook_resid_post", steering())
    next_token = ([5], [0], [len(TOKENS)])
    with exact() as session:
        session.decode(*ONE, hooks=[hook], edits_key="steer")
        for options in ({}, {"hooks": [hook], "edits_key": "other"}, {"hooks": [hook]}):
            with pytest.raises(LlamaError, match=r"made under the edits 'steer'.*clear"):
                session.decode(*next_token, **options)
        steered = session.decode(*next_token, hooks=[hook], edits_key="steer", logits="last")
        session.clear()
        whole = session.decode(
            np.r_[TOKENS, 5], np.zeros(18, int), np.arange(18), hooks=[hook], edits_key="steer", logits="last"
        )
        assert relative(steered, whole) < 1e-5
        session.clear()
        session.decode(*ONE)
        with pytest.raises(LlamaError, match="made under the edits ''"):
            session.decode(*next_token, hooks=[hook], edits_key="steer")


def test_nothing_follows_edits_without_a_key():
    hook = editing("blocks.1.hook_resid_post", steering())
    with exact() as session:
        session.decode(*ONE, hooks=[hook])
        with pytest.raises(LlamaError, match="unnamed edits"):
            session.decode([5], [0], [len(TOKENS)], hooks=[hook])


def test_an_edit_of_the_wrong_shape_is_refused_and_the_session_goes_on():
    hook = Hook(HookPoint.parse("blocks.1.hook_resid_post"), edit=lambda rows: np.zeros(3, np.float32))
    with exact() as session:
        with pytest.raises(LlamaError, match=r"returned shape \(3,\), expected \(17, 64\)"):
            session.decode(*ONE, hooks=[hook])
        assert np.array_equal(session.decode(*ONE, logits="all"), exact().decode(*ONE, logits="all"))


def test_the_attention_pattern_cannot_be_edited():
    with exact() as session, pytest.raises(LlamaError, match="can be read, not edited"):
        session.decode(*ONE, hooks=[editing("blocks.1.attn.hook_pattern", np.float32(0))])
