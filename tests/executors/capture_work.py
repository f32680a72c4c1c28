"""The real thing: `extract` of a tiny model's activations, with an executor that has the shards captured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.capture.work import CaptureWork
from pipeline.config import CorpusConfig, ExecutorConfig, ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.readers import read_documents
from pipeline.corpus.spool import spool_table
from pipeline.executors import Placement, open_executor
from pipeline.extract import extract, plan_extraction
from pipeline.llama.model import Model

POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
SHARD_ROWS = 256
BATCH_ROWS = 64
ROWS = 1500
SETTINGS = ExtractConfig(batch_tokens=BATCH_ROWS, ubatch_tokens=64, calibration_tokens=500)
MODEL = ModelConfig(n_threads=1)
LAYOUT = StoreConfig(shard_rows=SHARD_ROWS)


@dataclass(frozen=True, kw_only=True)
class WatchedCapture:
    """CaptureWork that logs the rows of each batch; the first worker to have captured `hold_at_rows` waits there."""

    work: CaptureWork
    log: Path
    hold_at_rows: int = 0

    def missing(self) -> list[int]:
        return self.work.missing()

    def rows(self, shards: Sequence[int]) -> int:
        return self.work.rows(shards)

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        captured = 0

        def watched(rows: int) -> None:
            nonlocal captured
            captured += rows
            with (self.log / "rows").open("a") as file:
                file.write(f"{os.getpid()} {rows}\n")
            done(rows)
            if self.hold_at_rows and captured >= self.hold_at_rows:
                self.hold()

        self.work.capture(shards, place=place, done=watched)

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


def extract_with(config: ExecutorConfig | None, model_path: Path, folder: Path, *, hold_at_rows=0, progress=None):
    """`extract` into `folder/store`, in this process where `config` is None; returns the work and the summary."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    with Model(model_path) as model:
        documents = read_documents(CorpusConfig(max_documents=10))
        table = spool_table(model, documents, 32, ROWS, folder=folder / "corpus")
        plan = plan_extraction(model, table, POINTS, extract=SETTINGS, store=LAYOUT)
        work = CaptureWork(
            model_path=str(model_path), spool=str(folder / "corpus"), store=str(folder / "store"), model=MODEL,
            extract=SETTINGS, layout=LAYOUT, hooks=tuple(plan.hooks.items()),
        )  # fmt: skip
        watched = WatchedCapture(work=work, log=folder / "log", hold_at_rows=hold_at_rows)
        summary = extract(
            model, table, plan, config=SETTINGS, model_config=MODEL, store_path=folder / "store", progress=progress,
            elsewhere=(open_executor(config, folder), watched) if config else None,
        )  # fmt: skip
    return watched, summary
