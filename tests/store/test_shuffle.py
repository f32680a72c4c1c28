"""Shuffled batches: every unflagged row once per epoch, a new order each epoch, exact resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.windows import FLAG_BOS, FLAGS_ALL
from pipeline.store.reader import ActivationStore
from sae.errors import ConfigError, StoreError

from .helpers import fill, known_rows, make_meta

HOOK = "blocks.0.hook_resid_post"


def make_store(path, rows, dtype="float32", shard_rows=64):
    """Column 0 of the activations is the row's number."""
    acts, columns = known_rows(rows, {HOOK: 3})
    acts[HOOK][:, 0] = np.arange(rows)
    fill(path, make_meta(rows, {HOOK: 3}, dtype=dtype, shard_rows=shard_rows), acts, columns)
    return ActivationStore(path), acts[HOOK], columns


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), 1000)


def stream(batches, rows):
    """The numbers of the next `rows` rows."""
    parts = []
    while sum(map(len, parts)) < rows:
        parts.append(batches.next()[:, 0].astype(int))
    return np.concatenate(parts)


@settings(max_examples=60, deadline=None)
@given(batch_rows=st.integers(1, 300), buffer_rows=st.integers(2, 1200), seed=st.integers(0, 5))
def test_every_unflagged_row_comes_exactly_once_per_epoch(store, batch_rows, buffer_rows, seed):
    opened, _, columns = store
    kept = np.flatnonzero(columns["flags"] == 0)
    batches = opened.batches(HOOK, batch_rows=batch_rows, seed=seed, buffer_rows=buffer_rows)
    assert batches.d_in == 3
    seen = stream(batches, 3 * len(kept))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(seen[epoch * len(kept) : (epoch + 1) * len(kept)]), kept)
    assert not np.array_equal(seen[: len(kept)], seen[len(kept) : 2 * len(kept)])


@settings(max_examples=60, deadline=None)
@given(
    batch_rows=st.integers(1, 300),
    buffer_rows=st.integers(2, 1200),
    before=st.integers(0, 12),
    elsewhere=st.integers(0, 5),
)
def test_a_restored_stream_goes_on_with_identical_batches(store, batch_rows, buffer_rows, before, elsewhere):
    opened, _, _ = store

    def make(seed):
        return opened.batches(HOOK, batch_rows=batch_rows, seed=seed, buffer_rows=buffer_rows)

    straight = make(1)
    for _ in range(before):
        straight.next()
    state = json.loads(json.dumps(straight.state()))
    resumed = make(2)  # the state brings its own seed
    for _ in range(elsewhere):
        resumed.next()
    resumed.load_state(state)
    for _ in range(6):
        np.testing.assert_array_equal(resumed.next(), straight.next())
        assert resumed.state() == straight.state()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("buffer_rows", [100, 5000])
def test_batches_are_float32_and_hold_the_stores_rows(tmp_path, dtype, buffer_rows):
    opened, x_ND, _ = make_store(tmp_path, 250, dtype)
    batch = opened.batches(HOOK, batch_rows=100, seed=0, buffer_rows=buffer_rows).next()
    assert batch.dtype == np.float32
    assert batch.shape == (100, 3)
    assert batch.flags.c_contiguous
    rounded = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    nearest = np.abs(batch[:, None, 1:] - x_ND[None, :, 1:]).sum(2).argmin(1)
    np.testing.assert_allclose(batch, x_ND[nearest], rtol=rounded)


def test_a_small_store_is_permuted_as_a_whole(store):
    opened, _, columns = store
    count = int((columns["flags"] == 0).sum())
    order = opened.batches(HOOK, batch_rows=count, seed=0, buffer_rows=10_000).next()[:, 0]
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.15  # 4 sigma of a random permutation
    assert (np.abs(np.diff(order)) > 64).mean() > 0.8  # a random pair of 1000 is that far apart in 87 %


def test_a_mixing_buffer_takes_neighbours_apart(store):
    opened, _, columns = store
    count = int((columns["flags"] == 0).sum())
    order = opened.batches(HOOK, batch_rows=count, seed=0, buffer_rows=256).next()[:, 0]
    assert (np.abs(np.diff(order)) > 16).mean() > 0.8
    assert not np.array_equal(np.sort(order[:256]), np.arange(256))


def test_a_buffer_far_smaller_than_a_block_mixes_parts_of_it(store):
    opened, *_ = store
    order = opened.batches(HOOK, batch_rows=64, seed=0, buffer_rows=64).next()[:, 0]
    assert np.ptp(order) > 400  # 64 neighbours would lie within 70


def test_the_flags_left_out_can_be_chosen(store):
    opened, _, columns = store
    everything = opened.batches(HOOK, batch_rows=50, seed=0, exclude_flags=0)
    assert everything.n_rows == 1000
    no_bos = opened.batches(HOOK, batch_rows=50, seed=0, exclude_flags=FLAG_BOS)
    assert no_bos.n_rows == (columns["flags"] & FLAG_BOS == 0).sum()


def test_a_state_of_another_stream_is_refused_with_the_difference(store):
    opened, _, _ = store
    batches = opened.batches(HOOK, batch_rows=10, seed=0, buffer_rows=100)
    other = opened.batches(HOOK, batch_rows=10, seed=0, buffer_rows=200)
    with pytest.raises(StoreError, match="buffer_rows was 200, is 100"):
        batches.load_state(other.state())
    with pytest.raises(ConfigError, match="batch_rows=0"):
        opened.batches(HOOK, batch_rows=0, seed=0)


def test_a_store_of_flagged_rows_only_is_refused(tmp_path):
    acts, columns = known_rows(40, {HOOK: 3})
    columns["flags"][:] = FLAG_BOS
    fill(tmp_path, make_meta(40, {HOOK: 3}), acts, columns)
    with pytest.raises(StoreError, match=r"every row of .* is flagged"):
        ActivationStore(tmp_path).batches(HOOK, batch_rows=4, seed=0, exclude_flags=FLAGS_ALL)
