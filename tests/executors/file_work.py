"""Work without a model: a shard is a file that is committed by renaming it. Everything it does is in a log."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.executors import Placement
from sae.errors import LlamaError

BATCHES = 4  # of a shard
ROWS = 10  # of a batch


@dataclass(frozen=True, kw_only=True)
class FileWork:
    """`dies`: shards whose worker dies by SIGKILL, this often; `fails`: a shard that raises; `holds`: one that waits, once.
    `warns`: what every shard has logged as a warning.
    """

    folder: Path
    n_shards: int
    dies: dict[int, int] | None = None
    fails: int = -1
    holds: int = -1
    warns: str = ""
    commits: bool = True
    batch_seconds: float = 0.0

    def missing(self) -> list[int]:
        return [shard for shard in range(self.n_shards) if not self.file(shard).exists()]

    def rows(self, shards: Sequence[int]) -> int:
        return len(shards) * BATCHES * ROWS

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        self.log(f"task {os.getpid()} {place.worker} {','.join(map(str, shards))}")
        self.log(f"place {place.worker} {place.n_threads} {place.gpu} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        for shard in shards:
            if not self.file(shard).exists():
                self.log(f"shard {os.getpid()} {place.worker} {shard}")
                self.capture_shard(shard, done)

    def capture_shard(self, shard: int, done: Callable[[int], None]) -> None:
        partial = self.folder / f"{shard}.{os.getpid()}.partial"
        with partial.open("w") as file:
            for batch in range(BATCHES):
                if batch == BATCHES // 2:
                    self.accident(shard)
                time.sleep(self.batch_seconds)
                file.write(f"shard {shard}, batch {batch}\n")
                done(ROWS)
        if self.commits:
            partial.replace(self.file(shard))

    def accident(self, shard: int) -> None:
        deaths = len(list(self.folder.glob(f"death.{shard}.*")))
        if deaths < (self.dies or {}).get(shard, 0):
            (self.folder / f"death.{shard}.{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.warns:
            logging.getLogger("pipeline.somewhere").warning(self.warns)
        if shard == self.fails:
            raise LlamaError(f"shard {shard} cannot be captured")
        if shard == self.holds and not self.logged("held"):
            self.log(f"held {os.getpid()}")
            time.sleep(600)

    def file(self, shard: int) -> Path:
        return self.folder / f"{shard}.txt"

    def log(self, line: str) -> None:
        with (self.folder / "log").open("a") as file:  # one short write: whole lines, whoever else writes
            file.write(line + "\n")

    def logged(self, kind: str) -> list[list[str]]:
        """The words of every log line of a kind, the kind left out."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1:] for line in lines if line.split()[0] == kind]

    def starts_of(self, shard: int) -> int:
        return sum(words[2] == str(shard) for words in self.logged("shard"))


def alive(pid: int) -> bool:
    """Whether the process runs: not gone, not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
