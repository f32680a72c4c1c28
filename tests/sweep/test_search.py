"""The search by Optuna, where it is installed."""

from __future__ import annotations

import json
import sys

import pytest
from hydra import compose, initialize_config_module

from pipeline.cli import main, register_schema
from pipeline.commands import COMMANDS
from pipeline.config import SweepConfig
from pipeline.sweep.points import Space, described_spaces, split
from pipeline.sweep.search import Search, run_search
from pipeline.sweep.sweep import same_points
from sae.errors import ConfigError, FormatError
from tests.cli.conftest import ggscope, last_line
from tests.training.conftest import TRAIN

from .test_sweep import place  # noqa: F401

SPACES = [Space(key="x", low=-4.0, high=4.0), Space(key="c", choices=("near", "far"))]


def value(point):
    x, c = (override.partition("=")[2] for override in point.overrides)
    return (float(x) - 1) ** 2 + (c == "far")


def test_a_missing_optuna_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
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
def test_a_point_that_failed_is_asked_again_at_the_next_start_only_and_is_not_the_best(tmp_path):
    pytest.importorskip("optuna")
    search = Search(SweepConfig(trials=4, maximize=True), SPACES, tmp_path)
    values, asked = iter([1.0, None, float("nan"), 0.5]), []

    def run(points):
        asked.extend(points)
        return {point.name: next(values) for point in points}

    run_search(search, run, 2)
    assert search.best()["value"] == 1.0
    assert search.ask(2) == []
    assert search.count() == (3, 4)
    again = Search(SweepConfig(trials=4, maximize=True), SPACES, tmp_path)
    assert again.ask(9) == asked[1:2]
    again.tell(asked[1], 2.0)
    assert again.ask(9) == []
    assert again.count() == (4, 4)
    assert again.best()["point"] == asked[1].name


@pytest.mark.filterwarnings("ignore")
def test_a_trial_that_was_stopped_before_it_had_all_settings_is_no_point(tmp_path):
    optuna = pytest.importorskip("optuna")
    search = Search(SweepConfig(trials=2), SPACES, tmp_path)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    study.ask().suggest_float("x", -4.0, 4.0)
    points = search.ask(9)
    assert [len(point.overrides) for point in points] == [2, 2]
    assert search.count() == (0, 2)


def test_a_damaged_study_is_one_line(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "optuna.db").write_bytes(b"junk" * 1000)
    with pytest.raises(FormatError, match=r"optuna\.db is damaged \(file is not a database\); delete it"):
        Search(SweepConfig(trials=2), SPACES, tmp_path)


FAILS = ["train", "-m", "sweep=optuna", "sweep.trials=1", "sae.num_latents=8", "sae.k=900,901"]


@pytest.fixture
def failed(tmp_path, monkeypatch, capfd):
    """The working folder of a search, m2, whose only point was refused."""
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    assert main([*FAILS, "run_dir=m2"]) == 2
    assert "0 of 1 points finished\n" in capfd.readouterr().out
    return tmp_path


def test_a_resumed_search_tries_its_failed_points_again(failed, capfd):
    assert main([*FAILS, "resume=m2"]) == 2
    done = capfd.readouterr()
    assert "0 of 1 points finished\n" in done.out
    refused, last = done.err.strip().splitlines()[-2:]
    assert "expected a finished `ggscope extract` run" in refused
    assert "1 of 1 points failed" in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sae.k=900,902"], "is another sweep (spaces: {'sae.k': '900,901'} there, {'sae.k': '900,902'} now)"),
        (["sae.k=interval(1,9)"], "is another sweep (spaces: {'sae.k': '900,901'} there, {'sae.k': 'interval(1,9)'} now)"),
        (["sae.num_latents=16"], "(shared: ['sae.num_latents=8'] there, ['sae.num_latents=16'] now)"),
        (["sweep.metric=dead"], "(metric: fvu there, dead now)"),
        (["sweep.maximize=true"], "(maximize: False there, True now)"),
    ],
)  # fmt: skip
def test_a_search_is_not_resumed_with_other_settings(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    _, swept = split(FAILS[4:])
    own = {"spaces": described_spaces(swept), "metric": "fvu", "maximize": False}
    (tmp_path / "m2").mkdir()
    same_points(tmp_path / "m2/sweep.json", {"command": ["train"], "shared": ["sae.num_latents=8"], **own})
    keys = [word.partition("=")[0] for word in words]
    kept = [word for word in FAILS if word.partition("=")[0] not in keys]
    assert main([*kept, *words, "resume=m2"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path.name for path in (tmp_path / "m2").iterdir()} == {".lock", "sweep.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.lr=interval(1e-2,1e-4)"], "trainer.lr=interval(1e-2,1e-4): expected interval(low,high) of two numbers, low below high, got 0.01 and 0.0001"),
        (["trainer.lr=interval(0,inf)"], "low below high, got 0.0 and inf"),
        (["trainer.lr=tag(log,interval(0,1e-4))"], "trainer.lr=tag(log,interval(0,1e-4)): expected a low above 0 on a logarithmic scale, got 0.0"),
        (["sae.k=3,4", "sweep.trials=0"], "sweep=optuna sweep.trials=0: expected at least one trial"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_one_line_and_leaves_no_folder(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "sweep=optuna", *words]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_search_without_optuna_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.chdir(tmp_path)
    assert main(FAILS) == 2
    assert "needs the package optuna" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if not command.keeps_run and command.groups]
)
def test_a_command_without_runs_takes_no_sweep(name, capsys):
    verb = COMMANDS[name].verbs[:1]
    assert main([name, *verb, "-m", "sweep=optuna"]) == 2
    assert f"-m: `ggscope {name}` makes no runs to sweep over" in capsys.readouterr().err


def test_a_metric_that_the_runs_do_not_have_ends_the_search_at_its_first_point(place):  # noqa: F811
    pytest.importorskip("optuna")
    words = ["train", "-m", *TRAIN, "sae.k=3,4", "sweep=optuna", "sweep.trials=3", "sweep.metric=fuv"]
    done = ggscope(*words, cwd=place, code=2)
    (run,) = place.glob("runs/train/*")
    assert last_line(done).startswith(f"ggscope train: sweep.metric=fuv: {run} finished without such a number; ")
    numbers = json.loads((run / "manifest.json").read_text())["metrics"]
    listed = last_line(done).rpartition("one of its own: ")[2].split(", ")
    assert "fvu" in listed
    assert set(listed) <= numbers.keys()


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
