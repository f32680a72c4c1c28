"""Columns on disk answer like arrays in memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import disk
from pipeline.corpus.disk import DiskColumn, DiskFile

N = 5000


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("column") / "c.i4"
    values = np.random.default_rng(0).integers(-(2**31), 2**31, N).astype(np.int32)
    values.tofile(path)
    return DiskColumn(path, "int32"), values


bound = st.none() | st.integers(-N - 9, N + 9)


@settings(max_examples=100, deadline=None)
@given(start=bound, stop=bound, step=st.sampled_from([None, 1, 3, -1, -7]))
def test_slices(both, start, stop, step):
    column, values = both
    np.testing.assert_array_equal(column[start:stop:step], values[start:stop:step])


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(-N, N - 1), max_size=30), run=st.sampled_from([1, 2, 100, 1 << 20]))
def test_index_arrays_in_any_order_with_repeats(both, rows, run):
    column, values = both
    rows = np.array(rows, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "RUN_ITEMS", run)
        np.testing.assert_array_equal(column[rows], values[rows])


def test_single_rows_masks_whole_and_many_dimensions(both):
    column, values = both
    assert (len(column), column.shape, column.dtype) == (N, (N,), np.dtype("int32"))
    assert column[-1] == values[-1]
    assert column[np.int64(7)] == values[7]
    np.testing.assert_array_equal(np.asarray(column), values)
    np.testing.assert_array_equal(column[values > 0], values[values > 0])
    np.testing.assert_array_equal(column[np.array([[1, 2], [3, 1]])], values[[[1, 2], [3, 1]]])
    assert list(column) == values.tolist()


@pytest.mark.parametrize("key", [N, -N - 1, np.array([0, N]), np.zeros(3, bool)])
def test_rows_that_are_not_there_are_index_errors(both, key):
    with pytest.raises(IndexError):
        both[0][key]


def test_a_column_goes_through_pickle(both):
    again = pickle.loads(pickle.dumps(both[0]))
    np.testing.assert_array_equal(again[3:9], both[1][3:9])


def test_a_file_that_became_shorter_is_an_error_and_not_a_loop(tmp_path):
    (tmp_path / "f").write_bytes(b"1234")
    with pytest.raises(EOFError, match="shorter"):
        DiskFile(tmp_path / "f").read_into(2, memoryview(bytearray(5)))
