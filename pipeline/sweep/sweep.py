"""Runs a sweep: its folder, its points through the executor, and what came of them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sae.errors import ConfigError, FormatError, InterruptedRunError, SAEError

from ..commands import COMMANDS
from ..config import Config, ExecutorConfig
from ..console import PlainConsole
from ..executors import open_executor
from ..run import LOCK, print_three, read_manifest, timed_folder, write_json
from .points import Override, Point, described, described_spaces, grid, refuse_own, spaces, split
from .search import Search, import_optuna, run_search
from .work import Runs

SWEEP = "sweep.json"
ROOT = Path("runs/sweeps")
OWN = {"resume", "run_dir", "sweep", "executor"}  # what a sweep takes itself
THREADS = {"train": "trainer.n_threads", "evaluate": "model.n_threads"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep's folder and what its runs share."""

    name: str
    folder: Path
    command: tuple[str, ...]
    shared: tuple[str, ...]
    executor: ExecutorConfig
    console: Console

    def folder_of(self, point: Point) -> Path:
        """The run folder of a point: beside the other runs of its command, so that later stages find it."""
        return (Path("runs") / self.name / f"{self.folder.name}-{point.name}").resolve()

    def run(self, points: Sequence[Point]) -> Runs:
        """Have every point run that is not finished."""
        work = Runs(
            sweep=self.folder, command=self.command, points=tuple(points),
            folders=tuple(self.folder_of(point) for point in points), shared=self.shared,
            working_folder=Path.cwd(), threads_key=THREADS.get(self.name, ""),
        )  # fmt: skip
        for i in range(len(points)):
            if work.finished(i):
                self.console.print(f"{points[i].name}: already finished, kept", highlight=False)
            work.failure(i).unlink(missing_ok=True)  # a resumed sweep tries failed points again
        open_executor(self.executor, self.folder).run(work)
        return work


def run_sweep(
    name: str, config: Config, command: Sequence[str], overrides: Sequence[str], flags: Sequence[str]
) -> None:
    """Make the runs of `ggscope NAME -m ...`. `command`: the words and texts after `ggscope`; `flags`: Hydra's, with values.

    Raises:
        ConfigError: settings that make no sweep, a resumed sweep with other points or one that is running.
        FormatError: a resumed sweep whose note of its points is damaged.
        SAEError: with the exit code of the first point that failed, after all others were run.
        InterruptedRunError: Ctrl-C, or a run that was interrupted.
    """
    fixed, swept = split(overrides)
    own = "executor" in COMMANDS[name].groups  # the command's own shards are what the executor is for
    ours = OWN - ({"executor"} if own else set())
    refuse_own(swept, ours)
    shared = [text for text in fixed if text.split("=")[0].split(".")[0] not in ours]
    if not swept:
        raise ConfigError("-m: expected a setting with several values, e.g. sae.k=16,32; without one leave out -m")
    wanted, points = planned(config, fixed, swept)
    folder = sweep_folder(config, name)
    sweep = Sweep(
        name=name, folder=folder, command=(*command, *flags), shared=tuple(shared),
        executor=ExecutorConfig() if own else config.executor, console=PlainConsole(stderr=True),
    )  # fmt: skip
    with locked(folder):
        same_points(folder / SWEEP, {"command": list(command), "shared": shared, **wanted})
        try:
            if config.sweep.trials:
                searched(sweep, Search(config.sweep, spaces(swept), folder), config)
            else:
                finish(sweep, sweep.run(points))
        except KeyboardInterrupt:
            raise InterruptedRunError(f"interrupted; continue with -m, the same settings and resume={folder}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in a sweep's folder: ConfigError for a second one."""
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
        except OSError:
            raise ConfigError(f"another process runs the sweep in {folder}; wait for it or stop it first") from None
        yield


def planned(config: Config, fixed: Sequence[str], swept: Sequence[Override]) -> tuple[dict[str, Any], list[Point]]:
    """What makes the sweep another one when it changes, and the points of a grid. ConfigError before a folder is made."""
    if not config.sweep.trials:
        if "sweep=optuna" in fixed:
            raise ConfigError(
                "sweep=optuna sweep.trials=0: expected at least one trial; for every combination leave sweep=optuna out"
            )
        points = grid(swept)
        return {"points": described(points)}, points
    spaces(swept)
    import_optuna()
    own = {"spaces": described_spaces(swept), "metric": config.sweep.metric, "maximize": config.sweep.maximize}
    return own, []


def sweep_folder(config: Config, name: str) -> Path:
    """The folder of a new sweep, which is made, or the one that `resume` names."""
    if config.resume == "latest":
        found = sorted(ROOT.glob(f"*-{name}/{SWEEP}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(f"resume=latest: no sweep of `ggscope {name}` under {ROOT.resolve()}")
        return found[-1].parent.resolve()
    if config.resume:
        folder = Path(config.resume).resolve()
        if not (folder / SWEEP).is_file():
            raise ConfigError(f"resume={config.resume}: {folder} holds no sweep (no {SWEEP})")
        return folder
    if config.run_dir:
        folder = Path(config.run_dir).resolve()
        if (folder / SWEEP).exists():
            raise ConfigError(f"run_dir={folder} already holds a sweep; continue it with resume={folder}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return timed_folder(ROOT, "sweep", f"-{name}")


def same_points(path: Path, wanted: dict[str, Any]) -> None:
    """Note what the sweep is of, in its folder; ConfigError where the folder's is another, FormatError for a damaged note."""
    there = noted(path)
    if there is not None:
        changed = [
            f"{key}: {there.get(key)} there, {wanted[key]} now" for key in wanted if there.get(key) != wanted[key]
        ]
        if changed:
            raise ConfigError(f"{path.parent} is another sweep ({'; '.join(changed)}); use its settings, or start anew")
    write_json(path, wanted)


def noted(path: Path) -> dict[str, Any] | None:
    """What a sweep's folder says it is of; None for a new one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(
            f"{path} is damaged: expected a JSON object; delete it and start the same sweep with run_dir={path.parent}, "
            "which keeps the finished points"
        )
    return found


def searched(sweep: Sweep, search: Search, config: Config) -> None:
    """Run the points that a search asks for, as many at a time as the executor has workers."""
    codes: dict[str, int] = {}

    def run(points: list[Point]) -> dict[str, float | None]:
        work = sweep.run(points)
        codes.update({point.name: code for i, point in enumerate(points) if (code := work.code(i)) is not None})
        return {point.name: metric(sweep.folder_of(point), config.sweep.metric) for point in points}

    run_search(search, run, max(1, sweep.executor.workers))
    best = search.best()
    write_json(sweep.folder / "best.json", best)
    finished, asked = search.count()
    line = f"; none has a finite {config.sweep.metric}" if finished else ""
    if best is not None:
        at = ", ".join(f"{key}={value}" for key, value in best["overrides"].items())
        line = f"; best {config.sweep.metric} {best['value']:.4f} at {at} ({best['point']})"
    report(sweep, codes, finished, asked, line)


def metric(run: Path, key: str) -> float | None:
    """A number of a run's manifest; None for a run that did not finish. ConfigError where it has no such number."""
    manifest = read_manifest(run) or {}
    if manifest.get("status") != "finished":
        return None
    numbers = {name: value for name, value in manifest.get("metrics", {}).items() if type(value) in (int, float)}
    if key not in numbers:
        raise ConfigError(
            f"sweep.metric={key}: {run} finished without such a number; "
            f"start a new search with one of its own: {', '.join(numbers) or 'it has none'}"
        )
    return float(numbers[key])


def finish(sweep: Sweep, work: Runs) -> None:
    codes = {point.name: code for i, point in enumerate(work.points) if (code := work.code(i)) is not None}
    report(sweep, codes, len(work.points) - len(codes), len(work.points))


def report(sweep: Sweep, codes: dict[str, int], finished: int, count: int, best: str = "") -> None:
    """The three lines of a sweep; raises with the first failure's exit code where some points failed."""
    print_three(
        sweep.name,
        f"{count} points of `ggscope {' '.join(sweep.command)}`",
        f"{finished} of {count} points finished{best}",
        f"{sweep.folder}, and a run folder each in {Path('runs') / sweep.name}",
    )
    if codes:
        named = ", ".join(f"{name} (exit code {code})" for name, code in codes.items())
        error = SAEError(
            f"{len(codes)} of {count} points failed: {named}; their messages are above, the others are done; "
            f"-m with the same settings and resume={sweep.folder} tries them again"
        )
        error.exit_code = next(iter(codes.values()))
        raise error
