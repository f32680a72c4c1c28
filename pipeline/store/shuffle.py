"""Shuffled batches from a store at reading speed: shuffled blocks into a mixing buffer.

One epoch: the store's blocks (runs of neighbouring rows) come in a random order into a buffer; when it
is full, a random half of it is served and its slots are filled with the next blocks. Every row is
served exactly once per epoch. A store that fits the buffer is read once and permuted anew each epoch.

Which row goes where depends on seed and epoch alone, so the state is (seed, epoch, rows served) and
resuming replays the order without reading rows. Letters: B batch rows, D width, M buffer rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import ConfigError, StoreError

from .schema import STORED_DTYPES, to_float32

if TYPE_CHECKING:
    from .reader import ActivationStore

BLOCK_ROWS = 256
MIN_BLOCKS_IN_BUFFER = 16  # a buffer of few blocks would serve neighbours together


class ShuffledBatches:
    """Batches (B, D) float32 without end; implements `sae.trainer.BatchSource`.

    `exclude_flags`: rows with any of these flags are left out. Same seed, same stream.
    Raises ConfigError for sizes that cannot work, StoreError for a state of another stream.
    """

    def __init__(
        self, store: ActivationStore, hook: str, *, batch_rows: int, seed: int, exclude_flags: int, buffer_rows: int
    ) -> None:
        if batch_rows < 1 or buffer_rows < 2:
            raise ConfigError(f"batch_rows={batch_rows} and buffer_rows={buffer_rows} must be at least 1 and 2")
        self.store, self.hook = store, hook
        info = store.meta.hook(hook)
        self.d_in, self.dtype = info.width, info.dtype
        self.batch_rows, self.seed = batch_rows, seed
        if not store.n_rows:
            raise StoreError(f"{store.path} has no committed shard yet; run extract with resume")
        self._keep_N = (store.column("flags") & exclude_flags) == 0
        self.n_rows = int(self._keep_N.sum())
        if not self.n_rows:
            raise StoreError(f"every row of {store.path} is flagged; extract more text or raise extract.outlier_factor")
        self._slots = min(buffer_rows, self.n_rows)
        self._resident = self._slots == self.n_rows
        self._block_rows = max(1, min(BLOCK_ROWS, self._slots // MIN_BLOCKS_IN_BUFFER))
        self._buffer_MD = np.empty((self._slots, self.d_in), STORED_DTYPES[self.dtype])
        self._slot_row = np.full(self._slots, -1)  # the store's row each slot holds by plan
        self._loaded = np.full(self._slots, -1)  # ... and the one it really holds
        self._start(0)

    def next(self) -> np.ndarray:
        """The next B rows, a new float32 array."""
        taken: list[np.ndarray] = []
        missing = self.batch_rows
        while missing:
            slots = self._next_slots(missing)
            if not np.array_equal(self._loaded[slots], self._slot_row[slots]):
                self._load()
            taken.append(np.take(self._buffer_MD, slots, axis=0))
            missing -= len(slots)
        return to_float32(taken[0] if len(taken) == 1 else np.concatenate(taken), self.dtype)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the next batch; JSON-ready."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "served": self._served,
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
        self.seed = int(state["seed"])
        self._start(int(state["epoch"]))
        while self._served < state["served"]:
            self._next_slots(int(state["served"]) - self._served)

    def _start(self, epoch: int) -> None:
        self.epoch, self._served = epoch, 0
        self._rounds = self._resident_rounds() if self._resident else self._mixing_rounds()
        self._ready = np.empty(0, np.int64)

    def _next_slots(self, most: int) -> np.ndarray:
        """The slots of the next rows, at least one and at most `most`; moves on to the next epoch."""
        while not len(self._ready):
            ready = next(self._rounds, None)
            if ready is None:
                self._start(self.epoch + 1)
            else:
                self._ready = ready
        slots, self._ready = self._ready[:most], self._ready[most:]
        self._served += len(slots)
        return slots

    def _resident_rounds(self) -> Iterator[np.ndarray]:
        self._slot_row[:] = np.flatnonzero(self._keep_N)
        yield np.random.default_rng([self.seed, self.epoch]).permutation(self._slots)

    def _mixing_rounds(self) -> Iterator[np.ndarray]:
        """Slots to serve, round by round. Each round first fills the slots the one before served."""
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = iter(rng.permutation(-(-len(self._keep_N) // self._block_rows)).tolist())
        waiting = np.empty(0, np.int64)  # rows of a block that found no free slot
        free, held = np.arange(self._slots), np.empty(0, np.int64)  # held: slots whose rows are not served yet
        while True:
            parts, found = [waiting], len(waiting)
            while found < len(free) and (block := next(blocks, None)) is not None:
                parts.append(self._block(block))
                found += len(parts[-1])
            coming = np.concatenate(parts)
            filled, waiting = free[: len(coming)], coming[len(free) :]
            self._slot_row[filled] = coming[: len(free)]
            held = rng.permutation(np.concatenate([held, filled]))
            if not len(held):
                return
            ended = len(filled) < len(free)
            serve = len(held) if ended else -(-len(held) // 2)
            free, held = held[:serve], held[serve:]
            yield free

    def _block(self, block: int) -> np.ndarray:
        """The unflagged rows of a block of neighbours."""
        start = block * self._block_rows
        return start + np.flatnonzero(self._keep_N[start : start + self._block_rows])

    def _load(self) -> None:
        """Read the rows that slots should hold and do not, block by block."""
        slots = np.flatnonzero(self._slot_row != self._loaded)
        if not len(slots):
            return
        slots = slots[np.argsort(self._slot_row[slots], kind="stable")]
        rows = self._slot_row[slots]
        # Cut where the gap to the next row is more than a few flagged rows.
        borders = np.flatnonzero(np.diff(rows) > BLOCK_ROWS) + 1
        for part, part_slots in zip(np.split(rows, borders), np.split(slots, borders), strict=True):
            self._read(part, part_slots)
        self._loaded[slots] = self._slot_row[slots]

    def _read(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Rows (ascending, nearly contiguous) into slots, in bounded pieces."""
        for start in range(0, len(rows), BLOCK_ROWS * 16):
            piece = slice(start, start + BLOCK_ROWS * 16)
            first, last = int(rows[piece][0]), int(rows[piece][-1])
            stored = self.store.stored_rows(self.hook, first, last + 1)
            self._buffer_MD[slots[piece]] = stored[rows[piece] - first]
