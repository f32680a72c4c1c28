"""From batches to committed shards: rows go to their format on disk and a thread commits each full shard meanwhile.

At most two shards are held: one that fills and one on its way to disk, which the plan's shard size allows for.
Letters: N rows, D width of a hook, S rows per shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sae.errors import StoreError

from ..corpus.windows import FLAG_OUTLIER
from ..llama.halves import to_float16
from ..llama.switching import quick_switching
from ..store.schema import FLOAT16_MAX, STORED_DTYPES, HookInfo, StoreMeta, to_stored
from ..store.writer import ShardWriter, StoreWriter
from .capturer import Batch, Capturer, exact_norms

NORM_SLACK = 1e-4  # float32 norms this close to a threshold are computed again in float64

Committed = Callable[[int], None]  # rows


def capture_shards(
    capturer: Capturer, writer: ShardWriter | StoreWriter, shards: Sequence[int], done: Committed
) -> None:
    """Capture and commit these shards; `done` gets the rows of each batch that lie in them.

    StoreError when a value overflows the store's float16, naming document and window; what `commit_shard` raises.
    Shards that were committed stay, whatever happens.
    """
    plan = capturer.plan
    # beside a busy Python thread every numpy call here would wait a whole switch interval for the interpreter
    with quick_switching(), _Committer(capturer, writer) as committer:
        for first, last in runs(shards):
            start, stop = plan.shard_range(first)[0], plan.shard_range(last)[1]
            for index in plan.batches_of(start, stop):
                batch = capturer.batch(index)
                rows = slice(max(start, batch.start), min(stop, batch.stop))
                committer.add(batch, rows)
                done(rows.stop - rows.start)


def runs(shards: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours, so that a border batch between two of them is computed once."""
    first = 0
    for index in range(len(shards)):
        if index + 1 == len(shards) or shards[index + 1] != shards[index] + 1:
            yield shards[first], shards[index]
            first = index + 1


class _Committer:
    """Fills shard buffers and commits the full ones in a thread, one at a time; errors come out of `add` or the end."""

    def __init__(self, capturer: Capturer, writer: ShardWriter | StoreWriter) -> None:
        self.capturer, self.writer = capturer, writer
        self.hooks = writer.meta.hooks
        self._buffers = [_Buffer(writer.meta), _Buffer(writer.meta)]
        self._thread = ThreadPoolExecutor(1, "commit")
        self._pending: Future[object] | None = None

    def __enter__(self) -> _Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._wait()
        except Exception:
            if error is None:  # else the first failure is the one to tell
                raise
        finally:
            self._thread.shutdown()

    def add(self, batch: Batch, rows: slice) -> None:
        """Take rows (numbers of the table) of a batch; they follow the rows taken before or start another shard."""
        plan = self.capturer.plan
        flags_N = batch.flags_N | outliers(batch, self.hooks)
        row = rows.start
        while row < rows.stop:
            shard = row // plan.shard_rows
            low, high = plan.shard_range(shard)
            end = min(high, rows.stop)
            inside = slice(row - batch.start, end - batch.start)
            buffer = self._buffers[0]
            at = slice(row - low, end - low)
            for hook in self.hooks:
                buffer.acts[hook.name][at] = stored_rows(self.capturer, batch, hook, inside)
            buffer.flags_S[at] = flags_N[inside]
            if end == high:
                self._commit(shard, low, high)
            row = end

    def _commit(self, shard: int, low: int, high: int) -> None:
        self._wait()
        full = self._buffers[0]
        self._buffers.reverse()
        self._pending = self._thread.submit(self._write, shard, low, high, full)

    def _write(self, shard: int, low: int, high: int, full: _Buffer) -> object:
        columns = {name: np.asarray(column[low:high]) for name, column in self.capturer.table.columns().items()}
        acts = {name: x_SD[: high - low] for name, x_SD in full.acts.items()}
        return self.writer.commit_shard(shard, acts, {**columns, "flags": full.flags_S[: high - low]})

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class _Buffer:
    """One shard of all hooks, in the format on disk."""

    def __init__(self, meta: StoreMeta) -> None:
        self.acts = {h.name: np.empty((meta.shard_rows, h.width), STORED_DTYPES[h.dtype]) for h in meta.hooks}
        self.flags_S = np.empty(meta.shard_rows, np.uint8)


def outliers(batch: Batch, hooks: Sequence[HookInfo]) -> np.ndarray:
    """FLAG_OUTLIER for the rows whose norm exceeds the threshold of any hook, else 0; (N,) uint8."""
    outlier_N = np.zeros(batch.stop - batch.start, bool)
    for hook in hooks:
        norm_N, limit = batch.norms[hook.name].astype(np.float64), hook.outlier_threshold
        near = np.flatnonzero(np.abs(norm_N - limit) <= NORM_SLACK * limit)
        if len(near):
            norm_N[near] = exact_norms(batch.acts[hook.name][near])
        outlier_N |= norm_N > limit
    return np.where(outlier_N, FLAG_OUTLIER, 0).astype(np.uint8)


def stored_rows(capturer: Capturer, batch: Batch, hook: HookInfo, rows: slice | np.ndarray) -> np.ndarray:
    """Rows of a batch (a slice or indices, counted in it) in the format on disk. StoreError where float16 overflows."""
    x_ND = batch.acts[hook.name][rows]
    if hook.dtype != "float16":
        return to_stored(x_ND, hook.dtype)
    stored_ND, overflow = to_float16(x_ND)
    if overflow:
        bad = int(np.flatnonzero(~np.isfinite(stored_ND).all(axis=1))[0])
        row = int(np.arange(batch.start, batch.stop)[rows][bad])
        raise StoreError(
            f"a value of {hook.name} is {np.abs(x_ND[bad]).max():.0f}, more than float16 holds "
            f"({FLOAT16_MAX:.0f}), in {capturer.where(row)}; set extract.dtype=bfloat16 and start anew"
        )
    return stored_ND
