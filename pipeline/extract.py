"""Capture: the activations of a window table, through llama.cpp, into a store.

The order of things: plan (pure), calibration (number format and outlier thresholds, stored with the
first run), then shard after shard, each committed when it is on disk. A run that was killed redoes the
shards without a commit; batches across a shard border are computed again, from an empty KV cache and
with the same neighbours, so the bytes are those of an undisturbed run on the same machine, build and
number of threads. Letters: N rows, D width of a hook, S rows per shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import ConfigError, HookError

from .capture.calibrate import Calibration, calibrate, measure_speed
from .capture.capturer import Capturer
from .capture.shards import capture_shards
from .config import ExtractConfig, ModelConfig, StoreConfig
from .corpus.plan import Plan, make_plan
from .corpus.windows import COLUMN_DTYPES, FLAG_NOT_FINITE, WindowTable
from .llama.hooks import NOT_STORABLE
from .llama.model import Model
from .llama.session import Session, capture
from .store.backends import Location, open_backend
from .store.commits import committed_shards
from .store.reader import ActivationStore
from .store.schema import HookInfo, StoreMeta, is_store, read_meta
from .store.summary import write_stats
from .store.writer import StoreWriter, check_room, refuse_difference

if TYPE_CHECKING:
    from .capture.work import CaptureWork
    from .executors.base import Executor

NAMED_IN_SUMMARY = 5
BLOCK_ROWS = 1 << 22

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a capture will cost, known before its first shard."""

    rows: int
    rows_missing: int
    shards_missing: int
    bytes_missing: int
    free_bytes: int | None  # None: unknown (object storage)
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        return self.rows_missing / self.tokens_per_s

    def check(self, location: Location) -> None:
        """StoreError, with the numbers, when the disk cannot hold it."""
        check_room(location, self.bytes_missing, self.free_bytes)


def plan_extraction(
    model: Model, table: WindowTable, points: list[str], *, extract: ExtractConfig, store: StoreConfig
) -> Plan:
    """The plan of capturing `points`; their widths come from decoding one token.

    Raises HookError for a point the model does not have or that cannot be stored, ConfigError for
    settings that do not fit.
    """
    if table.context_tokens > model.n_ctx_train:
        raise ConfigError(
            f"corpus.context_tokens={table.context_tokens} is more than the {model.n_ctx_train} the model was trained for"
        )
    return make_plan(table, hooks=hook_widths(model, points), extract=extract, store=store)


def hook_widths(model: Model, points: list[str], config: ModelConfig | None = None) -> dict[str, int]:
    """Hook point, by its full name, to width; wildcards and ranges are expanded, on the graph `config` gives."""
    if not points:
        return {}
    config = config or ModelConfig()
    # one token: more threads would only wait for each other
    with Session(model, n_ctx=8, n_threads=1, kv_type=config.kv_type, flash_attn=config.flash_attn) as session:
        parsed = session.expand(points)
        for point in parsed:
            if point.site in NOT_STORABLE:
                why = (
                    f"it has no fixed width per token; `ggscope lens --prompt TEXT 'lens.attention=[{point.block}]'` writes it"
                    if point.site == "pattern"
                    else "its rows are as wide as the vocabulary"
                )
                raise HookError(f"'{point}' cannot be stored: {why}")
        rows = capture(session, [np.array([model.bos or 0])], parsed)[0]
    return {str(point): rows[str(point)].shape[1] for point in parsed}


def estimate(
    model: Model,
    table: WindowTable,
    plan: Plan,
    *,
    config: ExtractConfig,
    model_config: ModelConfig,
    store_path: Location,
) -> Estimate:
    """What `extract` with the same arguments would cost, from a short calibration; nothing is written."""
    with Capturer(model, table, plan, config, model_config) as capturer:
        return _prepare(capturer, store_path)[1]


def extract(
    model: Model,
    table: WindowTable,
    plan: Plan,
    *,
    config: ExtractConfig,
    model_config: ModelConfig,
    store_path: Location,
    progress: Progress | None = None,
    planned: Callable[[Estimate], None] | None = None,
    elsewhere: tuple[Executor, CaptureWork] | None = None,
) -> dict[str, Any]:
    """Capture every row of `table` at the hooks of `plan` into the store at `store_path`, or what is missing of it.

    `planned` gets the estimate before the first shard; `progress` gets (rows done, rows in all). `elsewhere`: the
    executor and the work for it, instead of capturing in this process; the model is closed then, to make room.
    Returns rows, rows_captured, tokens_per_s, seconds, dtype, flagged_share, not_finite_rows, not_finite [(document,
    window)], shards_done, shards_skipped, documents, skipped_documents [(name, reason)], bytes.

    Raises StoreError (locked, other settings, disk full, float16 overflow), LlamaError (llama.cpp failed, or gives no
    finite value at all). Committed shards are safe whatever happens, KeyboardInterrupt included.
    """
    assert plan.corpus_hash == table.corpus_hash, "the plan belongs to another window table"
    with Capturer(model, table, plan, config, model_config) as capturer:
        meta, cost = _prepare(capturer, store_path)
        cost.check(store_path)
        if planned is not None:
            planned(cost)
        with StoreWriter(store_path, meta, table.documents) as writer:
            missing = writer.missing()
            counter = _Counter(plan, missing, progress)
            started = time.monotonic()
            if missing and elsewhere is not None:
                capturer.close()
                model.close()
                executor, work = elsewhere

                def committed(rows: int, _total: int) -> None:
                    writer.check_lock()  # the workers do not hold it
                    counter.set(rows)

                executor.run(work, progress=committed)
                writer.backend.remove_partial()  # of workers that died
            elif missing:
                capture_shards(capturer, writer, missing, counter.add)
            seconds = time.monotonic() - started
            writer.check_lock()
            write_stats(store_path)
    return _summary(table, meta, store_path, missing, counter.captured, seconds)


class _Counter:
    """Rows captured, for the progress bar."""

    def __init__(self, plan: Plan, missing: list[int], progress: Progress | None) -> None:
        self.captured, self._progress, self._total = 0, progress, plan.rows
        self._skipped = plan.rows - sum(stop - start for start, stop in map(plan.shard_range, missing))
        self.set(0)

    def add(self, rows: int) -> None:
        self.set(self.captured + rows)

    def set(self, rows: int) -> None:
        self.captured = rows
        if self._progress is not None:
            self._progress(min(self._skipped + self.captured, self._total), self._total)


def _prepare(capturer: Capturer, store_path: Location) -> tuple[StoreMeta, Estimate]:
    """Metadata of the store to write, calibrated or as the store has them, and what is missing of it."""
    there = read_meta(store_path) if is_store(store_path) else None
    missing = list(range(capturer.plan.n_shards))
    if there is not None:
        meta = _meta(capturer, _known_hooks(capturer.plan, there))
        refuse_difference(store_path, there, meta)
        missing = sorted(set(missing) - set(committed_shards(store_path)))
        calibration = measure_speed(capturer) if missing else Calibration(hooks=(), rows=0, tokens_per_s=1.0)
    else:
        calibration = calibrate(capturer)
        meta = _meta(capturer, calibration.hooks)
    ranges = [meta.shard_range(shard) for shard in missing]
    cost = Estimate(
        rows=meta.rows,
        rows_missing=sum(stop - start for start, stop in ranges),
        shards_missing=len(missing),
        bytes_missing=meta.shard_bytes * len(missing),
        free_bytes=open_backend(store_path).free_bytes(),
        tokens_per_s=calibration.tokens_per_s,
    )
    return meta, cost


def _known_hooks(plan: Plan, there: StoreMeta) -> tuple[HookInfo, ...]:
    """The hooks of the plan as the store measured them; those it lacks make its metadata differ, which is refused."""
    measured = {hook.name: hook for hook in there.hooks}
    unknown = {
        name: HookInfo(name=name, width=width, dtype="float16", outlier_threshold=0.0)
        for name, width in plan.hooks.items()
    }
    return tuple(measured.get(name, unknown[name]) for name in plan.hooks)


def _meta(capturer: Capturer, hooks: tuple[HookInfo, ...]) -> StoreMeta:
    plan, config, model_config = capturer.plan, capturer.config, capturer.model_config
    return StoreMeta(
        rows=plan.rows,
        shard_rows=plan.shard_rows,
        chunk_rows=plan.chunk_rows,
        hooks=hooks,
        columns=dict(COLUMN_DTYPES),
        corpus_hash=plan.corpus_hash,
        config_hash=plan.config_hash,
        model=capturer.model.id.as_dict(),
        config={
            "context_tokens": capturer.table.context_tokens,
            "batch_tokens": config.batch_tokens,
            "ubatch_tokens": config.ubatch_tokens,
            "dtype": config.dtype,
            "calibration_tokens": config.calibration_tokens,
            "outlier_factor": config.outlier_factor,
            "kv_type": model_config.kv_type,
            "flash_attn": model_config.flash_attn,
            "llama_cpp_python": version("llama-cpp-python"),
        },
    )


def _not_finite(store: ActivationStore) -> tuple[int, list[tuple[int, int]]]:
    """Rows of a store with values that are not finite, and (document, window) of the first few."""
    rows, named = 0, dict[tuple[int, int], None]()
    for start in range(0, store.n_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, store.n_rows)
        bad_n = np.flatnonzero(store.column_rows("flags", start, stop) & FLAG_NOT_FINITE)
        rows += len(bad_n)
        if len(bad_n) and len(named) < NAMED_IN_SUMMARY:
            doc_n, window_n = (store.column_rows(name, start, stop)[bad_n] for name in ("doc", "window"))
            changed_n = np.r_[0, 1 + np.flatnonzero((np.diff(doc_n) != 0) | (np.diff(window_n) != 0))]
            firsts = changed_n[: NAMED_IN_SUMMARY + 1]  # the first one may be named already
            named |= dict.fromkeys(zip(doc_n[firsts].tolist(), window_n[firsts].tolist(), strict=True))
    return rows, list(named)[:NAMED_IN_SUMMARY]


def _summary(
    table: WindowTable, meta: StoreMeta, store_path: Location, missing: list[int], captured: int, seconds: float
) -> dict[str, Any]:
    done = ActivationStore(store_path)
    bad_rows, windows = _not_finite(done)
    return {
        "rows": done.n_rows,
        "rows_captured": captured,
        "seconds": seconds,
        "tokens_per_s": captured / seconds if captured else 0.0,
        "dtype": ", ".join(sorted({hook.dtype for hook in meta.hooks})),
        "flagged_share": done.flagged_rows / max(done.n_rows, 1),
        "not_finite_rows": bad_rows,
        "not_finite": [(table.documents[doc].name, window) for doc, window in windows],
        "shards_done": len(missing),
        "shards_skipped": meta.n_shards - len(missing),
        "documents": len(table.documents),
        "skipped": table.report.n_skipped,
        "skipped_documents": list(table.report.skipped),
        "bytes": meta.shard_bytes * meta.n_shards,
    }
