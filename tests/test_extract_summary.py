"""What a capture says of its rows when it ends."""

from __future__ import annotations

import pytest

from pipeline import extract as extract_module
from pipeline.corpus.windows import FLAG_NOT_FINITE
from pipeline.extract import _not_finite
from pipeline.store.reader import ActivationStore

from .store.helpers import fill, known_rows, make_meta


@pytest.mark.parametrize("block_rows", [1 << 22, 48])
def test_windows_with_rows_that_are_not_finite_are_named_from_one_reading_of_each_column(
    tmp_path, monkeypatch, block_rows
):
    rows = 400
    acts, columns = known_rows(rows, {"a": 4})  # windows of 16 rows
    columns["flags"][[5, 6, 40, 100, 101, 170, 300, 399]] |= FLAG_NOT_FINITE
    fill(tmp_path / "s", make_meta(rows, {"a": 4}), acts, columns)
    store, read = ActivationStore(tmp_path / "s"), []
    column_rows = store.column_rows
    monkeypatch.setattr(store, "column_rows", lambda name, *span: read.append(name) or column_rows(name, *span))
    monkeypatch.setattr(extract_module, "BLOCK_ROWS", block_rows)
    assert _not_finite(store) == (8, [(0, 0), (0, 2), (0, 6), (0, 10), (0, 18)])
    assert read.count("doc") == read.count("window") == (1 if block_rows > rows else 4)  # four blocks hold the five
