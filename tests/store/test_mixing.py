"""The mixing order against a plain implementation with lists, whatever moment slots are filled at."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.mixing import MixingOrder, block_order
from sae.errors import StoreError


def served_in_order(blocks, slots, seed, epoch):
    """The rows of one epoch in the order in which they are served. `blocks`: the rows of each."""
    rows = [row for block in blocks for row in block]
    if len(rows) <= slots:
        return [rows[i] for i in np.random.default_rng([seed, epoch]).permutation(len(rows))]
    rng = np.random.default_rng([seed, epoch])
    coming = [row for block in rng.permutation(len(blocks)) for row in blocks[block]]
    served, held, room = [], [], slots
    while held or coming:
        filled, coming = coming[:room], coming[room:]
        mixed = held + filled
        held = [mixed[i] for i in rng.permutation(len(mixed))]
        half = len(held) if len(filled) < room else -(-len(held) // 2)
        served += held[:half]
        held, room = held[half:], half
    return served


block_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any)


def numbered(sizes):
    borders = np.cumsum([0, *sizes])
    return [list(range(start, start + size)) for start, size in zip(borders, sizes, strict=False)]


@settings(max_examples=200, deadline=None)
@given(sizes=block_sizes, slots=st.integers(1, 120), seed=st.integers(0, 3), most=st.integers(1, 20), when=st.randoms())
def test_rows_come_in_the_order_of_the_plain_rule_whenever_slots_are_filled(sizes, slots, seed, most, when):
    blocks, placed, came = numbered(sizes), {}, set()

    def place(block, rows, into):
        assert set(rows.tolist()) <= set(blocks[block])
        came.update(rows.tolist())
        placed.update(zip(into.tolist(), rows.tolist(), strict=True))

    order = MixingOrder(len(blocks), lambda b: np.array(blocks[b], int), slots=slots, seed=seed, place=place)
    for epoch in range(3):
        seen = []
        came.clear()
        while len(seen) < sum(sizes):
            assert order.served == len(seen) or (order.epoch, order.served) == (epoch - 1, sum(sizes))
            taken = order.next_slots(most).tolist()
            seen += [placed[slot] for slot in taken]
            while when.random() < 0.5 and order.room and order.fill():
                pass
            if not order.resident:
                assert set(order.slot_row[order.needed].tolist()) == came - set(seen)
            assert order.room >= 0
        assert order.epoch == epoch
        assert seen == served_in_order(blocks, slots, seed, epoch)


@settings(max_examples=100, deadline=None)
@given(sizes=block_sizes, slots=st.integers(1, 120), epoch=st.integers(0, 2), data=st.data())
def test_an_order_sent_to_a_place_goes_on_as_the_one_that_walked_there(sizes, slots, epoch, data):
    blocks = numbered(sizes)
    served = data.draw(st.integers(0, sum(sizes)))

    def make():
        return MixingOrder(len(blocks), lambda b: np.array(blocks[b], int), slots=slots, seed=1)

    sent = make()
    sent.next_slots(data.draw(st.integers(1, 50)))  # wherever it was
    sent.go_to(epoch, served)
    still_needed = set(sent.slot_row[sent.needed].tolist())
    rows = [sent.slot_row[slot] for _ in range(sum(sizes) - served) for slot in sent.next_slots(1)]
    assert rows == served_in_order(blocks, slots, 1, epoch)[served:]
    if served and not sent.resident:
        assert still_needed <= set(rows)


def test_the_blocks_of_an_epoch_can_be_foretold():
    asked = []

    def rows_of(block):
        asked.append(block)
        return np.arange(3) + 3 * block

    order = MixingOrder(20, rows_of, slots=12, seed=5)
    for _ in range(60):
        order.next_slots(1)
        assert order.drawn == len(asked)
    assert asked == block_order(5, 0, 20).tolist()
    assert sorted(asked) == list(range(20))


def test_blocks_without_rows_are_refused_not_waited_for():
    order = MixingOrder(4, lambda block: np.empty(0, int), slots=3, seed=0)
    with pytest.raises(StoreError, match="every row is flagged"):
        order.next_slots(1)
