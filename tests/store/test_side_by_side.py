"""Rows of several hook points, the same token in every row."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.corpus.windows import FLAGS_ALL
from pipeline.store.reader import ActivationStore
from pipeline.store.side_by_side import SideBySide
from sae.errors import StoreError

from .helpers import fill, known_rows, make_meta

WIDTHS = {"blocks.1.hook_resid_mid": 4, "blocks.1.hook_mlp_out": 3, "blocks.2.hook_resid_post": 2}
ROWS = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("side") / "store"
    acts, columns = known_rows(ROWS, WIDTHS)
    fill(path, make_meta(ROWS, WIDTHS), acts, columns)
    return ActivationStore(path), acts, columns


@pytest.mark.parametrize("buffer_rows", [64, 1000])  # mixing through a buffer; all in it
def test_each_row_is_one_token_at_every_hook_point(made, buffer_rows):
    store, acts, columns = made
    hooks = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"]
    source = SideBySide(store, hooks, batch_rows=50, seed=3, buffer_rows=buffer_rows)
    whole_NW = np.concatenate([acts[hook] for hook in hooks], axis=1)
    wanted = {row.tobytes() for row in whole_NW[(columns["flags"] & FLAGS_ALL) == 0]}
    assert source.d_in == 7
    served = np.concatenate([source.next() for _ in range(12)])
    assert {row.tobytes() for row in served} == wanted
    single = store.batches(hooks[1], batch_rows=50, seed=3, buffer_rows=buffer_rows)
    np.testing.assert_array_equal(served[:50, 3:], single.next())


def test_a_resumed_stream_goes_on_with_the_next_row(made):
    store = made[0]
    first, second = (SideBySide(store, list(WIDTHS), batch_rows=50, seed=3, buffer_rows=64) for _ in range(2))
    for _ in range(5):
        first.next()
    second.load_state(first.state())
    np.testing.assert_array_equal(first.next(), second.next())
    with pytest.raises(StoreError, match=r"not of blocks\.1\.hook_resid_mid"):
        second.load_state(first.state()["hooks"][0])
