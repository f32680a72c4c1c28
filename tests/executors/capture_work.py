"""The real thing: llama.cpp's activations of a tiny model into a store, as work for an executor.

Stands in for `pipeline.extract.CaptureWork`; `make_work` and the class are all that changes when that is used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CorpusConfig, ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.plan import Plan
from pipeline.corpus.readers import read_documents
from pipeline.corpus.windows import WindowTable, windows
from pipeline.executors import Placement
from pipeline.extract import Capturer, _capture_shards, _meta, plan_extraction
from pipeline.llama.model import Model
from pipeline.store.commits import committed_shards
from pipeline.store.schema import read_meta
from pipeline.store.writer import StoreWriter

POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
SHARD_ROWS = 256
BATCH_ROWS = 64
ROWS = 1500
SETTINGS = ExtractConfig(batch_tokens=BATCH_ROWS, ubatch_tokens=64, calibration_tokens=500)


class UnlockedWriter(StoreWriter):
    """A writer of shards beside others: the parent made the store."""

    def __init__(self, path: Path) -> None:
        self.path, self.meta = path, read_meta(path)

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class TinyCapture:
    """`hold_at_rows`: the first worker to come so far waits there, `held` in `log` names its process."""

    model: Path
    store: Path
    log: Path
    hold_at_rows: int = 0

    def missing(self) -> list[int]:
        there = set(committed_shards(self.store))
        return [shard for shard in range(read_meta(self.store).n_shards) if shard not in there]

    def rows(self, shards: Sequence[int]) -> int:
        ranges = [read_meta(self.store).shard_range(shard) for shard in shards]
        return sum(stop - start for start, stop in ranges)

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        seen = captured = 0

        def progress(rows: int, _total: int) -> None:
            nonlocal seen, captured
            fresh, seen = rows - seen, rows
            captured += fresh
            if fresh:
                with (self.log / "rows").open("a") as file:
                    file.write(f"{os.getpid()} {fresh}\n")
                done(fresh)
            if self.hold_at_rows and captured >= self.hold_at_rows:
                self.hold()

        with Model(self.model) as model:
            table, plan = table_and_plan(model)
            with Capturer(model, table, plan, SETTINGS, ModelConfig(n_threads=place.n_threads or 1)) as capturer:
                missing = [shard for shard in shards if shard in set(self.missing())]
                seen = plan.rows - self.rows(missing)
                _capture_shards(capturer, UnlockedWriter(self.store), missing, progress)

    def hold(self) -> None:
        try:
            (self.log / "claimed").touch(exist_ok=False)
        except FileExistsError:
            return
        (self.log / "held.tmp").write_text(str(os.getpid()))
        (self.log / "held.tmp").rename(self.log / "held")
        time.sleep(600)

    def rows_captured(self) -> int:
        """By all workers together, those that died included."""
        return sum(int(line.split()[1]) for line in (self.log / "rows").read_text().splitlines())


def table_and_plan(model: Model) -> tuple[WindowTable, Plan]:
    table = windows(model, read_documents(CorpusConfig(max_documents=10)), 32, ROWS)
    return table, plan_extraction(model, table, POINTS, extract=SETTINGS, store=StoreConfig(shard_rows=SHARD_ROWS))


def make_work(model_path: Path, folder: Path, **options) -> TinyCapture:
    """The work for a new store in `folder`, made and calibrated, without a shard."""
    (folder / "log").mkdir(parents=True)
    with Model(model_path) as model:
        table, plan = table_and_plan(model)
        with Capturer(model, table, plan, SETTINGS, ModelConfig(n_threads=1)) as capturer:
            meta = _meta(capturer, folder / "store")
        StoreWriter(folder / "store", meta, table.documents).close()
    return TinyCapture(model=model_path, store=folder / "store", log=folder / "log", **options)
