"""Captured values against HF transformers on the same weights, however the batch is cut."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pipeline.llama.hooks import HookPoint
from pipeline.llama.session import Session, capture
from tests.llama.support import BLOCKS, collect, exact, flat, hf_values, points, relative, sequences, tiny

SITES = [
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
    "attn.hook_pattern",
]
RAW = ("ggml:attn_norm-2", "ggml:Qcur-1#0")


@functools.cache
def oracle(dtype: str = "F32") -> list[dict[str, np.ndarray]]:
    weights = tiny(dtype)[1]
    return [hf_values(weights, tokens) for tokens in sequences()]


def worst(found, dtype="F32") -> float:
    """The largest relative difference of any point of any sequence; every point HF has must be there."""
    differences = []
    for mine, theirs in zip(found, oracle(dtype), strict=True):
        for name, values in mine.items():
            assert values.shape == theirs[name].shape, name
            differences.append(relative(values, theirs[name]))
    return max(differences)


def test_a_llama_has_every_point_in_every_block():
    names = set(exact().hook_points())
    assert names == {f"blocks.{i}.{site}" for i in range(BLOCKS) for site in SITES} | {
        "ln_final.hook_normalized",
        "logits",
    }
    assert names == set(oracle()[0])


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [512, 7])
def test_every_point_equals_transformers_for_unequal_sequences_in_one_batch(kv_unified, n_ubatch):
    n_ctx = 512 if kv_unified else 2560
    with exact(n_ctx=n_ctx, n_batch=128, n_ubatch=n_ubatch, kv_unified=kv_unified) as session:
        found = capture(session, sequences(), points(session), stop_early=False)
        assert all(set(values) == set(session.hook_points()) for values in found)
    assert worst(found) < 1e-5


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_default_settings_are_within_a_thousandth(dtype, kv_unified):
    with Session(tiny(dtype)[0], n_ctx=2560, n_batch=128, n_seq_max=5, n_threads=1, kv_unified=kv_unified) as session:
        found = capture(session, sequences(), points(session))
        assert not any("pattern" in name for name in found[0])  # the default is flash attention
        assert "blocks.3.hook_resid_post" in found[0]
    for name in found[0]:
        mine, theirs = (np.concatenate([v[name] for v in values]) for values in (found, oracle(dtype)))
        assert relative(mine, theirs) < 1e-3, name


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_sequence_in_a_batch_equals_the_sequence_alone(kv_unified):
    with exact(n_ctx=2560, n_batch=128, n_ubatch=16, kv_unified=kv_unified) as session:
        chosen = points(session)
        together = capture(session, sequences(), chosen)
        for tokens, values in zip(sequences(), together, strict=True):
            with exact(n_seq_max=1) as single:
                (alone,) = capture(single, [tokens], chosen)
            for name, x in alone.items():
                assert relative(values[name], x) < 1e-5, name


def test_a_long_sequence_runs_in_parts_of_a_batch():
    tokens = np.concatenate(sequences())
    with exact(n_seq_max=1, n_batch=32, n_ubatch=20) as parts, exact(n_seq_max=1) as whole:
        (a,), (b,) = (capture(s, [tokens], points(s)) for s in (parts, whole))
    assert set(a) == set(b)
    assert max(relative(a[name], b[name]) for name in a) < 1e-5


def test_tokens_of_several_sequences_may_be_mixed_in_one_batch():
    tokens_N, seq_N, pos_N = flat(sequences())
    order = np.lexsort((seq_N, pos_N))  # position by position
    for kv_unified in (True, False):
        with exact(n_ctx=2560, n_ubatch=16, kv_unified=kv_unified) as session:
            hook, rows = collect("blocks.3.hook_resid_post")
            logits = session.decode(tokens_N[order], seq_N[order], pos_N[order], hooks=[hook], logits="all")
        for s, theirs in enumerate(oracle()):
            mine = np.stack([rows[s, p] for p in range(len(sequences()[s]))])
            assert relative(mine, theirs["blocks.3.hook_resid_post"]) < 1e-5
            assert relative(logits[seq_N[order] == s], theirs["logits"]) < 1e-5


def test_logits_of_the_last_tokens_come_in_batch_order_however_the_batch_is_cut():
    for kv_unified in (True, False):
        with exact(n_ctx=2560, n_ubatch=16, kv_unified=kv_unified) as session:
            last = session.decode(*flat(sequences()), logits="last")
        assert last.shape == (5, 512)
        for row, theirs in zip(last, oracle(), strict=True):
            assert relative(row, theirs["logits"][-1]) < 1e-5


def test_a_sequence_goes_on_token_by_token():
    tokens = sequences()[2]
    with exact(n_seq_max=1) as session:
        session.decode(tokens[:30], np.zeros(30, int), np.arange(30))
        for p in range(30, 40):
            hook, rows = collect("blocks.1.attn.hook_pattern")
            logits = session.decode(tokens[p : p + 1], [0], [p], hooks=[hook], logits="last")
            assert relative(logits[0], oracle()[2]["logits"][p]) < 1e-5
            assert relative(rows[0, p], oracle()[2]["blocks.1.attn.hook_pattern"][p, :, : p + 1]) < 1e-5
        assert session.n_past.tolist() == [40]


def test_a_raw_tensor_can_be_read_by_its_ggml_name():
    with exact(n_seq_max=1) as session:
        (values,) = capture(session, sequences()[:1], list(map(HookPoint.parse, RAW)))
    x = oracle()[0]["blocks.2.hook_resid_pre"].astype(np.float64)
    weight = tiny()[1]["model.layers.2.input_layernorm.weight"]
    expected = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight
    assert relative(values["ggml:attn_norm-2"], expected) < 1e-5
    assert values["ggml:Qcur-1#0"].shape == (17, 64)
