"""`python -m pipeline.stream.child`: the capturing process of a streamed training. llama.cpp lives here, torch does not.

It is started by `CaptureProcess`, gets the settings, tells what it will capture, then decodes the blocks it is asked
for until the parent hangs up. It dies with its parent. Letters: N rows of a block, D width, n rows without flags.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import ConfigError, StoreError

from ..corpus.windows import FLAG_NOT_FINITE, FLAG_OUTLIER, FLAGS_ALL, WindowTable
from ..extract import Capturer, plan_extraction
from ..extract import _calibrate as calibrate
from ..run import RunContext
from ..stages.corpora import window_table
from ..stages.inputs import open_model
from ..store.commits import RunningMoments, ShardStats, shard_stats
from ..store.schema import DOCS_FILE, FLOAT16_MAX, HookInfo, dump_json, to_stored, write_atomic
from .messages import Calibration, Header, Pilot, Slots

PR_SET_PDEATHSIG = 1
FLAG_ROWS_AT_ONCE = 1 << 20


def main(connection_fd: int, memory_fd: int, parent: int) -> int:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Connection(connection_fd) as connection:
        try:
            serve(connection, memory_fd)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0  # the parent hung up
        except Exception as error:  # noqa: BLE001  whatever it is, the parent reports it
            send_error(connection, error)
            return 1
    return 0


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone; elsewhere than on Linux the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        sys.exit(1)


def send_error(connection: Connection, error: Exception) -> None:
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  an exception that cannot travel goes as text
        error = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        connection.send(("error", error, trace))
    except (BrokenPipeError, ConnectionResetError):
        return


def serve(connection: Connection, memory_fd: int) -> None:
    """Open model and corpus, send the header, then answer every (slot, block) with (slot, block, rows without flags)."""
    config, folder, known, slots = connection.recv()
    context = RunContext(command="train", folder=Path(folder), config=config, resumed=known is not None)
    with open_model(context) as model:
        table = window_table(context, model)
        write_documents(context.folder, table)
        if table.context_tokens > model.n_ctx_train:
            raise ConfigError(
                f"corpus.context_tokens={table.context_tokens} is more than the {model.n_ctx_train} the model was trained for"
            )
        plan = plan_extraction(model, table, config.hooks.points, extract=config.extract, store=config.store)
        if len(plan.hooks) != 1:
            raise ConfigError(
                f"trainer.source=stream trains at one hook point, hooks.points names {', '.join(plan.hooks)}"
            )
        with Capturer(model, table, plan, config.extract, config.model) as capturer:
            header = Header(
                calibration=calibrated(capturer, known),
                block_starts=np.asarray(plan.batch_rows, np.int64),
                unflagged_rows=unflagged_rows(table),
                model=model.id.as_dict(),
                documents=len(table.documents),
                inputs=context.inputs,
            )
            connection.send(("header", header))
            memory = Slots(memory_fd, header, slots)
            while True:
                slot, block = connection.recv()
                connection.send(("block", slot, block, capture_into(memory, slot, capturer, header, block)))


def write_documents(folder: Path, table: WindowTable) -> None:
    """As a store keeps them: which texts were trained on."""
    write_atomic(folder / DOCS_FILE, b"".join(dump_json(asdict(document)) for document in table.documents))


def capture_into(memory: Slots, slot: int, capturer: Capturer, header: Header, block: int) -> int:
    """Capture a block into a slot; returns its number of rows without flags."""
    hook = header.calibration.hook
    stored_nD, stats = unflagged_block(capturer, hook, block)
    memory.rows(slot, len(stored_nD))[:] = stored_nD
    memory.sums(slot)[:] = stats.sum_D, stats.centred_D
    return len(stored_nD)


def unflagged_block(capturer: Capturer, hook: HookInfo, block: int) -> tuple[np.ndarray, ShardStats]:
    """The rows of a block that are trained on, as a store would hold them, and their statistics.

    Raises StoreError for a value that float16 cannot hold.
    """
    batch = capturer.batch(block)
    x_ND, norm_N = batch.acts[hook.name], batch.norms[hook.name]
    flags_N = np.array(capturer.table.flags_N[batch.start : batch.stop])
    flags_N[norm_N > hook.outlier_threshold] |= FLAG_OUTLIER
    flags_N[~np.isfinite(norm_N)] |= FLAG_NOT_FINITE
    kept_n = np.flatnonzero(flags_N & FLAGS_ALL == 0)
    stored_nD = to_stored(x_ND[kept_n], hook.dtype)
    if hook.dtype == "float16" and not np.isfinite(stored_nD).all():
        row = int(kept_n[np.flatnonzero(~np.isfinite(stored_nD).all(axis=1))[0]])
        raise StoreError(
            f"a value of {hook.name} is {np.abs(x_ND[row]).max():.0f}, more than float16 holds ({FLOAT16_MAX:.0f}), "
            f"in {capturer.where(batch.start + row)}; set extract.dtype=bfloat16 and start a new run"
        )
    everything = np.ones(len(stored_nD), bool)
    return stored_nD, shard_stats(stored_nD, hook.dtype, everything, np.zeros(len(stored_nD), np.int32))


def calibrated(capturer: Capturer, known: dict[str, Any] | None) -> Calibration:
    """Number format, outlier threshold and pilot statistics: measured, or those a resumed run began with."""
    plan, model = capturer.plan, capturer.model.id
    if known is not None:
        calibration = Calibration.from_dict(known)
        for what, was, now in (
            ("model", calibration.model_sha256, model.sha256),
            ("corpus", calibration.corpus_hash, plan.corpus_hash),
            ("plan", calibration.config_hash, plan.config_hash),
        ):
            if was != now:
                raise ConfigError(
                    f"cannot resume the stream: its {what} was {was[:12]}, is {now[:12]}; start a new run"
                )
        return calibration
    (hook,) = calibrate(capturer)
    return Calibration(
        hook=hook,
        pilot=pilot(capturer, hook),
        corpus_hash=plan.corpus_hash,
        config_hash=plan.config_hash,
        model_sha256=model.sha256,
    )


def pilot(capturer: Capturer, hook: HookInfo) -> Pilot:
    """Statistics of the unflagged rows of batches spread evenly over the corpus, about `calibration_tokens` rows.

    A second pass over the calibration's batches: which rows are outliers is only known after the first.
    Raises StoreError where they are all flagged or all equal.
    """
    plan, wanted = capturer.plan, capturer.config.calibration_tokens // capturer.plan.max_batch_rows
    count = min(plan.n_batches, max(1, wanted))
    moments = RunningMoments.empty(hook.width)
    for block in np.unique(np.linspace(0, plan.n_batches - 1, count).round().astype(int)).tolist():
        _, stats = unflagged_block(capturer, hook, block)
        moments = moments.plus(stats.count, stats.sum_D, stats.centred_D)
    variance = float(moments.centred_D.sum() / moments.count) if moments.count else 0.0
    if variance <= 0:
        raise StoreError(
            f"the {moments.count} unflagged calibration rows at {hook.name} have no variance; "
            f"raise extract.calibration_tokens, or give more text"
        )
    return Pilot(rows=moments.count, mean_D=moments.mean_D, variance=variance)


def unflagged_rows(table: WindowTable) -> int:
    """Rows that the corpus itself does not flag, a piece of the column at a time."""
    return sum(
        int((np.asarray(table.flags_N[start : start + FLAG_ROWS_AT_ONCE]) & FLAGS_ALL == 0).sum())
        for start in range(0, table.rows, FLAG_ROWS_AT_ONCE)
    )


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
