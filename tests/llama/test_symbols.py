"""The C side: one ggml in the process, the struct layout, the order of rows in a micro-batch."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest

from pipeline.llama import symbols
from pipeline.llama.batches import split_equal, split_simple
from pipeline.llama.tensors import half_apart
from sae.errors import LlamaError
from tests.llama.support import collect, exact, flat, sequences
from tests.tiny_llama import interleave_rows


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_exactly_one_ggml_is_mapped_after_everything_ran():
    with exact() as session:
        session.decode(*flat(sequences()), logits="last")
    assert len(symbols.mapped_ggml_bases()) == 1


def test_a_struct_that_does_not_fit_is_refused(monkeypatch):
    symbols.check_layout()

    class Shifted(ctypes.Structure):
        _fields_ = (("inserted", ctypes.c_int64), *symbols.GgmlTensor._fields_)

    monkeypatch.setattr(symbols, "GgmlTensor", Shifted)
    with pytest.raises(LlamaError, match=r"lays out ggml_tensor differently.*0\.3\.36"):
        symbols.check_layout()


def test_a_symbol_this_build_lacks_is_named():
    with pytest.raises(LlamaError, match="no symbol 'ggml_none_such'"):
        symbols.function("ggml_none_such", None)


def test_one_buffer_for_all_sequences_keeps_batch_order():
    pieces = split_simple(10, 4)
    assert [p.tolist() for p in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_buffer_per_sequence_takes_equal_shares_side_by_side():
    seq_N = np.repeat([0, 1], [100, 60])
    assert [len(p) for p in split_equal(seq_N, 512)] == [120, 40]
    first, rest = split_equal(seq_N, 512)
    assert first.tolist() == [*range(60), *range(100, 160)]
    assert rest.tolist() == [*range(60, 100)]


def test_every_token_is_in_exactly_one_piece():
    rng = np.random.default_rng(0)
    for _ in range(100):
        seq_N = rng.integers(0, rng.integers(1, 6), rng.integers(1, 50))
        n_ubatch = int(rng.integers(1, 20))
        pieces = split_equal(seq_N, n_ubatch)
        assert sorted(np.concatenate(pieces).tolist()) == list(range(len(seq_N)))


@pytest.mark.parametrize("seed", range(12))
def test_predicted_pieces_are_those_llama_runs_for_any_order_of_sequences(seed):
    rng = np.random.default_rng(seed)
    seq_N = rng.integers(0, 5, 40) if seed % 2 else np.repeat(rng.permutation(5), rng.integers(1, 12, 5))
    pos_N = np.array([(seq_N[:i] == s).sum() for i, s in enumerate(seq_N)])
    with exact(n_ctx=2560, n_ubatch=int(rng.integers(5, 30)), kv_unified=False) as session:
        hook, rows = collect("blocks.0.hook_resid_pre")
        session.decode(rng.integers(2, 512, len(seq_N)), seq_N, pos_N, hooks=[hook])  # raises where they differ
    assert len(rows) == len(seq_N)


def test_rope_pairs_are_put_back_half_a_head_apart():
    rows = np.arange(32, dtype=np.float32)[:, None]
    assert interleave_rows(rows, 2)[half_apart(32, 2)].ravel().tolist() == list(range(32))
