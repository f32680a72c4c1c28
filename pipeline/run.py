"""Run folders and their manifests: what ran, on what, with which result. Lineage from a readout to the corpus."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sae.errors import ConfigError, InterruptedRunError, SAEError

from .commands import COMMANDS
from .config import Config
from .console import PlainConsole
from .terminal import shown

MANIFEST = "manifest.json"
LOCK = ".lock"
SPOOL_NAME = "corpus"  # the tokenised documents, which a new run would make again
LINE_SECONDS = 30.0  # between two lines of progress in a log
NAMED_BY = {
    "extract": "a store with store.path=PATH",
    "train": "an SAE with sae.path=PATH",
    "convert": "a file: ggscope convert verify FILE",
}
PACKAGES = ("ggscope", "llama-cpp-python", "torch", "numpy", "zarr", "hydra-core", "gguf", "safetensors")


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the whole new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk names no file
        raise


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_three(command: str, given: str, numbers: str, output: str, *, stderr: bool = False) -> None:
    """The three lines of `RunContext.three_lines`."""
    out = PlainConsole(highlight=False, soft_wrap=True, stderr=stderr)
    for name, text in (("input", given), ("result", numbers), ("output", output)):
        out.print(f"{command:<9}{name:<7} {text}")


class ProgressCall(Protocol):
    """The type of what `RunContext.progress` yields."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


class ProgressLines:
    """Progress where nothing can be redrawn, a log file or a pipe: a line every `LINE_SECONDS`."""

    def __init__(self, console: Console, what: str, unit: str) -> None:
        self.console, self.what, self.unit = console, what, unit
        self.restart()
        self.last = self.started

    def restart(self) -> None:
        """Something else is counted from here on."""
        self.started = time.monotonic()
        self.first: int | None = None  # what was done when it began: more than 0 where a run is resumed

    def __call__(self, done: int, total: float | None, note: str) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < LINE_SECONDS or done == total:  # what it ends with is said elsewhere
            return
        self.last = now
        parts = [f"{self.what}: {done:,}{f' of {total:,.0f}' if total else ''} {self.unit}"]
        if total and done > self.first:
            left = (now - self.started) * max(0.0, total - done) / (done - self.first)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        self.console.print(", ".join([*parts, note] if note else parts), style="dim", highlight=False, soft_wrap=True)


@dataclass(kw_only=True)
class RunContext:
    """One run of one command: its folder, its manifest, its console."""

    command: str
    verb: str = ""
    folder: Path
    config: Config
    resumed: bool = False
    rank: int = 0  # under torchrun; only rank 0 writes and speaks
    ends_as: str = "finished"  # the status of a run that did what it was to do; "planned" where that was to plan
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: PlainConsole(stderr=True))
    started: float = field(default_factory=time.time)
    _status: str = ""  # as it was last written
    found: frozenset[str] = frozenset()  # files that were in the folder before this run
    refused: bool = False  # a new run that ended by a fault in its settings or inputs before it did anything

    def __post_init__(self) -> None:
        self.console.quiet |= self.rank > 0

    def add_input(self, name: str, path: Path | str, sha256: str = "", **facts: Any) -> None:
        self.inputs[name] = {"path": str(path), "sha256": sha256, **facts}
        if self._status:  # at once: a killed run goes on with the same
            self.write(self._status)

    def write(self, status: str, error: str = "") -> None:
        """Rewrite the manifest; `status` is running, finished, planned, failed or interrupted."""
        self._status, ended = status, time.time()
        manifest = {
            "manifest_version": 1,
            "command": self.command,
            "status": status,
            "error": error,
            "refused": self.refused,
            "started": datetime.fromtimestamp(self.started).isoformat(timespec="seconds"),
            "ended": None if status == "running" else datetime.fromtimestamp(ended).isoformat(timespec="seconds"),
            "seconds": round(ended - self.started, 3),
            "config": asdict(self.config),
            "versions": versions(),
            "argv": sys.argv[1:],
            "inputs": self.inputs,
            "outputs": {name: movable(path, self.folder) for name, path in self.outputs.items()},
            "metrics": self.metrics,
        }
        write_json(self.folder / MANIFEST, manifest)

    def three_lines(self, given: str, numbers: str, output: str, *, stderr: bool = False) -> None:
        """What every command ends with: its input, its numbers, where its output lies.

        On stdout, or on stderr where stdout carries JSON. The work is done by then, and the manifest says so first.
        """
        if self._status:
            self.write(self.ends_as)
        print_three(self.command, given, numbers, output, stderr=stderr)

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "tokens") -> Iterator[ProgressCall]:
        """A progress bar with an ETA, in a file a line now and then; yields a callable `(done, total=None, **numbers)`."""
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=not self.console.is_terminal) as bar:
            task = bar.add_task(shown(what), total=total or None, note="")
            lines = None if self.console.is_terminal else ProgressLines(self.console, what, unit)

            def call(done: int, total: int | None = None, note: str = "") -> None:
                if done < bar.tasks[task].completed:  # the next part, whose speed is another
                    bar.reset(task, total=total, completed=done)
                    if lines:
                        lines.restart()
                bar.update(task, completed=done, total=total, note=note)
                if lines:
                    lines(done, bar.tasks[task].total, note)

            yield call


def movable(path: str, folder: Path) -> str:
    """The path from the run folder on where both lie in one project (the working directory), so that it can be moved."""
    if "://" in path:
        return path
    place, project = Path(path).absolute(), Path.cwd()
    together = place.is_relative_to(project) and folder.is_relative_to(project)
    return os.path.relpath(place, folder) if together or place.is_relative_to(folder) else str(place)


def new_folder(command: str, config: Config, root: Path = Path("runs")) -> Path:
    """Make `runs/<command>/<time>/`, or `run_dir` where one is named."""
    if config.run_dir:
        folder = Path(config.run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            what = "a link to nothing" if folder.is_symlink() else "a file"
            raise ConfigError(f"run_dir={folder}: expected a folder, got {what}; name another") from None
        if (folder / MANIFEST).exists():
            raise ConfigError(
                f"run_dir={folder} already holds a run; continue it with resume={folder} or name another folder"
            )
        return folder.resolve()
    return timed_folder(root / command, "run")


def timed_folder(root: Path, what: str, end: str = "") -> Path:
    """Make a folder `TIME` + `end` in `root`, `TIME-2` and so on where others of this second are there already."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = root / f"{stamp}{f'-{attempt}' if attempt > 1 else ''}{end}"
        try:
            folder.mkdir(parents=True)
            return folder.resolve()
        except FileExistsError:
            continue
    raise ConfigError(f"expected a free {what} folder name like {stamp}{end}, found 999 taken; set run_dir=FOLDER")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest with the places of its outputs as they are now; None where there is none that can be read."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict):
        return None
    outputs, here = value.get("outputs"), folder.resolve()
    places = {n: p for n, p in outputs.items() if isinstance(p, str)} if isinstance(outputs, dict) else {}
    return value | {
        "outputs": {n: p if "://" in p else os.path.normpath(here / p) for n, p in places.items()}  # / keeps absolute
    }


def nothing_done(folder: Path, *, but: str = MANIFEST, found: frozenset[str] = frozenset()) -> bool:
    """Whether a run folder holds no more than what every run starts with, `but`, `found`, and files without content."""
    made = {path.name for path in folder.iterdir() if path.is_dir() or path.lstat().st_size}
    return made <= {MANIFEST, but, *found}


def runs_of(command: str, root: Path = Path("runs")) -> list[tuple[Path, dict[str, Any]]]:
    """Every run of `command`, newest first, those inside a whole `run` included; all have `metrics`."""
    patterns = (f"{command}/*/{MANIFEST}", f"run/*/{command}/{MANIFEST}")
    found = []
    for pattern in patterns:
        for path in root.glob(pattern):
            manifest = read_manifest(path.parent)
            if manifest is not None and manifest.get("command") == command:
                metrics = manifest.get("metrics")
                found.append((path.parent, manifest | {"metrics": metrics if isinstance(metrics, dict) else {}}))
    return sorted(found, key=lambda item: (str(item[1].get("started", "")), item[0].name), reverse=True)


def newest_finished(command: str, output: str = "") -> tuple[Path, dict[str, Any]]:
    """The newest finished run of `command` under the working directory, of those that made `output` where one is named."""
    for folder, manifest in runs_of(command):
        if manifest.get("status") == "finished" and (not output or output in manifest.get("outputs", {})):
            return folder, manifest
    raise ConfigError(
        f"expected a finished `ggscope {command}` run under {Path('runs').resolve()}, found none; "
        f"run `ggscope {command}` first, or name {NAMED_BY.get(command, 'the input by path')}"
    )


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = item
    return found


def torchrun_rank(name: str, config: Config) -> int:
    """This process' number among those of torchrun, 0 without it. ConfigError where they cannot share a run folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    if name != "train" or config.resume == "latest" or not (config.resume or config.run_dir):
        raise ConfigError(
            "under torchrun: expected `train` with run_dir=FOLDER or resume=FOLDER, the same for all ranks"
        )
    if config.trainer.lr_search or config.trainer.source == "stream":
        raise ConfigError("under torchrun: expected a store and one learning rate, got a stream or a search")
    return int(os.environ.get("RANK", "0"))


@contextmanager
def running(context: RunContext) -> Iterator[RunContext]:
    """Keep the manifest true whatever happens inside; one process at a time in a run folder."""
    context.found = frozenset(path.name for path in context.folder.iterdir() if not path.is_dir())
    with open(context.folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
        except OSError:
            raise ConfigError(f"another process works in {context.folder}; wait for it or stop it first") from None
        with _manifest_kept(context):
            yield context


def take_back(context: RunContext) -> None:
    """Leave nothing of a run that was refused before it did anything: the next try finds no folder in its way."""
    for path in context.folder.iterdir():
        if path.name not in context.found:
            path.unlink()
    made = [] if context.config.run_dir else [context.folder, *context.folder.parents[:2]]  # runs/COMMAND/TIME
    for folder in made:
        if any(folder.iterdir()):
            break
        folder.rmdir()


@contextmanager
def _manifest_kept(context: RunContext) -> Iterator[None]:
    context.write("running")
    try:
        yield
    except (KeyboardInterrupt, InterruptedRunError) as error:
        context.write("interrupted", str(error))
        if isinstance(error, InterruptedRunError):
            raise
        again = "continue" if COMMANDS[context.command].continues else "start again"
        raise InterruptedRunError(
            f"interrupted; {again} with `ggscope {context.command} resume={context.folder}`"
        ) from error
    except BaseException as error:
        faulty = isinstance(error, SAEError) and error.exit_code == 2 and not context.resumed
        context.refused = faulty and nothing_done(context.folder, but=SPOOL_NAME, found=context.found)
        if faulty and nothing_done(context.folder, found=context.found):
            take_back(context)
        else:
            with suppress(OSError):  # of a full disk; what went wrong before says more
                context.write("failed", f"{type(error).__name__}: {error}")
        raise
    context.write(context.ends_as)
