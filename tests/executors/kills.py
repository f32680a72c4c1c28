"""SIGKILL to the worker that is in the middle of a shard: the same check for every engine."""

from __future__ import annotations

import os
import signal
import threading

from pipeline.executors import open_executor
from pipeline.store.schema import read_meta
from tests.executors.capture_work import BATCH_ROWS, SHARD_ROWS, make_work
from tests.executors.file_work import wait_until
from tests.store.helpers import files_of


def kill_mid_shard(config, model_path, folder, straight, *, after_rows):
    """The store ends as that of an undisturbed run, and no more was captured again than the shard in flight."""
    work = make_work(model_path, folder, hold_at_rows=after_rows)
    killed = []

    def kill() -> None:
        wait_until((work.log / "held").exists)
        killed.append(int((work.log / "held").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    calls = []
    open_executor(config, folder).run(work, progress=lambda done, total: calls.append((done, total)))
    killer.join()
    assert killed != [os.getpid()]
    assert files_of(work.store) == straight
    total = read_meta(work.store).rows
    assert calls[-1] == (total, total)
    again = work.rows_captured() - total
    assert 0 < again < SHARD_ROWS + BATCH_ROWS
