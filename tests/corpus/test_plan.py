"""The plan: whole windows in batches, every row in exactly one shard, buffers that fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ExtractConfig, StoreConfig
from pipeline.corpus.plan import make_plan
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from sae.errors import ConfigError

from .test_windows import PairTokenizer


def table(lengths, context=16):
    documents = [Document(name=str(i), text="c" * n) for i, n in enumerate(lengths)]
    return windows(PairTokenizer(), documents, context)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30),
    batch_tokens=st.integers(16, 100),
    shard_rows=st.sampled_from([0, 0, 1, 7, 32, 100]),
    buffer_bytes=st.integers(200, 100_000),
    width=st.integers(1, 40),
)
def test_batches_hold_whole_windows_and_shards_cover_every_row_once(
    lengths, batch_tokens, shard_rows, buffer_bytes, width
):
    rows = table(lengths)
    hooks = {"a": width, "b": 3}
    store = StoreConfig(buffer_bytes=buffer_bytes, chunk_bytes=512, shard_rows=shard_rows)
    plan = make_plan(rows, hooks=hooks, extract=ExtractConfig(batch_tokens=batch_tokens), store=store)
    sizes = np.diff(plan.batch_rows)
    assert sizes.max() <= batch_tokens
    assert sizes.sum() == plan.rows == rows.rows
    np.testing.assert_array_equal(plan.batch_rows, rows.window_starts[plan.batch_windows])
    assert (np.diff(plan.batch_windows) > 0).all()
    assert plan.shard_rows % plan.chunk_rows == 0
    if shard_rows:
        assert shard_rows <= plan.shard_rows < 2 * shard_rows
    else:
        assert 2 * plan.shard_rows * sum(hooks.values()) * plan.itemsize <= buffer_bytes
    covered = np.concatenate([np.arange(*plan.shard_range(k)) for k in range(plan.n_shards)])
    np.testing.assert_array_equal(covered, np.arange(plan.rows))
    for shard in range(plan.n_shards):
        start, stop = plan.shard_range(shard)
        batches = plan.batches_of(start, stop)
        overlap = [b for b in range(plan.n_batches) if plan.batch_rows[b] < stop and plan.batch_rows[b + 1] > start]
        assert list(batches) == overlap


def test_a_small_corpus_gets_several_shards_and_a_large_one_what_the_buffer_holds():
    small = make_plan(table([400] * 10), hooks={"a": 64}, extract=ExtractConfig(), store=StoreConfig())
    assert 8 <= small.n_shards <= 17
    tight = StoreConfig(buffer_bytes=64 * 2 * 2 * 100)
    large = make_plan(table([400] * 10), hooks={"a": 64}, extract=ExtractConfig(), store=tight)
    assert large.shard_rows <= 100


def test_the_same_settings_give_the_same_hash_and_others_another():
    rows = table([100, 200])

    def digest(hooks=None, **change):
        extract = ExtractConfig(batch_tokens=change.pop("batch_tokens", 64), dtype=change.pop("dtype", "auto"))
        return make_plan(rows, hooks=hooks or {"a": 8}, extract=extract, store=StoreConfig(**change)).config_hash

    assert digest() == digest()
    assert (
        len({digest(), digest({"b": 8}), digest(batch_tokens=32), digest(dtype="float32"), digest(shard_rows=64)}) == 5
    )


@pytest.mark.parametrize(
    ("hooks", "extract", "store", "message"),
    [
        ({}, {}, {}, "hook.points is empty"),
        ({"a": 8}, {"dtype": "int8"}, {}, "auto, float16, bfloat16, float32"),
        ({"a": 8}, {"batch_tokens": 15}, {}, "batch_tokens=15"),
        ({"a": 8}, {}, {"buffer_bytes": 8}, "buffer_bytes=8"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_number(hooks, extract, store, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(table([100]), hooks=hooks, extract=ExtractConfig(**extract), store=StoreConfig(**store))
