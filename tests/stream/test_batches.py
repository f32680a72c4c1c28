"""Streamed batches are those of a store of the same corpus, bit for bit; so are their statistics and a resumed stream."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.corpus.windows import FLAG_OUTLIER, FLAGS_ALL
from pipeline.stream.batches import StreamBatches
from sae.errors import ConfigError, StoreError

from .conftest import POINT

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def from_store(store, capture, **options):
    return store.batches(POINT, block_starts=capture.header.block_starts, **options)


def test_the_stream_says_what_a_store_of_the_corpus_says(store, capture):
    header = capture.header
    assert header.calibration.hook == store.hooks[POINT]
    assert header.calibration.corpus_hash == store.meta.corpus_hash
    assert header.model == store.meta.model
    assert header.documents == len(store.documents) == 40
    assert header.block_starts[-1] == store.n_rows
    assert (store.column("flags") & FLAG_OUTLIER > 0).any()  # so that the equalities below cover them
    unflagged = (store.column("flags") & (FLAGS_ALL - FLAG_OUTLIER)) == 0
    assert header.unflagged_rows == unflagged.sum()


@QUICK
@given(batch_rows=st.integers(1, 700), buffer_rows=st.integers(2, 6000), seed=st.integers(0, 5))
def test_batches_are_those_of_a_store_with_the_same_blocks(store, capture, batch_rows, buffer_rows, seed):
    options = {"batch_rows": batch_rows, "seed": seed, "buffer_rows": buffer_rows}
    expected, streamed = from_store(store, capture, **options), StreamBatches(capture, **options)
    assert streamed.d_in == expected.d_in
    for _ in range(min(40, 2 * expected.n_rows // batch_rows + 2)):
        np.testing.assert_array_equal(streamed.next(), expected.next())
        where = streamed.state()
        assert (where["epoch"], where["served"]) == (expected.state()["epoch"], expected.state()["served"])


def test_a_buffer_that_only_holds_the_corpus_because_outliers_are_left_out_holds_it(store, capture):
    rows = from_store(store, capture, batch_rows=1, seed=0, buffer_rows=2).n_rows
    assert rows < capture.header.unflagged_rows
    for buffer_rows in (rows - 1, rows, rows + 1):
        options = {"batch_rows": 500, "seed": 3, "buffer_rows": buffer_rows}
        expected, streamed = from_store(store, capture, **options), StreamBatches(capture, **options)
        for _ in range(3 * rows // 500 + 1):
            np.testing.assert_array_equal(streamed.next(), expected.next())


@QUICK
@given(
    batch_rows=st.integers(20, 700),
    buffer_rows=st.integers(2, 6000),
    before=st.integers(0, 12),
    elsewhere=st.integers(0, 3),
)
def test_a_restored_stream_goes_on_with_identical_batches_and_states(
    capture, batch_rows, buffer_rows, before, elsewhere
):
    def make(seed):
        return StreamBatches(capture, batch_rows=batch_rows, seed=seed, buffer_rows=buffer_rows)

    straight = make(1)
    for _ in range(before):
        straight.next()
    state = json.loads(json.dumps(straight.state()))
    following = [(straight.next(), straight.state()) for _ in range(4)]
    resumed = make(2)  # the state brings its own seed
    for _ in range(elsewhere):
        resumed.next()
    resumed.load_state(state)
    assert resumed.state() == state
    for batch, after in following:
        np.testing.assert_array_equal(resumed.next(), batch)
        assert resumed.state() == after


@pytest.mark.parametrize("buffer_rows", [700, 10_000])
def test_statistics_after_an_epoch_are_the_store_s(store, capture, buffer_rows):
    streamed = StreamBatches(capture, batch_rows=300, seed=0, buffer_rows=buffer_rows)
    expected = store.stats(POINT)
    streamed.next()
    early = streamed.statistics()
    assert early.whole == (buffer_rows > store.n_rows)
    assert 300 <= early.rows <= expected.count
    for _ in range(expected.count // 300 + 1):
        streamed.next()
    stats = streamed.statistics()
    assert stats.whole
    assert stats.rows == expected.count
    np.testing.assert_allclose(stats.mean_D, expected.mean_D, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats.variance, expected.variance, rtol=1e-12)


def test_the_pilot_is_near_the_whole_corpus(store, capture):
    pilot, expected = capture.header.calibration.pilot, store.stats(POINT)
    assert 300 <= pilot.rows <= 400
    error = np.abs(pilot.mean_D - expected.mean_D) / np.sqrt(expected.var_D / pilot.rows)
    assert np.median(error) < 3  # in standard errors; rows of one window go together
    assert pilot.variance == pytest.approx(expected.variance, rel=0.2)


def test_a_state_of_another_stream_is_refused_with_the_difference(capture):
    batches = StreamBatches(capture, batch_rows=10, seed=0, buffer_rows=500)
    state = StreamBatches(capture, batch_rows=10, seed=0, buffer_rows=600).state()
    with pytest.raises(StoreError, match="buffer_rows was 600, is 500"):
        batches.load_state(state)
    with pytest.raises(StoreError, match="corpus_hash was other"):
        batches.load_state(batches.state() | {"corpus_hash": "other"})
    with pytest.raises(ConfigError, match="batch_rows=0"):
        StreamBatches(capture, batch_rows=0, seed=0, buffer_rows=500)
