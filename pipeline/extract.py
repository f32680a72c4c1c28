"""Capture: the activations of a window table, through llama.cpp, into a store.

The order of things: plan (pure), calibration (number format and outlier thresholds, stored with the
first run), then shard after shard, each committed when it is on disk. A run that was killed redoes the
shards without a commit; batches across a shard border are computed again, from an empty KV cache and
with the same neighbours, so the bytes are those of an undisturbed run on the same machine, build and
number of threads. Letters: N rows, D width of a hook, S rows per shard.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sae.errors import ConfigError, HookError, LlamaError, StoreError

from .config import ExtractConfig, ModelConfig, StoreConfig
from .corpus.plan import Plan, make_plan
from .corpus.windows import COLUMN_DTYPES, FLAG_OUTLIER, FLAGS_ALL, WindowTable
from .llama.hooks import NOT_STORABLE, HookPoint
from .llama.model import Model
from .llama.session import Hook, Rows, Session, capture
from .store.reader import ActivationStore
from .store.schema import FLOAT16_MAX, META_FILE, STORED_DTYPES, HookInfo, StoreMeta, read_meta, to_stored
from .store.writer import StoreWriter

FLOAT16_CALIBRATED_MAX = FLOAT16_MAX / 4  # dtype=auto keeps this much room above the calibration rows

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows `start : stop` of the table: values per hook (N, D) float32, and the final flags (N,)."""

    start: int
    stop: int
    acts: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]


def plan_extraction(
    model: Model, table: WindowTable, points: list[str], *, extract: ExtractConfig, store: StoreConfig
) -> Plan:
    """The plan of capturing `points`; their widths come from decoding one token.

    Raises HookError for a point the model does not have or that cannot be stored, ConfigError for
    settings that do not fit.
    """
    return make_plan(table, hooks=hook_widths(model, points), extract=extract, store=store)


def hook_widths(model: Model, points: list[str]) -> dict[str, int]:
    """Hook point, by its full name, to width; wildcards and ranges are expanded."""
    if not points:
        return {}
    with Session(model, n_ctx=8, n_threads=1) as session:  # one token: more threads only wait for each other
        parsed = session.expand(points)
        for point in parsed:
            if point.site in NOT_STORABLE:
                raise HookError(f"'{point}' cannot be stored: it has no fixed width per token; take it from the lens")
        rows = capture(session, [np.array([model.bos or 0])], parsed)[0]
    return {str(point): rows[str(point)].shape[1] for point in parsed}


def extract(
    model: Model,
    table: WindowTable,
    plan: Plan,
    *,
    config: ExtractConfig,
    model_config: ModelConfig,
    store_path: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Capture every row of `table` at the hooks of `plan` into the store at `store_path`, or what is missing of it.

    `progress` gets (rows done, rows in all). Returns rows, rows_captured, tokens_per_s, seconds, dtype,
    flagged_share, shards_done, shards_skipped, documents, skipped_documents [(name, reason)], bytes.

    Raises StoreError (locked, other settings, disk full, float16 overflow), LlamaError (a value that is
    not finite, naming document and window; or llama.cpp failed), ConfigError (windows the model cannot take).
    Committed shards are safe whatever happens, KeyboardInterrupt included.
    """
    assert plan.corpus_hash == table.corpus_hash, "the plan belongs to another window table"
    if table.context_tokens > model.n_ctx_train:
        raise ConfigError(
            f"corpus.context_tokens={table.context_tokens} is more than the {model.n_ctx_train} the model was trained for"
        )
    store_path = Path(store_path)
    with Capturer(model, table, plan, config, model_config) as capturer:
        meta = _meta(capturer, store_path)
        with StoreWriter(store_path, meta, table.documents) as writer:
            missing = writer.missing()
            started = time.monotonic()
            captured = _capture_shards(capturer, writer, missing, progress)
            seconds = time.monotonic() - started
    done = ActivationStore(store_path)
    return {
        "rows": done.n_rows,
        "rows_captured": captured,
        "seconds": seconds,
        "tokens_per_s": captured / seconds if captured else 0.0,
        "dtype": ", ".join(sorted({hook.dtype for hook in meta.hooks})),
        "flagged_share": done.flagged_rows / max(done.n_rows, 1),
        "shards_done": len(missing),
        "shards_skipped": meta.n_shards - len(missing),
        "documents": len(table.documents),
        "skipped_documents": list(table.report.skipped),
        "bytes": meta.shard_bytes * meta.n_shards,
    }


class Capturer:
    """Runs the batches of a plan through one llama.cpp context, made when the first batch is asked for."""

    def __init__(
        self, model: Model, table: WindowTable, plan: Plan, config: ExtractConfig, model_config: ModelConfig
    ) -> None:
        self.model, self.table, self.plan = model, table, plan
        self.config, self.model_config = config, model_config
        self._session: Session | None = None
        self._points = {name: HookPoint.parse(name) for name in plan.hooks}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.close()

    def batch(self, index: int) -> Batch:
        """Decode one batch from an empty KV cache, stopping after the deepest hook.

        Raises LlamaError when a value is not finite, naming hook, document and window.
        """
        start, stop = (int(row) for row in self.plan.batch_rows[index : index + 2])
        acts = self._decode(start, stop)
        norms = {name: _norms(x_ND) for name, x_ND in acts.items()}
        if not all(np.isfinite(norm_N).all() for norm_N in norms.values()):
            raise self._not_finite(index, acts)
        return Batch(start=start, stop=stop, acts=acts, norms=norms)

    def where(self, row: int) -> str:
        """`document 'x.py', window 12`."""
        document = self.table.documents[int(self.table.doc_N[row])].name
        return f"document {document!r}, window {int(self.table.window_N[row])}"

    def _open(self) -> Session:
        if self._session is None:
            # A KV cache of its own per window: attending over the whole batch's cells, masked, cost 25 % of the speed.
            self._session = Session(
                self.model,
                n_ctx=self.table.context_tokens * self.plan.max_batch_windows,
                n_batch=self.plan.max_batch_rows,
                n_ubatch=min(self.config.ubatch_tokens, self.plan.max_batch_rows),
                n_seq_max=self.plan.max_batch_windows,
                n_threads=self.model_config.n_threads,
                kv_type=self.model_config.kv_type,
                flash_attn=self.model_config.flash_attn,
                kv_unified=False,
            )
        return self._session

    def _decode(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Values of the rows `start : stop`, whole windows, by hook."""
        rows = slice(start, stop)
        acts = {name: np.empty((stop - start, width), np.float32) for name, width in self.plan.hooks.items()}
        session = self._open()
        session.clear()
        last_block = any(session.graph.find(point).outputs_only for point in self._points.values())
        session.decode(
            self.table.token_N[rows],
            self.table.window_N[rows] - self.table.window_N[start],
            self.table.pos_N[rows],
            hooks=[Hook(point, read=_into(acts[name])) for name, point in self._points.items()],
            logits="all" if last_block else "none",
            stop_early=True,
        )
        return acts

    def _not_finite(self, index: int, acts: dict[str, np.ndarray]) -> LlamaError:
        """The error for a batch with values that are not finite.

        What a value that is not finite spoils beside its own window depends on how the backend computes a
        batch, so each window is run alone to find the one that is to blame.
        """
        first, last = (int(window) for window in self.plan.batch_windows[index : index + 2])
        borders = self.table.window_starts[first : last + 1].tolist()
        for start, stop in itertools.pairwise(borders):
            for name, x_ND in self._decode(start, stop).items():
                bad = np.flatnonzero(~np.isfinite(x_ND).all(axis=1))
                if len(bad):
                    return self._blame(name, start + int(bad[0]))
        name, x_ND = next((name, x) for name, x in acts.items() if not np.isfinite(x).all())
        return self._blame(name, borders[0] + int(np.flatnonzero(~np.isfinite(x_ND).all(axis=1))[0]))

    def _blame(self, hook: str, row: int) -> LlamaError:
        return LlamaError(
            f"the model gives values that are not finite at {hook} in {self.where(row)}; "
            f"check the model file, or leave that document out"
        )


def _norms(x_ND: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64))


def _into(out_ND: np.ndarray) -> Callable[[Rows], None]:
    def read(rows: Rows) -> None:
        out_ND[rows.index_N] = rows.values_ND

    return read


def _meta(capturer: Capturer, store_path: Path) -> StoreMeta:
    """Metadata of the store to write: those of the store that is there where they were measured, else calibrated."""
    plan, config, model_config = capturer.plan, capturer.config, capturer.model_config
    there = read_meta(store_path) if (store_path / META_FILE).exists() else None
    meta = StoreMeta(
        rows=plan.rows,
        shard_rows=plan.shard_rows,
        chunk_rows=plan.chunk_rows,
        hooks=(),
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
    if there is None:
        return replace(meta, hooks=_calibrate(capturer))
    measured = {hook.name: hook for hook in there.hooks}
    unknown = {
        name: HookInfo(name=name, width=width, dtype="float16", outlier_threshold=0.0)
        for name, width in plan.hooks.items()
    }
    return replace(meta, hooks=tuple(measured.get(name, unknown[name]) for name in plan.hooks))


def _calibrate(capturer: Capturer) -> tuple[HookInfo, ...]:
    """Number format and outlier threshold of every hook, from batches spread evenly over the corpus.

    float16 where max |x| < 16376, a quarter of its largest value, else bfloat16; a given dtype stands.
    Threshold: `outlier_factor` times the median norm of the rows without flags.
    """
    plan, config = capturer.plan, capturer.config
    wanted = min(plan.n_batches, max(1, config.calibration_tokens // plan.max_batch_rows))
    chosen = np.unique(np.linspace(0, plan.n_batches - 1, wanted).round().astype(int)).tolist()
    largest = dict.fromkeys(plan.hooks, 0.0)
    norms: dict[str, list[np.ndarray]] = {name: [] for name in plan.hooks}
    for index in chosen:
        batch = capturer.batch(index)
        unflagged = (capturer.table.flags_N[batch.start : batch.stop] & FLAGS_ALL) == 0
        for name, x_ND in batch.acts.items():
            largest[name] = max(largest[name], float(np.abs(x_ND).max()))
            norms[name].append(batch.norms[name][unflagged if unflagged.any() else slice(None)])
    infos = []
    for name, width in plan.hooks.items():
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float16" if largest[name] < FLOAT16_CALIBRATED_MAX else "bfloat16"
        median = float(np.median(np.concatenate(norms[name])))
        # A hook that is zero on the median row has no scale to be an outlier of.
        threshold = config.outlier_factor * median if median > 0 else float(np.finfo(np.float64).max)
        infos.append(HookInfo(name=name, width=width, dtype=dtype, outlier_threshold=threshold))
    return tuple(infos)


def _capture_shards(capturer: Capturer, writer: StoreWriter, missing: list[int], progress: Progress | None) -> int:
    """Capture and commit the missing shards; returns the rows captured."""
    plan = capturer.plan
    captured = 0
    skipped = plan.rows - sum(stop - start for start, stop in map(plan.shard_range, missing))
    if progress is not None:
        progress(skipped, plan.rows)
    buffer = _ShardBuffer(writer.meta, plan.max_batch_rows) if missing else None
    for first, last in _runs(missing):
        assert buffer is not None
        shard = first
        start, stop = plan.shard_range(first)[0], plan.shard_range(last)[1]
        for index in plan.batches_of(start, stop):
            batch = capturer.batch(index)
            inside = slice(max(start - batch.start, 0), min(stop, batch.stop) - batch.start)
            flags_N = capturer.table.flags_N[batch.start : batch.stop] | _outliers(batch, writer.meta)
            buffer.add(batch, inside, flags_N, capturer)
            captured += inside.stop - inside.start
            while shard <= last and buffer.rows >= np.diff(plan.shard_range(shard))[0]:
                low, high = plan.shard_range(shard)
                acts, flags_S = buffer.head(high - low)
                columns = {name: column[low:high] for name, column in capturer.table.columns().items()}
                writer.commit_shard(shard, acts, {**columns, "flags": flags_S})
                buffer.drop(high - low)
                shard += 1
            if progress is not None:
                progress(skipped + captured, plan.rows)
    return captured


class _ShardBuffer:
    """Rows on their way to disk, in the format on disk: at most a shard and a batch."""

    def __init__(self, meta: StoreMeta, batch_rows: int) -> None:
        capacity = meta.shard_rows + batch_rows
        self.hooks = meta.hooks
        self.acts = {h.name: np.empty((capacity, h.width), STORED_DTYPES[h.dtype]) for h in meta.hooks}
        self.flags = np.empty(capacity, np.uint8)
        self.rows = 0

    def add(self, batch: Batch, inside: slice, flags_N: np.ndarray, capturer: Capturer) -> None:
        """Take the rows `inside` of a batch. Raises StoreError when a value does not fit the store's dtype."""
        into = slice(self.rows, self.rows + inside.stop - inside.start)
        for hook in self.hooks:
            x_ND = batch.acts[hook.name][inside]
            stored = to_stored(x_ND, hook.dtype)
            if hook.dtype == "float16" and not np.isfinite(stored).all():
                row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
                raise StoreError(
                    f"a value of {hook.name} is {np.abs(x_ND[row]).max():.0f}, more than float16 holds "
                    f"({FLOAT16_MAX:.0f}), in {capturer.where(batch.start + inside.start + row)}; "
                    f"set extract.dtype=bfloat16 and extract into a new store"
                )
            self.acts[hook.name][into] = stored
        self.flags[into] = flags_N[inside]
        self.rows = into.stop

    def head(self, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The first rows, as views."""
        return {name: x[:rows] for name, x in self.acts.items()}, self.flags[:rows]

    def drop(self, rows: int) -> None:
        """Forget the first rows; the rest moves to the front."""
        left = self.rows - rows
        for array in (*self.acts.values(), self.flags):
            array[:left] = array[rows : self.rows].copy()
        self.rows = left


def _outliers(batch: Batch, meta: StoreMeta) -> np.ndarray:
    """FLAG_OUTLIER for the rows whose norm exceeds the threshold of any hook, else 0; (N,) uint8."""
    outlier_N = np.zeros(batch.stop - batch.start, bool)
    for hook in meta.hooks:
        outlier_N |= batch.norms[hook.name] > hook.outlier_threshold
    return np.where(outlier_N, FLAG_OUTLIER, 0).astype(np.uint8)


def _runs(shards: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours, so that a border batch between two of them is computed once."""
    first = 0
    for index in range(len(shards)):
        if index + 1 == len(shards) or shards[index + 1] != shards[index] + 1:
            yield shards[first], shards[index]
            first = index + 1
