"""Shuffled batches from a store at reading speed: blocks of neighbouring rows through a mixing buffer (mixing.py).

A store that fits the buffer is read once and permuted anew each epoch. Resuming replays the order without reading
rows. Letters: B batch rows, D width, M buffer rows.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import ConfigError, StoreError

from .mixing import MixingOrder
from .rows import BatchArrays, RowBuffer

if TYPE_CHECKING:
    from .reader import ActivationStore

BLOCK_ROWS = 256
PIECE_ROWS = 16 * BLOCK_ROWS  # read at once
MIN_BLOCKS_IN_BUFFER = 16  # a buffer of few blocks would serve neighbours together


class ShuffledBatches:
    """Batches (B, D) float32 without end; implements `sae.trainer.BatchSource`.

    `exclude_flags`: rows with any of these flags are left out. Same seed, same stream.
    `block_starts`: where the blocks begin, and the number of rows at the end; by default every 256 rows.
    Raises ConfigError for sizes that cannot work, StoreError for a state of another stream.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        *,
        batch_rows: int,
        seed: int,
        exclude_flags: int,
        buffer_rows: int,
        block_starts: np.ndarray | None = None,
    ) -> None:
        if batch_rows < 1 or buffer_rows < 2:
            raise ConfigError(f"batch_rows={batch_rows} and buffer_rows={buffer_rows} must be at least 1 and 2")
        self.store, self.hook = store, hook
        info = store.meta.hook(hook)
        self.d_in, self.dtype = info.width, info.dtype
        self.batch_rows = batch_rows
        if not store.n_rows:
            raise StoreError(f"{store.path} has no committed shard yet; run extract with resume")
        self._keep_N = (store.column("flags") & exclude_flags) == 0
        self.n_rows = int(self._keep_N.sum())
        if not self.n_rows:
            raise StoreError(f"every row of {store.path} is flagged; extract more text or raise extract.outlier_factor")
        self._slots = min(buffer_rows, self.n_rows)
        if block_starts is None:
            block_rows = max(1, min(BLOCK_ROWS, self._slots // MIN_BLOCKS_IN_BUFFER))
            block_starts = np.append(np.arange(0, store.n_rows, block_rows), store.n_rows)
        self._block_starts = block_starts
        self._buffer = RowBuffer(self._slots, self.d_in, self.dtype)
        self._arrays = BatchArrays(batch_rows, self.d_in)
        self._order = MixingOrder(len(block_starts) - 1, self._block, slots=self._slots, seed=seed)
        self._loaded = np.full(
            self._slots, -1
        )  # the row each slot holds or is being read; the order says which it should
        self._round = -1
        self._threads = ThreadPoolExecutor(2 * store.backend.at_once, "read")  # blocks are small and lie apart
        self._reads: list[Future[None]] = []

    def next(self) -> np.ndarray:
        """The next B rows, a float32 array of their own for as long as it, or a view of it, is held."""
        x_BD = self._arrays.next()
        done = 0
        while done < self.batch_rows:
            slots = self._order.next_slots(self.batch_rows - done)
            if self._order.rounds != self._round:  # what is served now was filled in the rounds before
                self._read_new()
                self._settle()
                self._round = self._order.rounds
            if not np.array_equal(self._loaded[slots], self._order.slot_row[slots]):
                self._read_new()
                self._settle()
            self._buffer.take_into(slots, x_BD[done : done + len(slots)])
            done += len(slots)
            while self._order.room and self._order.fill():
                pass
            self._read_new()
        return x_BD

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the next batch; JSON-ready."""
        return {
            "seed": self._order.seed,
            "epoch": self._order.epoch,
            "served": self._order.served,
            "rows": self.n_rows,
            "buffer_rows": self._slots,
            "corpus_hash": self.store.meta.corpus_hash,
            "hook": self.hook,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, whatever this stream served before."""
        own = self.state()
        for key in ("rows", "buffer_rows", "corpus_hash", "hook"):
            if state.get(key) != own[key]:
                raise StoreError(
                    f"cannot resume the batches: {key} was {state.get(key)}, is {own[key]}; "
                    f"resume with the store and buffer_rows of the first run"
                )
        self._settle()
        self._round = -1
        self._order.seed = int(state["seed"])
        self._order.go_to(int(state["epoch"]), int(state["served"]))

    def _block(self, block: int) -> np.ndarray:
        """The unflagged rows of a block of neighbours."""
        start, stop = self._block_starts[block : block + 2]
        return start + np.flatnonzero(self._keep_N[start:stop])

    def _read_new(self) -> None:
        """Start reading the rows that slots should hold and do not, block by block, in threads."""
        slots = np.flatnonzero(self._order.slot_row != self._loaded)
        if not len(slots):
            return
        slots = slots[np.argsort(self._order.slot_row[slots], kind="stable")]
        rows = self._order.slot_row[slots]
        self._loaded[slots] = rows
        # Cut where the gap to the next row is more than a few flagged rows, and where a piece would be large.
        borders = np.flatnonzero(np.diff(rows) > BLOCK_ROWS) + 1
        for part, part_slots in zip(np.split(rows, borders), np.split(slots, borders), strict=True):
            for at in range(0, len(part), PIECE_ROWS):
                piece = (part[at : at + PIECE_ROWS], part_slots[at : at + PIECE_ROWS])
                self._reads.append(self._threads.submit(self._read, piece))

    def _settle(self) -> None:
        """Wait for the reads under way; raises what one of them raised, whose rows are then read again."""
        reads, self._reads = self._reads, []
        wait(reads)
        for read in reads:
            read.result()

    def _read(self, piece: tuple[np.ndarray, np.ndarray]) -> None:
        """Rows (ascending, nearly contiguous) into slots."""
        rows, slots = piece
        try:
            self.store.read_into(self.hook, rows, self._buffer, slots)
        except BaseException:
            self._loaded[slots] = -1
            raise
