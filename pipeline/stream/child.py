"""`python -m pipeline.stream.child`: the capturing process of a streamed training. llama.cpp lives here, torch does not.

It is started by `CaptureProcess`, gets the settings, tells what it will capture, then decodes the blocks it is asked
for until the parent hangs up. It dies with its parent. Letters: N rows of a block, D width, n rows without flags.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import ConfigError, StoreError

from ..capture.calibrate import calibrate, calibration_batches
from ..capture.capturer import Capturer
from ..capture.shards import outliers, stored_rows
from ..corpus.plan import make_plan
from ..corpus.windows import FLAG_NOT_FINITE, FLAGS_ALL, WindowTable
from ..executors.processes import die_with_parent, portable
from ..log_lines import show_warnings
from ..run import RunContext
from ..stages.corpora import window_table
from ..stages.executing import capture_model
from ..store.backends import LocalBackend
from ..store.schema import DOCS_FILE, HookInfo, dump_json
from ..store.statistics import RunningMoments, ShardStats, shard_stats
from .messages import NAMED_WINDOWS, Calibration, Header, NotFinite, Pilot, Slots

FLAG_ROWS_AT_ONCE = 1 << 20


def main(connection_fd: int, memory_fd: int, parent: int) -> int:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    show_warnings()
    with Connection(connection_fd) as connection:
        try:
            serve(connection, memory_fd)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0  # the parent hung up
        except Exception as error:  # noqa: BLE001  whatever it is, the parent reports it
            send_error(connection, error)
            return 1
    return 0


def send_error(connection: Connection, error: Exception) -> None:
    trace = "".join(traceback.format_exception(error))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(("error", portable(error), trace))


def serve(connection: Connection, memory_fd: int) -> None:
    """Open model and corpus, send the header, then answer every (slot, block) with (slot, block, rows without flags, rows not finite)."""
    config, folder, known, slots = connection.recv()
    context = RunContext(command="train", folder=Path(folder), config=config, resumed=known is not None)
    with capture_model(context) as (model, widths):
        if len(widths) != 1:
            raise ConfigError(f"trainer.source=stream trains at one hook point, hook.points names {', '.join(widths)}")
        table = window_table(context, model, spool=True)
        write_documents(context.folder, table)
        plan = make_plan(table, hooks=widths, extract=config.extract, store=config.store)
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
                connection.send(("block", slot, block, *capture_into(memory, slot, capturer, header, block)))


def write_documents(folder: Path, table: WindowTable) -> None:
    """As a store keeps them: which texts were trained on."""
    LocalBackend(folder).put(DOCS_FILE, (dump_json(asdict(document)) for document in table.documents))


def capture_into(memory: Slots, slot: int, capturer: Capturer, header: Header, block: int) -> tuple[int, NotFinite]:
    """Capture a block into a slot; returns its number of rows without flags, and its rows that are not finite."""
    hook = header.calibration.hook
    stored_nD, stats, spoiled = unflagged_block(capturer, hook, block)
    memory.rows(slot, len(stored_nD))[:] = stored_nD
    memory.sums(slot)[:] = stats.sum_D, stats.centred_D
    return len(stored_nD), spoiled


def unflagged_block(capturer: Capturer, hook: HookInfo, block: int) -> tuple[np.ndarray, ShardStats, NotFinite]:
    """The rows of a block that are trained on, as a store would hold them, their statistics, and what is not finite.

    Raises StoreError for a value that float16 cannot hold.
    """
    batch = capturer.batch(block)
    flags_N = batch.flags_N | outliers(batch, [hook])
    stored_nD = stored_rows(capturer, batch, hook, np.flatnonzero(flags_N & FLAGS_ALL == 0))
    everything = np.ones(len(stored_nD), bool)
    stats = shard_stats(stored_nD, hook.dtype, everything, np.zeros(len(stored_nD), np.int32))
    return stored_nD, stats, not_finite(capturer.table, batch.start + np.flatnonzero(batch.flags_N & FLAG_NOT_FINITE))


def not_finite(table: WindowTable, row_n: np.ndarray) -> NotFinite:
    """These rows of the table, counted, with the documents and windows of the first."""
    window_n = table.window_N[row_n]
    _, first = np.unique(window_n, return_index=True)  # rows ascend, and so do windows
    first = first[:NAMED_WINDOWS]
    names = [table.documents[int(doc)].name for doc in table.doc_N[row_n[first]]]
    return NotFinite(rows=len(row_n), windows=tuple(zip(names, window_n[first].tolist(), strict=True)))


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
    (hook,) = calibrate(capturer).hooks
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
    moments = RunningMoments.empty(hook.width)
    for block in calibration_batches(capturer):
        _, stats, _ = unflagged_block(capturer, hook, block)
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
