"""Our side of the capture benchmarks, and llama.cpp alone: what a worker process of them runs.

`extract` is the real one: a window table of random tokens, the plan, calibration, callback, statistics, checksums,
zarr, fsync. Its speed is that of the capture phase, which `extract` reports to its user too.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import cache_folder, forget_peak, peak_bytes, random_windows, resident_bytes, serve
from bench.stores import drop_from_cache, write_store
from pipeline.capture.work import blocks_needed
from pipeline.config import ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.plan import Plan
from pipeline.corpus.windows import FLAG_BOS, FLAG_FIRST, FLAGS_ALL, DocumentInfo, WindowTable
from pipeline.extract import extract, plan_extraction
from pipeline.llama.batches import Batch
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session
from pipeline.llama.session import capture as capture_rows
from pipeline.llama.symbols import lc
from pipeline.store.encode import shard_key
from pipeline.store.reader import ActivationStore

READ_PIECE_BYTES = 8 << 20
models: dict[tuple[str, int], Model] = {}
memory_facts: dict[str, int] = {}


def model_at(path: str, points: Sequence[str] = ()) -> Model:
    """The model as `extract` loads it for these points by default; without any, all of it."""
    blocks = blocks_needed(Path(path), points, ExtractConfig())
    if (path, blocks) not in models:
        models[path, blocks] = Model(path, blocks=blocks)
    return models[path, blocks]


def random_table(windows: int, context: int, vocab: int, seed: int) -> WindowTable:
    """One document of random tokens in windows of `context`, BOS first."""
    token_N = random_windows(windows, context, vocab, seed).astype(np.int32).ravel()
    pos_N = np.tile(np.arange(context, dtype=np.int32), windows)
    return WindowTable(
        doc_N=np.zeros(len(token_N), np.int32),
        window_N=np.repeat(np.arange(windows, dtype=np.int32), context),
        pos_N=pos_N,
        token_N=token_N,
        byte_offset_N=np.arange(len(token_N), dtype=np.int64),
        flags_N=np.where(pos_N == 0, FLAG_BOS | FLAG_FIRST, 0).astype(np.uint8),
        window_starts=np.arange(windows + 1, dtype=np.int64) * context,
        documents=(DocumentInfo(name="random", bytes=len(token_N), sha256="0" * 64),),
        context_tokens=context,
        corpus_hash=hashlib.sha256(token_N.tobytes()).hexdigest(),
    )


def planned(model: Model, table: WindowTable, points: list[str], shape: dict[str, int], **settings: Any) -> tuple:
    """The settings of extract and its plan. `shape`: batch_tokens and ubatch_tokens."""
    config = ExtractConfig(calibration_tokens=shape["batch_tokens"], **shape, **settings)
    store = StoreConfig(shard_rows=min(table.rows, 8192))
    return config, plan_extraction(model, table, points, extract=config, store=store)


def run_extract(
    model: Model, table: WindowTable, points: list[str], shape: dict[str, int], threads: int, **settings: Any
) -> dict[str, Any]:
    """The one place that calls the pipeline: everything a user's `ggscope extract` does, into a new store on disk."""
    config, plan = planned(model, table, points, shape, **settings)
    folder = Path(tempfile.mkdtemp(dir=cache_folder(), prefix="store-"))
    try:
        return extract(
            model, table, plan, config=config, model_config=ModelConfig(n_threads=threads), store_path=folder / "store"
        )
    finally:
        shutil.rmtree(folder)


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    """A Python thread that computes all the time, where asked: what a tokenizer or a server in the process does."""
    ended = threading.Event()

    def work() -> None:
        total = 0
        while not ended.is_set():
            total += sum(range(100))

    thread = threading.Thread(target=work)
    if busy:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if busy:
            thread.join()


def run(
    path: str, points: list[str], windows: int, context: int, shape: dict[str, int], threads: int, seed: int,
    busy: bool = False, settings: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s of a capture."""
    model = model_at(path, points)
    table = random_table(windows, context, model.n_vocab, seed)
    memory_facts["table_bytes"] = sum(np.asarray(column).nbytes for column in table.columns().values())
    with beside(busy):
        summary = run_extract(model, table, points, shape, threads, **(settings or {}))
    return {"tokens_per_s": summary["tokens_per_s"]}


def bare(
    path: str, windows: int, context: int, shape: dict[str, int], threads: int, seed: int, busy: bool = False,
    outputs: bool = False, options: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s of `llama_decode` alone on batches of the same shape: no callback, nothing kept.

    `outputs` asks for the logits of every token, so that all of the last block is computed. `options` are settings
    of llama.cpp's context.
    """
    model = model_at(path)
    table = random_table(windows, context, model.n_vocab, seed)
    _, plan = planned(model, table, ["blocks.0.hook_resid_pre"], shape)
    context_pointer = bare_context(model, plan, context, shape["ubatch_tokens"], threads, **(options or {}))
    try:
        decode_all(context_pointer, table, plan, outputs=outputs, first=1)  # threads and buffers
        with beside(busy):
            started = time.perf_counter()
            decode_all(context_pointer, table, plan, outputs=outputs)
            seconds = time.perf_counter() - started
    finally:
        lc.llama_free(context_pointer)
    return {"tokens_per_s": table.rows / seconds}


def bare_context(model: Model, plan: Plan, context: int, ubatch_tokens: int, threads: int, **more: Any) -> Any:
    """A context like the one extract makes, without a callback."""
    params = lc.llama_context_default_params()
    params.n_seq_max = plan.max_batch_windows
    params.n_ctx = context * plan.max_batch_windows
    params.n_batch = plan.max_batch_rows
    params.n_ubatch = min(ubatch_tokens, plan.max_batch_rows)
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = 1
    params.kv_unified = params.n_seq_max == 1
    params.swa_full = params.no_perf = True
    for name, value in more.items():
        setattr(params, name, value)
    found = lc.llama_init_from_model(model.handle, params)
    if not found:
        raise RuntimeError(f"no context of {params.n_ctx} tokens")
    return found


def decode_all(context_pointer: Any, table: WindowTable, plan: Plan, *, outputs: bool = False, first: int = 0) -> None:
    """Every batch of the plan, each from an empty KV cache; `first` > 0: only so many."""
    for index in range(first or plan.n_batches):
        rows = slice(int(plan.batch_rows[index]), int(plan.batch_rows[index + 1]))
        seq_N = table.window_N[rows] - table.window_N[rows.start]
        batch = Batch(table.token_N[rows], seq_N, table.pos_N[rows], np.full(rows.stop - rows.start, outputs))
        lc.llama_memory_clear(lc.llama_get_memory(context_pointer), False)
        code = lc.llama_decode(context_pointer, batch.c)
        lc.llama_synchronize(context_pointer)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")


def activation(path: str, out: str, point: str, windows: int, context: int, threads: int, seed: int) -> dict[str, Any]:
    """Write the values (rows, D) float32, window after window, in the setting extract uses."""
    model = model_at(path, [point])
    tokens_BT = random_windows(windows, context, model.n_vocab, seed)
    with Session(
        model,
        n_ctx=context * windows,
        n_batch=context * windows,
        n_seq_max=windows,
        n_threads=threads,
        kv_unified=False,
    ) as session:
        values = capture_rows(session, list(tokens_BT.astype(np.int32)), [HookPoint.parse(point)])
    np.save(out, np.concatenate([v[point] for v in values]))
    return {}


def _hook_files(store: ActivationStore) -> list[Path]:
    info = store.meta.hooks[0]
    return [Path(store.path) / shard_key(info.array_path, shard, 2) for shard in range(store.meta.n_shards)]


def read_raw(path: str) -> dict[str, Any]:
    """MB/s of reading the hook's files one after the other, from the disk."""
    store = ActivationStore(path)
    files = _hook_files(store)
    drop_from_cache(Path(store.path))
    buffer = bytearray(READ_PIECE_BYTES)
    total, started = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return {"mb_per_s": total / 1e6 / (time.perf_counter() - started)}


def read_shuffled(path: str, batch_rows: int) -> dict[str, Any]:
    """MB/s, of the bytes on disk, of one epoch of shuffled float32 batches, from the disk."""
    store = ActivationStore(path)
    info = store.meta.hooks[0]
    drop_from_cache(Path(store.path))
    started = time.perf_counter()
    batches = store.batches(info.name, batch_rows=batch_rows, seed=0, exclude_flags=FLAGS_ALL)
    for _ in range(store.n_rows // batch_rows):
        batches.next()
    seconds = time.perf_counter() - started
    rows = store.n_rows // batch_rows * batch_rows
    return {"mb_per_s": rows * info.width * 2 / 1e6 / seconds}


def start_memory() -> dict[str, Any]:
    forget_peak()
    memory_facts["bytes"] = resident_bytes()
    return {}


def memory() -> dict[str, Any]:
    """Peak resident bytes since `start_memory`, less those resident then; and the size of the last table."""
    return {"bytes": peak_bytes() - memory_facts["bytes"], "table_bytes": memory_facts["table_bytes"]}


def facts(path: str) -> dict[str, Any]:
    model = model_at(path)
    return {"vocab": model.n_vocab, "blocks": model.n_layer, "bytes": Path(path).stat().st_size}


OPERATIONS = {
    "run": run,
    "bare": bare,
    "activation": activation,
    "write_store": write_store,
    "read_raw": read_raw,
    "read_shuffled": read_shuffled,
    "start_memory": start_memory,
    "memory": memory,
    "facts": facts,
}

if __name__ == "__main__":
    serve(OPERATIONS)
