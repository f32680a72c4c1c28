"""A search by Optuna: it proposes settings, runs are made of them, their metric is told back. Optuna is imported here.

The study lies in the sweep's folder, so a search that was stopped goes on; proposals that were not told are run again.
A point that failed is not told: it is asked for again at the next start, once.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, FormatError

from ..config import SweepConfig
from .points import Point, Space, name_of

STUDY = "optuna.db"
NAME = "sweep"


def import_optuna() -> Any:
    """The package; ConfigError where it is missing."""
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "sweep=optuna (sweep.trials above 0) needs the package optuna: pip install 'ggscope[optuna]'"
        ) from None
    return optuna


def check_study(path: Path) -> None:
    """FormatError for a file that is no whole database."""
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise FormatError(
            f"{path} is damaged ({found}); delete it, and resume asks for the same points again and keeps the finished ones"
        )


class Search:
    """`ask` gives points, `tell` their values; TPE (Bergstra et al. 2011) from the second ten trials on.

    Raises FormatError where the study of an earlier start is damaged.
    """

    def __init__(self, config: SweepConfig, spaces: Sequence[Space], folder: Path) -> None:
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.config = optuna, config
        self._failed: set[int] = set()  # in this start
        self._distributions = {space.key: distribution(optuna, space) for space in spaces}
        check_study(folder / STUDY)
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY}", study_name=NAME, load_if_exists=True,
            direction="maximize" if config.maximize else "minimize",
        )  # fmt: skip

    def ask(self, most: int) -> list[Point]:
        """Up to `most` points: first those that were asked for and never told, then new ones; none when all were run."""
        waiting = [trial for trial in self._trials() if not told(trial) and trial.number not in self._failed]
        points = [point_of(trial.number, trial.params) for trial in waiting[:most]]
        while len(points) < most and len(self._trials()) < self.config.trials:
            # a sampler of its own seed for each trial: the same proposals whether or not the search was stopped between
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self._optuna.samplers.TPESampler(seed=self.config.seed + number)
            trial = self._study.ask(self._distributions)
            points.append(point_of(trial.number, trial.params))
        return points

    def tell(self, point: Point, value: float | None) -> None:
        """The metric of a finished point, which may be no finite number; None for a point that failed."""
        number = int(point.name.partition("-")[0].removeprefix("t"))
        if value is None:
            self._failed.add(number)
        elif math.isfinite(value):
            self._study.tell(number, value)
        else:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def count(self) -> tuple[int, int]:
        """How many points are finished, and how many were asked for, in all starts of the search."""
        trials = self._trials()
        return sum(told(trial) for trial in trials), len(trials)

    def _trials(self) -> list[Any]:
        """The trials that are points. One that was stopped while it was made lacks settings: it is none."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if self._distributions.keys() <= trial.params.keys()]

    def best(self) -> dict[str, Any] | None:
        """`{"point": name, "value": metric, "overrides": {...}}`, or None where nothing was told."""
        done = [trial for trial in self._study.get_trials(deepcopy=False) if trial.value is not None]
        if not done:
            return None
        best = (max if self.config.maximize else min)(done, key=lambda trial: trial.value or 0.0)
        return {"point": point_of(best.number, best.params).name, "value": best.value, "overrides": dict(best.params)}


def told(trial: Any) -> bool:
    return trial.state.is_finished()


def distribution(optuna: Any, space: Space) -> Any:
    if space.choices:
        return optuna.distributions.CategoricalDistribution(space.choices)
    kind = optuna.distributions.IntDistribution if space.whole else optuna.distributions.FloatDistribution
    return kind(space.low, space.high, log=space.log)


def point_of(number: int, parameters: dict[str, Any]) -> Point:
    overrides = tuple(f"{key}={value}" for key, value in parameters.items())
    return Point(name=f"t{number:03d}-{name_of(overrides)}", overrides=overrides)


def run_search(search: Search, run: Callable[[list[Point]], dict[str, float | None]], together: int) -> None:
    """Ask for `together` points at a time, have `run` make them and give each's metric, tell them, until all are told."""
    while points := search.ask(together):
        for point, value in zip(points, run(points).values(), strict=True):
            search.tell(point, value)
