"""The order of shuffled rows: blocks of neighbours in a random order into a mixing buffer. One rule for store and stream.

One epoch: blocks come in a random order into the buffer's slots; when it is full, a random half of the slots is
served and filled with the next blocks. Every row is served exactly once per epoch. Rows that all fit the buffer stay
in it and are permuted anew each epoch.

Which row goes where depends on seed, epoch and the rows of each block alone, never on when a slot was filled; so
(seed, epoch, rows served) says where the order is. Letters: M slots, n rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sae.errors import StoreError

NONE = np.empty(0, np.int64)


def block_order(seed: int, epoch: int, n_blocks: int) -> np.ndarray:
    """The order in which the blocks of an epoch come into the buffer."""
    return np.random.default_rng([seed, epoch]).permutation(n_blocks)


class MixingOrder:
    """Hands out the slots whose rows are next. `rows_of(block)`: numbers of its rows, ascending from block to block.

    `place(block, rows, slots)` is called when rows are put into slots, which were all served before.
    `fill` may be called at any time to put the next block into slots that are served already; the order stays the same.
    """

    def __init__(
        self,
        n_blocks: int,
        rows_of: Callable[[int], np.ndarray],
        *,
        slots: int,
        seed: int,
        place: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        self.n_blocks, self.seed = n_blocks, seed
        self.slot_row = np.full(slots, -1)  # the row each slot holds
        self._rows_of, self._place = rows_of, place
        self._ranked: np.ndarray | None = None  # slots by their rows, once it is known that all rows are in the buffer
        self.start(0)

    def start(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.served, self.rounds = epoch, 0, 0
        self.drawn = 0  # blocks taken of this epoch's order
        self._rng = np.random.default_rng([self.seed, epoch])
        self._blocks = iter(self._rng.permutation(self.n_blocks).tolist())  # as `block_order` says
        self.waiting_block, self.waiting = -1, NONE  # rows of a block that found no free slot
        # free: slots that are served in this round and filled for the next; the last len(_ready) are not served yet.
        self._free, self._filled = np.arange(len(self.slot_row)), 0
        self._ready, self._held = NONE, NONE  # held: slots whose rows are for later rounds

    def go_to(self, epoch: int, served: int) -> None:
        """Go to where `served` rows of an epoch have been handed out."""
        self._ranked = None
        self.start(epoch)
        while self.served < served:
            self.next_slots(served - self.served)

    @property
    def resident(self) -> bool:
        """Whether all rows are known to be in the buffer for good: no block is taken any more."""
        return self._ranked is not None

    @property
    def room(self) -> int:
        """How many served slots wait for a row."""
        return max(0, len(self._free) - len(self._ready) - self._filled)

    @property
    def needed(self) -> np.ndarray:
        """The slots whose rows are still to be served."""
        if self._ranked is not None:
            return self._ranked
        return np.concatenate([self._ready, self._held, self._free[: self._filled]])

    def next_slots(self, most: int) -> np.ndarray:
        """The slots of the next rows, at least one and at most `most`; moves on to the next epoch.

        Raises StoreError where no block has a row.
        """
        while not len(self._ready):
            if not self._turn():
                if not self.served:
                    raise StoreError("every row is flagged; take more text or raise extract.outlier_factor")
                self.start(self.epoch + 1)
        slots, self._ready = self._ready[:most], self._ready[most:]
        self.served += len(slots)
        return slots

    def fill(self) -> bool:
        """Put the rows that wait, or else the next block, into served slots. False: no room, or no block is left."""
        if not len(self.waiting):
            block = next(self._blocks, -1)
            if block < 0:
                return False
            self.drawn += 1
            self.waiting_block, self.waiting = block, self._rows_of(block)
        count = min(self.room, len(self.waiting))
        rows, slots = self.waiting[:count], self._free[self._filled : self._filled + count]
        self.slot_row[slots], self.waiting = rows, self.waiting[count:]
        self._filled += count
        if self._place is not None:
            self._place(self.waiting_block, rows, slots)
        return not len(self.waiting)

    def _turn(self) -> bool:
        """The next round: fill what is free, mix, serve a half. False when the epoch is over."""
        if self.served == 0 and self._ranked is not None:
            return self._serve_all(self._ranked)
        while self.fill():
            pass
        filled = self._free[: self._filled]
        self.rounds += 1
        if self.served == 0 and not len(self.waiting):  # no block is left either: all rows are in the buffer
            self._ranked = filled[np.argsort(self.slot_row[filled])]
            return self._serve_all(self._ranked)
        held = self._rng.permutation(np.concatenate([self._held, filled]))
        ended = len(filled) < len(self._free)
        serve = len(held) if ended else -(-len(held) // 2)
        self._free, self._held, self._filled = held[:serve], held[serve:], 0
        self._ready = self._free
        return len(held) > 0

    def _serve_all(self, ranked: np.ndarray) -> bool:
        self._blocks = iter(())
        self._free, self._held, self._filled = NONE, NONE, 0
        self._ready = ranked[np.random.default_rng([self.seed, self.epoch]).permutation(len(ranked))]
        return len(ranked) > 0
