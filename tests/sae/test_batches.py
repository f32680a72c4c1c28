"""Reading ahead: how far, in which order, and what ends it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from sae.batches import Peeked, Prefetcher

from .toy import Toy


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_batches_are_read_ahead_in_their_order_and_with_their_states(ahead):
    toy, plain = Toy(), Toy()
    with Prefetcher(toy, ahead, 6) as batches:
        for number in range(1, 7):
            batch, state = batches.next()
            assert np.array_equal(batch, plain.next())
            assert state == plain.state()
            wanted, waited = min(6, number + ahead), time.monotonic()
            while toy.served < wanted and time.monotonic() - waited < 10:
                time.sleep(0.001)
            assert toy.served == wanted


def test_waiting_ends_where_it_is_given_up_and_an_error_does_not_wait_for_the_read():
    release = threading.Event()

    class Stuck(Toy):
        def next(self):
            release.wait(60)
            return super().next()

    started, batches = time.monotonic(), Prefetcher(Stuck(), 1, 3)
    try:
        assert batches.next(lambda: True) is None
        batches.__exit__(ZeroDivisionError)
        assert time.monotonic() - started < 30
    finally:
        release.set()


def test_a_peeked_batch_does_not_come_again_where_the_source_was_put_elsewhere():
    peeked = Peeked(Toy())
    before = peeked.state()
    peeked.load_state(before)
    assert peeked.state() == before
    assert np.array_equal(peeked.next(), peeked.first)
    assert not np.array_equal(peeked.next(), peeked.first)
