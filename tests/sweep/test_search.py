"""The search by Optuna, where it is installed."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_module

from pipeline.cli import register_schema
from pipeline.commands import COMMANDS
from pipeline.config import SweepConfig
from pipeline.sweep.points import Space
from pipeline.sweep.search import Search, run_search
from sae.errors import ConfigError
from tests.cli.conftest import ggscope
from tests.training.conftest import TRAIN

from .test_sweep import place  # noqa: F401

SPACES = [Space(key="x", low=-4.0, high=4.0), Space(key="c", choices=("near", "far"))]


def value(point):
    x, c = (override.partition("=")[2] for override in point.overrides)
    return (float(x) - 1) ** 2 + (c == "far")


def test_a_missing_optuna_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'ggscope\[optuna\]'"):
        Search(SweepConfig(trials=3), SPACES, tmp_path)


def trials(name, *words):
    register_schema()
    with initialize_config_module("conf", version_base="1.3"):
        return compose(name, list(words)).sweep.trials


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.keeps_run and command.groups])
def test_every_command_with_runs_has_both_kinds_of_sweep(name):
    assert (trials(name), trials(name, "sweep=optuna")) == (0, 20)


def test_the_number_of_points_given_wins_over_the_groups():
    assert trials("train", "sweep=optuna", "sweep.trials=5") == trials("train", "sweep.trials=5") == 5


@pytest.mark.filterwarnings("ignore")
def test_a_search_comes_close_to_the_minimum_and_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("optuna")
    tried = {}
    for name, stops in (("whole", ()), ("stopped", (5, 17))):
        folder = tmp_path / name
        folder.mkdir()
        tried[name] = []
        for stop in (*stops, None):
            search = Search(SweepConfig(trials=30, seed=1), SPACES, folder)

            def run(points, name=name, stop=stop):
                if stop is not None and len(tried[name]) >= stop:
                    raise KeyboardInterrupt
                tried[name] += points
                return {point.name: value(point) for point in points}

            if stop is None:
                run_search(search, run, 1)
            else:
                with pytest.raises(KeyboardInterrupt):
                    run_search(search, run, 1)
    assert tried["stopped"] == tried["whole"]
    assert len(tried["whole"]) == 30
    best = search.best()
    assert best["value"] == min(map(value, tried["whole"]))
    assert best["value"] < 0.3
    assert best["overrides"]["c"] == "near"


@pytest.mark.filterwarnings("ignore")
def test_a_point_that_failed_is_told_as_failed_and_is_not_the_best(tmp_path):
    pytest.importorskip("optuna")
    search = Search(SweepConfig(trials=4, maximize=True), SPACES, tmp_path)
    values = iter([1.0, None, float("nan"), 0.5])
    run_search(search, lambda points: {point.name: next(values) for point in points}, 2)
    assert search.best()["value"] == 1.0
    assert search.ask(2) == []


@pytest.mark.parametrize("chosen", [["sweep=optuna"], pytest.param([], marks=pytest.mark.long)])
def test_the_command_searches_where_it_is_told_to_or_trials_are_given(chosen, place):  # noqa: F811
    pytest.importorskip("optuna")
    words = ["train", "-m", *TRAIN, "trainer.lr=tag(log,interval(1e-4,1e-2))", "sae.k=3,4", *chosen, "sweep.trials=3"]
    done = ggscope(*words, cwd=place)
    assert "3 of 3 points finished; best fvu" in done.stdout
    (best,) = place.glob("runs/sweeps/*/best.json")
    manifests = [json.loads(path.read_text()) for path in place.glob("runs/train/*/manifest.json")]
    assert json.loads(best.read_text())["value"] == min(manifest["metrics"]["fvu"] for manifest in manifests)
    assert all(1e-4 <= manifest["config"]["trainer"]["lr"] <= 1e-2 for manifest in manifests)
