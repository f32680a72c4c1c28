"""SIGKILL to the worker that is in the middle of a shard: the same check for every engine."""

from __future__ import annotations

import os
import signal
import threading

from tests.executors.capture_work import BATCH_ROWS, SHARD_ROWS, extract_with
from tests.executors.file_work import wait_until
from tests.store.helpers import files_of


def kill_mid_shard(config, model_path, folder, straight, *, after_rows):
    """The store ends as that of an undisturbed run, and no more was captured again than the worker had in hand."""
    killed = []

    def kill() -> None:
        wait_until((folder / "log" / "held").exists)
        killed.append(int((folder / "log" / "held").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    calls = []
    work, summary = extract_with(
        config, model_path, folder, hold_at_rows=after_rows, progress=lambda done, total: calls.append((done, total))
    )
    killer.join()
    assert killed != [os.getpid()]
    assert files_of(folder / "store") == straight
    total = summary["rows"]
    assert calls[-1] == (total, total)
    again = work.rows_captured() - total
    assert 0 < again < 2 * SHARD_ROWS + BATCH_ROWS  # the shard that fills, and one that may be on its way to disk
