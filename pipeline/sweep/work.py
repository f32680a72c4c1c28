"""The runs of a sweep as work for an executor: a point is done when its manifest says so, or when it failed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.errors import InterruptedRunError

from ..console import PlainConsole
from ..executors import Placement
from ..executors.processes import ends_with_parent
from ..run import LOCK, read_manifest, write_json
from .points import Point

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """`command` is the command line without settings; a failed point leaves `failed/NAME.json` in the sweep's folder."""

    sweep: Path
    command: tuple[str, ...]
    points: tuple[Point, ...]
    folders: tuple[Path, ...]
    shared: tuple[str, ...]  # settings of all points
    working_folder: Path  # where relative paths of the settings begin, on whichever machine
    threads_key: str = ""  # the setting that takes a worker's share of the cores

    def missing(self) -> list[int]:
        return [i for i in range(len(self.points)) if not self.done(i)]

    def rows(self, shards: Sequence[int]) -> int:
        return len(shards)

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        for i in shards:
            if not self.done(i):
                self.run_point(i, place)
            done(1)

    def done(self, i: int) -> bool:
        return self.finished(i) or self.failure(i).exists()

    def finished(self, i: int) -> bool:
        manifest = read_manifest(self.folders[i])
        return manifest is not None and manifest.get("status") == "finished"

    def code(self, i: int) -> int | None:
        """The exit code of a point that failed in this start of the sweep; None for one that is finished all the same."""
        if self.finished(i):
            return None
        try:
            return json.loads(self.failure(i).read_text(encoding="utf-8"))["code"]
        except FileNotFoundError:
            return None

    def failure(self, i: int) -> Path:
        return self.sweep / "failed" / f"{self.points[i].name}.json"

    def run_point(self, i: int, place: Placement) -> None:
        """Run it in a process of its own, going on where an earlier one stopped.

        Raises:
            InterruptedRunError: it was interrupted, which ends the sweep.
        """
        folder = self.folders[i]
        wait_for_last(folder)
        where = "run_dir" if read_manifest(folder) is None else "resume"
        threads = [f"{self.threads_key}={place.n_threads}"] if self.threads_key and place.n_threads else []
        settings = [*threads, *self.shared, *self.points[i].overrides, f"{where}={folder}"]
        command = [sys.executable, "-m", "pipeline.cli", *self.command, *settings]
        process = subprocess.Popen(
            command, cwd=self.working_folder, stdin=subprocess.DEVNULL, preexec_fn=ends_with_parent()
        )  # fmt: skip
        code = waited(process)
        if code == INTERRUPTED:
            raise InterruptedRunError(f"interrupted during {self.points[i].name}; continue with resume={self.sweep}")
        if code:
            self.failure(i).parent.mkdir(exist_ok=True)
            write_json(self.failure(i), {"code": code if code > 0 else 1, "overrides": list(self.points[i].overrides)})


def wait_for_last(folder: Path) -> None:
    """Wait until no process works in a run folder: that of a sweep that was killed still saves its state."""
    if not (folder / LOCK).exists():
        return
    with open(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            line = f"waiting for the process that still works in {folder}"
            PlainConsole(stderr=True).print(line, highlight=False, soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_SH)


def waited(process: subprocess.Popen[bytes]) -> int:
    """The exit code; an interrupt of ours is passed on and waited for, so that the run can save its state."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
