"""Shuffled batches of rows that are captured while they are trained on: the mixing order of a store, without one.

A block is a decoded batch of the plan; the blocks are captured in the order in which they come into the mixing
buffer, and go into slots as soon as those are served. A buffer that holds all rows is captured once; otherwise every
epoch is captured again, and resuming captures the blocks again that have rows in the buffer.

Only blocks that came in up to the newest round count for `state` and `statistics`: how far the child was ahead must
not show. Letters: B batch rows, D width, M buffer rows, n rows of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError, StoreError

from ..store.mixing import MixingOrder, block_order
from ..store.schema import STORED_DTYPES, to_float32
from ..store.statistics import RunningMoments
from .messages import NotFinite
from .process import CapturedBlock, CaptureProcess

UNKNOWN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamStatistics:
    """Mean and E||x - mean||^2 over `rows` unflagged rows: the whole corpus, or those captured until now."""

    rows: int
    mean_D: np.ndarray
    variance: float
    whole: bool


class StreamBatches:
    """Batches (B, D) float32 without end from a `CaptureProcess`; implements `sae.batches.BatchSource`.

    The rows and their order are those of `ActivationStore.batches(..., block_starts=plan.batch_rows)` on a store of
    the same corpus. Raises ConfigError for sizes that cannot work, StoreError for a state of another stream or a
    corpus of flagged rows only, and what the capture process raises.
    """

    def __init__(self, capture: CaptureProcess, *, batch_rows: int, seed: int, buffer_rows: int) -> None:
        if batch_rows < 1 or buffer_rows < 2:
            raise ConfigError(f"batch_rows={batch_rows} and buffer_rows={buffer_rows} must be at least 1 and 2")
        self._capture, self.batch_rows = capture, batch_rows
        header = capture.header
        hook = header.calibration.hook
        self.d_in, self.dtype, self._starts = hook.width, hook.dtype, header.block_starts
        if not header.unflagged_rows:
            raise StoreError("every row of the corpus is flagged; give more text")
        slots = min(buffer_rows, header.unflagged_rows)
        self._all_fit = slots == header.unflagged_rows  # else outliers may still make them fit
        self._buffer_MD = np.empty((slots, self.d_in), STORED_DTYPES[self.dtype])
        self._replaying = False
        self._lost: np.ndarray | None = None  # after load_state: slots whose rows are to be captured again
        self._forget()
        self._order = MixingOrder(self.n_blocks, self._rows_of, slots=slots, seed=seed, place=self._put)
        capture.follow(self._blocks_from(0, 0))

    @property
    def n_blocks(self) -> int:
        return len(self._starts) - 1

    @property
    def blocks_in_buffer(self) -> float:
        """How many blocks the buffer mixes; the more, the further neighbours are taken apart."""
        return self.n_blocks * len(self._buffer_MD) / max(1, self._capture.header.unflagged_rows)

    def next(self) -> np.ndarray:
        """The next B rows, a new float32 array. Waits for the capture where the buffer cannot be filled yet."""
        if self._lost is not None:
            self._restore()
        taken: list[np.ndarray] = []
        missing = self.batch_rows
        while missing:
            slots = self._order.next_slots(missing)
            self._count()
            taken.append(np.take(self._buffer_MD, slots, axis=0))
            missing -= len(slots)
        while self._order.room and (len(self._order.waiting) or self._capture.ready()) and self._order.fill():
            pass
        return to_float32(taken[0] if len(taken) == 1 else np.concatenate(taken), self.dtype)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the next batch; JSON-ready. `kept`: unflagged rows of each block."""
        return {
            "seed": self._order.seed,
            "epoch": self._order.epoch,
            "served": self._order.served,
            **self._identity(),
            **self._counted,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken: the order is replayed, the rows are captured with the next batch."""
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise StoreError(
                    f"cannot resume the stream: {key} was {state.get(key)}, is {own}; "
                    f"resume with the corpus, model and buffer_rows of the first run"
                )
        self._forget()
        self._kept_B[:] = state["kept"]
        self._moments = RunningMoments(
            count=state["rows_counted"], mean_D=np.array(state["mean"]), centred_D=np.array(state["centred"])
        )
        self._not_finite = NotFinite(
            rows=state["not_finite_rows"], windows=tuple((name, window) for name, window in state["not_finite"])
        )
        self._counted = {key: state[key] for key in self._counted}
        self._order.seed = int(state["seed"])
        self._replaying = True
        self._order.go_to(int(state["epoch"]), int(state["served"]))
        self._rounds = (self._order.epoch, self._order.rounds)
        self._replaying = False
        self._lost = self._order.needed
        coming = () if self._order.resident else self._blocks_from(self._order.epoch, self._order.drawn)
        self._capture.follow(itertools.chain(self._lost_blocks(), coming))

    def statistics(self) -> StreamStatistics:
        """Of the blocks taken into the buffer so far, each counted once."""
        count, centred_D = self._moments.count, self._moments.centred_D
        return StreamStatistics(
            rows=count,
            mean_D=self._moments.mean_D,
            variance=float(centred_D.sum() / max(count, 1)),
            whole=UNKNOWN not in self._counted["kept"],
        )

    def not_finite(self) -> NotFinite:
        """What was left out of the same blocks because it is not finite."""
        return self._not_finite

    def _identity(self) -> dict[str, Any]:
        calibration = self._capture.header.calibration
        return {
            "rows": self._capture.header.unflagged_rows,
            "buffer_rows": len(self._buffer_MD),
            "corpus_hash": calibration.corpus_hash,
            "blocks": calibration.config_hash,
            "hook": calibration.hook.name,
            "outlier_threshold": calibration.hook.outlier_threshold,
        }

    def _forget(self) -> None:
        self._kept_B = np.full(self.n_blocks, UNKNOWN)
        self._new: list[tuple[int, np.ndarray, np.ndarray]] = []  # count and sums of blocks captured for the first time
        self._new_not_finite = NotFinite()  # of them
        self._moments = RunningMoments.empty(self.d_in)
        self._not_finite = NotFinite()
        self._rounds = (0, 0)
        self._held: CapturedBlock | None = None  # rows of it wait for slots
        self._counted: dict[str, Any] = {}
        self._snapshot()

    def _count(self) -> None:
        """Once a round: the blocks that came in for it are counted."""
        rounds = (self._order.epoch, self._order.rounds)
        if rounds == self._rounds:
            return
        self._rounds = rounds
        for count, sum_D, centred_D in self._new:
            self._moments = self._moments.plus(count, sum_D, centred_D)
        if self._new:
            self._not_finite = self._not_finite.plus(self._new_not_finite)
            self._new_not_finite = NotFinite()
            self._new.clear()
            self._snapshot()

    def _snapshot(self) -> None:
        self._counted = {
            "kept": self._kept_B.tolist(),
            "rows_counted": self._moments.count,
            "mean": self._moments.mean_D.tolist(),
            "centred": self._moments.centred_D.tolist(),
            "not_finite_rows": self._not_finite.rows,
            "not_finite": [list(window) for window in self._not_finite.windows],
        }

    def _blocks_from(self, epoch: int, drawn: int) -> Iterator[int]:
        """The blocks to capture from here on, epoch after epoch; the rest of one where they all stay in the buffer."""
        while not self._order.resident:
            yield from block_order(self._order.seed, epoch, self.n_blocks)[drawn:].tolist()
            if self._all_fit:
                return
            epoch, drawn = epoch + 1, 0

    def _hold(self, block: int) -> CapturedBlock:
        """The block, when it is captured; it stays in its slot of the queue until `_let_go`."""
        while self._held is None or self._held.block != block:
            if self._held is not None:  # a block of flagged rows, asked for before that was known
                self._let_go()
            self._held = self._capture.take()
        return self._held

    def _let_go(self) -> None:
        if self._held is not None:
            self._capture.release(self._held)
            self._held = None

    def _rows_of(self, block: int) -> np.ndarray:
        """Numbers of the unflagged rows of a block: only how many there are matters to the order."""
        if self._kept_B[block] == UNKNOWN:
            if self._replaying:
                raise StoreError(f"cannot resume the stream: its state does not know block {block}; start a new run")
            captured = self._hold(block)
            self._kept_B[block] = len(captured.stored_nD)
            self._new.append((len(captured.stored_nD), captured.sum_D.copy(), captured.centred_D.copy()))
            self._new_not_finite = self._new_not_finite.plus(captured.not_finite)
        return self._starts[block] + np.arange(self._kept_B[block])

    def _put(self, block: int, rows: np.ndarray, slots: np.ndarray) -> None:
        if self._replaying or not len(rows):
            return
        numbers = rows - self._starts[block]
        self._buffer_MD[slots] = self._hold(block).stored_nD[numbers]
        if numbers[-1] + 1 == self._kept_B[block]:
            self._let_go()

    def _lost_blocks(self) -> list[int]:
        """The blocks of the lost rows; the one of which rows wait for slots comes last and stays held."""
        assert self._lost is not None
        blocks = set(self._block_of(self._order.slot_row[self._lost]).tolist())
        waiting = {self._order.waiting_block} if len(self._order.waiting) else set()
        return [*sorted(blocks - waiting), *waiting]

    def _restore(self) -> None:
        """Capture again what the buffer holds."""
        assert self._lost is not None
        rows, slots = self._order.slot_row[self._lost], self._lost
        block_R = self._block_of(rows)
        for block in self._lost_blocks():
            here = np.flatnonzero(block_R == block)
            self._buffer_MD[slots[here]] = self._hold(block).stored_nD[rows[here] - self._starts[block]]
            if block != self._order.waiting_block or not len(self._order.waiting):
                self._let_go()
        self._lost = None

    def _block_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1
