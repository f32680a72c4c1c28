"""Attention heads switched off inside llama.cpp, against HF with the same columns of o_proj's input changed."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.interventions.base import Sequences, Where
from pipeline.interventions.heads import AblateHeads, columns_of, named_heads
from pipeline.llama.hooks import HookPoint
from sae.errors import ConfigError, ShapeError

from .tiny import BLOCKS, D, hf_logits, prompt, relative, residual, run, session, tiny

HEADS, EACH = 4, 16
ALL = Where(flagged=True)


def z(block):
    return HookPoint.parse(f"blocks.{block}.attn.hook_z")


def off(block, *heads, where=ALL, mean_D=None):
    return AblateHeads(point=z(block), heads=heads, count=HEADS, where=where, mean_D=mean_D)


def without(*heads, value_D=None, rows=slice(None)):
    """What HF does in place of it."""

    def edit(x_TD):
        out = x_TD.copy()
        for head in heads:
            part = slice(head * EACH, (head + 1) * EACH)
            out[rows, part] = 0 if value_D is None else value_D[part]
        return out

    return edit


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("heads", [(0,), (3,), (2, 1)])
def test_logits_are_those_of_the_same_heads_off_in_hf(block, heads):
    tokens = prompt()
    expected = hf_logits(tokens, {(block, "z"): without(*heads)})
    assert relative(run(session(), tokens, [off(block, *heads)]), expected) < 1e-5
    assert relative(expected, hf_logits(tokens, {})) > 1e-3


def test_heads_of_several_blocks_and_with_flash_attention():
    tokens = prompt()
    edits = [off(0, 1), off(2, 0, 3)]
    expected = hf_logits(tokens, {(0, "z"): without(1), (2, "z"): without(0, 3)})
    assert relative(run(session(), tokens, edits), expected) < 1e-5
    assert relative(run(session(flash_attn="on", kv_type="f16"), tokens, edits), expected) < 5e-3


def test_the_mean_takes_their_place():
    tokens = prompt()
    mean_D = residual(session(), tokens, str(z(1))).mean(axis=0)
    expected = hf_logits(tokens, {(1, "z"): without(2, value_D=mean_D)})
    assert relative(run(session(), tokens, [off(1, 2, mean_D=mean_D)]), expected) < 1e-5
    assert relative(expected, hf_logits(tokens, {(1, "z"): without(2)})) > 1e-3


def test_the_columns_are_exactly_zero_and_the_others_untouched():
    tokens, s = prompt(), session()
    before, after = (residual(s, tokens, str(z(2)), edits) for edits in ([], [off(2, 1)]))
    columns = columns_of([1], HEADS, D)
    np.testing.assert_array_equal(after[:, columns], 0)
    np.testing.assert_array_equal(np.delete(after, columns, 1), np.delete(before, columns, 1))
    mean_D = 1e-8 * np.linspace(0.1, 0.7, D, dtype=np.float32)  # beside which x is large
    after = residual(s, tokens, str(z(2)), [off(2, 1, mean_D=mean_D)])
    np.testing.assert_array_equal(after[:, columns], np.tile(mean_D[columns], (len(after), 1)))


def test_no_head_is_the_clean_run_bit_for_bit_and_all_heads_leave_the_attention_nothing():
    tokens, s = prompt(), session()
    np.testing.assert_array_equal(run(s, tokens, [off(1)]).copy(), run(s, tokens))
    out_TD = residual(s, tokens, "blocks.1.hook_attn_out", [off(1, *range(HEADS))])
    np.testing.assert_array_equal(out_TD, 0)


def test_bos_is_left_alone_only_where_that_is_asked_for():
    tokens = prompt()
    kept = run(session(), tokens, [off(0, 1, where=Where())])
    assert relative(kept, hf_logits(tokens, {(0, "z"): without(1, rows=slice(1, None))})) < 1e-5
    whole = run(session(), tokens, [off(0, 1)])
    assert relative(whole, hf_logits(tokens, {(0, "z"): without(1)})) < 1e-5
    assert relative(whole, kept) > 1e-5


def test_flagged_rows_of_a_phase():
    sequences = Sequences()
    sequences.start(0, [True, False, True])
    sequences.append(0, False)
    sequences.append(0, True)
    seq_N, pos_N = np.zeros(5, int), np.arange(5)
    for where, rows in (
        (Where(flagged=True), [0, 1, 2, 3, 4]),
        (Where(), [1, 3]),
        (Where(flagged=True, phase="prompt"), [0, 1, 2]),
        (Where(flagged=True, phase="response"), [2, 3, 4]),
        (Where(flagged=True, positions=(1, 4)), [1, 4]),
    ):
        assert np.flatnonzero(where.covers(seq_N, pos_N, sequences)).tolist() == rows
    assert Where().key() != Where(flagged=True).key()


def test_keys_name_heads_mean_and_place():
    mean_D = np.ones(D, np.float32)
    keys = [off(0, 1), off(0, 2), off(1, 1), off(0, 1, 2), off(0, 1, mean_D=mean_D), off(0, 1, mean_D=2 * mean_D)]
    keys += [off(0, 1, where=Where()), AblateHeads(point=z(0), heads=(1,), count=8, where=ALL)]
    assert len({one.key() for one in keys}) == len(keys)
    assert off(0, 1, 2).key() == off(0, 2, 1).key()


def test_the_graph_knows_how_many_heads_there_are(monkeypatch):
    graph = tiny()[0].graph
    assert graph.heads() == dict.fromkeys(range(BLOCKS), HEADS)
    monkeypatch.setattr(graph, "targets", dict(reversed(graph.targets.items())))
    assert list(graph.heads()) == list(range(BLOCKS))
    monkeypatch.delitem(graph.targets, z(1))  # a block whose heads do not lie side by side in one tensor
    assert list(graph.heads()) == [0, 2, 3]


def test_names_of_heads():
    counts = {0: 4, 2: 3}
    assert named_heads(["L2H1", "L0H3", "L2H0", "L0H3"], counts) == {0: (3,), 2: (0, 1)}
    assert named_heads(["L2H*", "L2H1"], counts) == {2: (0, 1, 2)}
    assert list(named_heads(["L2H0", "L0H0"], counts)) == [0, 2]
    assert columns_of([2, 0], 4, 8).tolist() == [0, 1, 4, 5]
    for name, said in (
        ("3.5", "L3H5"),
        ("L1H0", "blocks with heads: 0, 2"),
        ("L2H3", r"heads 0\.\.2"),
        ("l0h0", "L3H5"),
        ("L2H0L0H1", "L3H5"),
    ):
        with pytest.raises(ConfigError, match=said):
            named_heads([name], counts)


def test_what_does_not_fit_is_refused():
    for heads in ((4,), (-1,), (1, 1)):
        with pytest.raises(ConfigError):
            off(0, *heads)
    with pytest.raises(ShapeError, match="5 heads"):
        run(session(), prompt(), [AblateHeads(point=z(0), heads=(1,), count=5)])
    with pytest.raises(ShapeError, match="the mean is 3 wide"):
        run(session(), prompt(), [off(0, 1, mean_D=np.zeros(3, np.float32))])
