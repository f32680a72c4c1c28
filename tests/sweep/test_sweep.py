"""`-m`: points, one run folder each, that fail alone and are not run twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from unittest.mock import Mock

import pytest

from pipeline.cli import main
from pipeline.config import Config
from pipeline.sweep.points import Point, Space, grid, spaces, split
from pipeline.sweep.sweep import locked, sweep_folder
from pipeline.sweep.work import Runs, wait_for_last
from sae.errors import ConfigError
from tests.cli.conftest import ggscope, last_line
from tests.training.conftest import TRAIN


@pytest.fixture
def place(folder, tmp_path):
    """A working folder of its own with the shared store."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return tmp_path


def statuses(place):
    found = {}
    for path in sorted(place.glob("runs/train/*/manifest.json")):
        manifest = json.loads(path.read_text())
        found[manifest["config"]["sae"]["k"]] = (manifest["status"], manifest["started"])
    return found


@pytest.mark.parametrize(
    "executor",
    ["local", "pool", pytest.param("ray", marks=pytest.mark.long), pytest.param("submitit", marks=pytest.mark.long)],
)
def test_a_point_that_fails_stops_no_other_and_a_resumed_sweep_runs_only_that(executor, place):
    words = [
        "train",
        "-m",
        *TRAIN,
        "sae.k=3,999,5",
        f"executor={executor}",
        "executor.workers=2",
        "executor.cluster=local",
    ]
    done = ggscope(*words, cwd=place, code=2)
    assert "1 of 3 points failed: k999 (exit code 2)" in last_line(done)
    if executor in ("local", "pool"):  # elsewhere it is in the engine's logs
        assert "k must be at most num_latents = 96, got 999" in done.stderr
        assert done.stdout.count("train    output") == 3  # of two runs and of the sweep
    assert "2 of 3 points finished" in done.stdout
    first = statuses(place)
    assert {k: status for k, (status, _) in first.items()} == {
        3: "finished",
        5: "finished",
    }  # refused at once: no folder
    again = ggscope(*words, "resume=latest", cwd=place, code=2)
    assert again.stderr.count("already finished, kept") == 2
    assert {k: statuses(place)[k] for k in (3, 5)} == {k: first[k] for k in (3, 5)}
    other = ggscope("train", "-m", *TRAIN, "sae.k=3,4", "resume=latest", cwd=place, code=2)
    assert "is another sweep (points: " in last_line(other)


def start_and_kill(words, place, sign):
    """A sweep that ends by `sign` once its first point has a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *words], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not list(place.glob("runs/train/*-k3/checkpoints/step_*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, sign)
    return process


def goes_on(words, place):
    """The sweep is resumed, and its first point logs no step twice."""
    done = ggscope(*words, "resume=latest", cwd=place)
    assert "2 of 2 points finished" in done.stdout
    (metrics,) = place.glob("runs/train/*-k3/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert not list(place.glob("runs/sweeps/*/failed/*"))
    return done


KILLED = ["train", "-m", *TRAIN, "trainer.tokens=200000", "trainer.checkpoint_steps=20", "sae.k=3,5"]


def test_a_sweep_that_is_stopped_goes_on_with_its_point(place):
    process = start_and_kill(KILLED, place, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "resume=" in error.strip().splitlines()[-1]
    assert statuses(place)[3][0] == "interrupted"
    goes_on(KILLED, place)


def test_a_sweep_that_is_killed_goes_on_at_once_though_its_points_still_save(place):
    words = [*KILLED, "executor=pool", "executor.workers=2"]
    with start_and_kill(words, place, signal.SIGKILL) as process:
        process.wait(60)
    assert "going on with the store" in goes_on(words, place).stderr


def test_a_point_waits_for_the_process_that_still_works_in_its_folder(tmp_path, capfd):
    (tmp_path / ".lock").touch()
    hold = "import fcntl, sys, time; fcntl.flock(f := open(sys.argv[1]), 2); print(flush=True); time.sleep(0.5)"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        wait_for_last(tmp_path)
        assert process.wait(10) == 0
    assert capfd.readouterr().err == f"waiting for the process that still works in {tmp_path}\n"


def test_a_second_process_in_a_sweeps_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "-m", "sae.k=3,5"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text("{}\n")
    with locked(tmp_path / "s"):
        assert main([*words, "resume=s"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"ggscope train: another process runs the sweep in {tmp_path}/s; wait for it or stop it first"


def test_two_sweeps_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.run.datetime", Mock(now=lambda: datetime(2026, 1, 31, 12)))
    names = [sweep_folder(Config(), "train").name for _ in range(2)]
    assert names == ["2026-01-31_12-00-00-train", "2026-01-31_12-00-00-2-train"]


def test_a_finished_point_did_not_fail(tmp_path):
    point = Point(name="k3", overrides=("sae.k=3",))
    runs = Runs(
        sweep=tmp_path, command=("train",), points=(point,), folders=(tmp_path,), shared=(), working_folder=tmp_path
    )
    (tmp_path / "failed").mkdir()
    runs.failure(0).write_text('{"code": 2}')
    assert (runs.code(0), runs.missing()) == (2, [])
    (tmp_path / "manifest.json").write_text('{"status": "finished"}')
    assert (runs.code(0), runs.missing()) == (None, [])


@pytest.mark.parametrize("text", ["[1]", "null", '{"command": ["tra', "\xff"])
def test_a_damaged_note_of_a_sweep_is_one_line(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.json").write_bytes(text.encode("latin-1"))
    assert main(["train", "-m", "sae.k=3,5", "resume=."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sweep.json is damaged: expected a JSON object; delete it" in line


def test_a_grid_is_the_product_of_the_values():
    fixed, swept = split(["sae.k=3,5", "trainer.lr=1e-3", "trainer.seed=range(0,3)"])
    assert fixed == ["trainer.lr=1e-3"]
    points = grid(swept)
    assert [point.name for point in points] == [f"k{k}-seed{s}" for k in (3, 5) for s in (0, 1, 2)]
    assert points[4].overrides == ("sae.k=5", "trainer.seed=1")
    names = [point.name for point in grid(split(["corpus.paths=[a/x],[a_x]"])[1])]
    assert len(set(names)) == 2


def test_what_a_search_may_choose_is_read_from_the_grammar():
    swept = split(["a=x,y", "b=int(interval(1,8))", "c=tag(log,interval(1e-4,1.0))", "d=range(0,3)"])[1]
    assert spaces(swept) == [
        Space(key="a", choices=("x", "y")),
        Space(key="b", low=1, high=8, whole=True),
        Space(key="c", low=1e-4, high=1.0, log=True),
        Space(key="d", choices=("0", "1", "2")),
    ]
    with pytest.raises(ConfigError, match=r"b=int\(interval\(1,8\)\): an interval has no list of values"):
        grid(swept[1:2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m"], "expected a setting with several values"),
        (["-m", "sae.k=3,5", "resume=nowhere"], "holds no sweep"),
        (["-m", "sae.k=3,5", "resume=latest"], "no sweep of `ggscope train`"),
        (["-m", "sae.kk=3,5", "sae.foo=1"], "did you mean"),
        (["-m", "sae.k=3,5", "--cfg", "job"], "-m takes no --cfg"),
        (["-m", "trainer.lr=interval(1e-4,1e-2)"], "an interval has no list of values; give values, or a search: sweep=optuna"),
        (["-m", "sae.k=3,5", "sweep=optuna,grid"], "sweep=optuna,grid: expected one value; it is the whole sweep's"),
        (["-m", "sae.k=3,5", "executor=pool,local"], "executor=pool,local: expected one value; it is the whole sweep's"),
        (["-m", "sae.k=3,5", "sweep=optima"], "did you mean sweep=optuna?"),
        (["-m", "sae.k=3,5", "hydra/launcher=joblib"], "hydra/launcher: no plugins of Hydra's are used here; points are run by executor=pool (processes of this machine), executor=ray or executor=submitit"),
        (["-m", "sae.k=3,5", "hydra.launcher.n_jobs=2"], "executor=pool (processes of this machine), executor=ray or executor=submitit"),
        (["-m", "sae.k=3,5", "hydra/sweeper=optuna"], "points are chosen by sweep=grid (every combination) or sweep=optuna"),
        (["trainer.lr=interval(1e-4,1e-2)"], "a sweep: -m sweep=optuna 'trainer.lr=interval(1e-4,1e-2)'"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
