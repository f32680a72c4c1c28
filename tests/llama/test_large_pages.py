"""Matrices in large pages: where they begin, that they are in such pages where the system has them, and nothing without."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.llama.encoder import GgmlEncoder
from sae import large_pages, pages
from sae.runtime import encode

from .test_encoder import sae
from .test_row_reading import rows_of

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("n_bytes", [1, large_pages.BYTES, 3 * large_pages.BYTES + 5])
def test_an_array_begins_with_a_page_and_can_be_written_whole(n_bytes):
    array = large_pages.array(n_bytes)
    assert (array.shape, array.dtype) == ((n_bytes,), np.uint8)
    assert array.ctypes.data % large_pages.BYTES == 0
    array[:] = 7
    large_pages.settle(array.ctypes.data, array.nbytes)
    assert (array == 7).all()


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="no large pages here")
def test_memory_that_was_in_small_pages_is_in_large_ones_afterwards(monkeypatch):
    whole = np.empty(large_pages.room(8 * large_pages.BYTES), np.uint8)
    with monkeypatch.context() as undone:
        undone.setattr(large_pages, "expect", lambda address, n_bytes: None)
        array = large_pages.array(8 * large_pages.BYTES)
    del whole
    array[:] = np.arange(array.size, dtype=np.uint8)
    large_pages._advise(array.ctypes.data, array.nbytes, 15)  # MADV_NOHUGEPAGE: split them, if it was given some
    before = array.copy()
    large_pages._advise(array.ctypes.data, array.nbytes, 14)
    if large_pages._madvise()(large_pages._P(array.ctypes.data), large_pages._SIZE(large_pages.BYTES), 25):
        pytest.skip("this kernel cannot collapse pages")
    large_pages.settle(array.ctypes.data, array.nbytes)
    assert large_bytes(array) >= array.nbytes
    np.testing.assert_array_equal(array, before)


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="no large pages here")
def test_tensors_of_zeros_are_in_large_pages_also_where_the_program_gave_memory_in_small_ones_back():
    warmed = np.ones(31 << 20, np.uint8)
    del warmed  # from now on malloc keeps what is given back up to this size
    given = [np.ones(900 << 10, np.uint8) for _ in range(60)]
    guard = np.ones(200 << 10, np.uint8)  # behind them, so that the heap does not shrink
    del given
    for size in (4 << 20, 20 << 20):
        zeros = pages.zeros(size // 4)
        assert not zeros.any()
        assert large_bytes(zeros.fill_(1).view(torch.uint8).numpy()) >= size
    assert guard.all()


def large_bytes(array: np.ndarray) -> int:
    """Of the mapping that holds the array."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= array.ctypes.data < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0"])
def test_an_encoders_matrix_begins_with_a_page_and_gives_what_it_did(dtype, monkeypatch):
    w, stored = sae(np.random.default_rng(2), dtype)
    plain = GgmlEncoder(w, n_threads=1, stored=stored)
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 0)
    encoder = GgmlEncoder(w, n_threads=1, stored=stored)
    assert encoder._affine.weight_address % large_pages.BYTES == 0
    x_ND = rows_of(w)
    found = encoder.encode(x_ND)
    monkeypatch.setattr(sys, "platform", "another")
    large_pages._madvise.cache_clear()
    try:
        unadvised = GgmlEncoder(w, n_threads=1, stored=stored)
    finally:
        large_pages._madvise.cache_clear()
    for other in (plain, unadvised):
        for ours, theirs in zip(found, other.encode(x_ND), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert set(found[0][0].tolist()) & set(encode(w, x_ND)[0][0].tolist())
