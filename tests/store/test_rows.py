"""The buffer of the shuffled reader: the compiled copy and numpy's give the same bits in every format."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.store import rows as module
from pipeline.store.rows import BatchArrays, RowBuffer
from pipeline.store.schema import STORED_DTYPES
from sae.native.build import BuildError


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def filled(dtype: str, stored: np.ndarray, slots: np.ndarray, *, compiled: bool) -> RowBuffer:
    buffer = RowBuffer(len(stored) + 3, stored.shape[1], dtype, compiled=compiled)
    buffer.put(slots, stored, np.arange(len(stored)) + 50, 50)
    return buffer


@pytest.mark.parametrize("width", [1, 7, 16, 33, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_compiled_rows_equal_numpys_to_the_bit(dtype, width):
    rng = np.random.default_rng(width)
    if dtype == "bfloat16":
        stored = rng.integers(0, 1 << 16, (40, width)).astype(STORED_DTYPES[dtype])  # bits, NaN among them
    else:
        values = rng.standard_normal((40, width)) * 10.0 ** rng.integers(-8, 4, (40, width))
        stored = values.astype(STORED_DTYPES[dtype])
    slots = rng.permutation(43)[:40]
    asked = slots[rng.permutation(40)[:23]]
    found = []
    for compiled in (True, False):
        out = np.full((23, width), np.nan, np.float32)
        filled(dtype, stored, slots, compiled=compiled).take_into(asked, out)
        found.append(out)
    assert np.array_equal(bits_of(found[0]), bits_of(found[1]))


def test_every_float16_number_is_converted_exactly():
    stored = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    out = np.empty(stored.shape, np.float32)
    filled("float16", stored, np.arange(len(stored)), compiled=True).take_into(np.arange(len(stored)), out)
    expected = stored.astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(bits_of(out)[number], bits_of(expected)[number])
    assert np.isnan(out[~number]).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_with_gaps_go_to_their_slots(compiled):
    stored = np.arange(12, dtype=np.float32).reshape(6, 2)  # rows 100..105; 101 and 104 are not wanted
    buffer = RowBuffer(4, 2, "float32", compiled=compiled)
    buffer.put(np.array([3, 0, 2, 1]), stored, np.array([100, 102, 103, 105]), 100)
    out = np.empty((4, 2), np.float32)
    buffer.take_into(np.array([0, 1, 2, 3]), out)
    assert out[:, 0].tolist() == [4.0, 10.0, 6.0, 0.0]


def test_without_a_compiler_numpy_copies(monkeypatch, listen):
    heard = listen(module)

    def fails(*_args: object) -> None:
        raise BuildError("no C compiler")

    monkeypatch.setattr(module, "build", fails)
    module._library.cache_clear()
    try:
        buffer = RowBuffer(2, 2, "float16")
        buffer.put(np.array([1, 0]), np.array([[1, 2], [3, 4]], np.float16), np.array([0, 1]), 0)
        out = np.empty((1, 2), np.float32)
        buffer.take_into(np.array([0]), out)
    finally:
        module._library.cache_clear()
    assert out.tolist() == [[3.0, 4.0]]
    assert "no C compiler" in heard[0]


@pytest.mark.parametrize("row_values", [1, 9, 700])
def test_rows_are_read_from_a_file_straight_to_their_slots(tmp_path, row_values):
    rng = np.random.default_rng(row_values)
    whole = rng.standard_normal((900, row_values)).astype(np.float32)
    (tmp_path / "shard").write_bytes(b"head" + whole.tobytes())
    rows = np.flatnonzero(rng.random(900) < 0.97)  # gaps, and runs of more rows than one system call takes
    rows = np.concatenate([rows[rows < 100], rows[rows > 130]])
    slots = rng.permutation(len(rows))
    slots[100:300] = np.sort(slots[100:300])  # and slots that follow each other
    buffer = RowBuffer(len(rows), row_values, "float32")
    with (tmp_path / "shard").open("rb") as file:
        assert buffer.read(file.fileno(), 4, slots, rows + 1000, 1000)
    out = np.empty((len(rows), row_values), np.float32)
    buffer.take_into(slots, out)
    assert np.array_equal(out, whole[rows])


def test_a_file_that_ends_too_soon_is_said(tmp_path):
    (tmp_path / "shard").write_bytes(bytes(4 * 5 - 1))
    with (tmp_path / "shard").open("rb") as file:
        buffer = RowBuffer(5, 1, "float32")
        with pytest.raises(EOFError):
            buffer.read(file.fileno(), 0, np.arange(5), np.arange(5), 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        buffer.read(-1, 0, np.arange(5), np.arange(5), 0)


def test_arrays_are_used_again_only_when_nobody_holds_them():
    arrays = BatchArrays(2, 3, most=2)
    a = arrays.next()
    address = a.ctypes.data
    view = a[1:]
    del a
    b = arrays.next()
    assert b.ctypes.data != address  # the view still needs it
    c = arrays.next()
    assert c.ctypes.data not in (address, b.ctypes.data)  # both are held: a fresh one
    del view
    assert arrays.next().ctypes.data == address
