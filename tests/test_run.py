"""Run folders, manifests, metric loggers."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import run
from pipeline.config import (
    Config,
    CVectorConfig,
    DirectionConfig,
    ExecutorConfig,
    ExtractConfig,
    LoggerConfig,
    TrainerConfig,
)
from pipeline.console import PlainConsole
from pipeline.loggers import JsonlLogger, open_loggers
from pipeline.resuming import resume_folder, with_settings_of_run
from pipeline.run import ProgressLines, RunContext, new_folder, newest_finished, read_manifest, running, write_json
from sae.errors import CheckFailedError, ConfigError, FormatError, InterruptedRunError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def started(command="train", config=None):
    config = config or Config()
    return RunContext(command=command, folder=new_folder(command, config), config=config)


def test_two_runs_of_one_second_get_folders_of_their_own():
    folders = {new_folder("train", Config()) for _ in range(5)}
    assert len(folders) == 5


def test_the_manifest_says_running_then_finished_with_inputs_outputs_and_numbers():
    context = started()
    with running(context):
        assert read_manifest(context.folder)["status"] == "running"
        context.add_input("store", "a.zarr", "00ff")
        context.outputs["sae"] = "x"
        context.metrics["fvu"] = 0.25
    manifest = read_manifest(context.folder)
    assert manifest["status"] == "finished"
    assert manifest["inputs"]["store"] == {"path": "a.zarr", "sha256": "00ff"}
    assert (manifest["outputs"], manifest["metrics"]) == ({"sae": str(Path("x").resolve())}, {"fvu": 0.25})
    assert manifest["config"]["trainer"]["lr"] == 0.002
    assert {"python", "numpy", "llama-cpp-python"} <= set(manifest["versions"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (CheckFailedError("no"), "failed"), (ValueError("x"), "failed")],
)
def test_a_run_that_ends_badly_says_so(error, status):
    context = started()
    with pytest.raises(InterruptedRunError if status == "interrupted" else type(error)), running(context):
        raise error
    assert read_manifest(context.folder)["status"] == status


@pytest.mark.parametrize(("command", "said"), [("train", "continue with"), ("evaluate", "start again with")])
def test_an_interrupted_run_continues_only_where_the_command_does(command, said):
    context = started(command)
    with (
        pytest.raises(InterruptedRunError, match=f"^interrupted; {said} `ggscope {command} resume="),
        running(context),
    ):
        raise KeyboardInterrupt


def test_the_newest_finished_run_is_taken_and_unfinished_ones_are_not():
    with pytest.raises(ConfigError, match="ggscope train"):
        newest_finished("train")
    done = started()
    with running(done):
        pass
    with pytest.raises(ConfigError), running(started()):
        raise ConfigError("broken")
    assert newest_finished("train")[0].resolve() == done.folder


def test_a_run_that_was_to_make_something_is_passed_over_where_it_did_not():
    done = started("extract")
    with running(done):
        done.outputs["store"] = "a.zarr"
    with running(started("extract")):
        pass
    assert newest_finished("extract", "store")[0].resolve() == done.folder
    with pytest.raises(ConfigError, match="ggscope extract"):
        newest_finished("extract", "picture")


def test_a_planned_run_is_not_finished_and_is_resumed_without_plan_only():
    planned = started("extract", Config(extract=ExtractConfig(plan_only=True)))
    with running(planned):
        planned.ends_as = "planned"
    assert read_manifest(planned.folder)["status"] == "planned"
    with pytest.raises(ConfigError, match="found none"):
        newest_finished("extract")
    assert resume_folder("extract", Config(resume="latest"), ("extract",)) == planned.folder
    with pytest.raises(ConfigError, match=r"extract\.dtype"):
        resume_folder("extract", Config(extract=ExtractConfig(dtype="float32"), resume="latest"), ("extract",))


def test_a_run_refused_before_it_did_anything_leaves_nothing():
    with pytest.raises(ConfigError), running(started()):
        raise ConfigError("no")
    assert not list(Path().iterdir())
    named = Config(run_dir="mine")
    for _ in range(2):  # the folder is free for the next try
        with pytest.raises(ConfigError, match="no"), running(started(config=named)):
            raise ConfigError("no")
    assert not list(Path("mine").iterdir())


def test_a_refused_run_leaves_what_was_in_its_folder_before():
    mine = Path("mine")
    mine.mkdir()
    (mine / ".gitkeep").touch()
    (mine / "notes.txt").write_text("x")
    (mine / "link").symlink_to("nowhere")
    before = sorted(mine.iterdir())
    for _ in range(2):
        with pytest.raises(ConfigError, match="no"), running(started(config=Config(run_dir="mine"))):
            raise ConfigError("no")
        assert sorted(mine.iterdir()) == before


def test_a_run_dir_that_is_no_folder_is_refused():
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    for name, what in (("file", "a file"), ("link", "a link to nothing")):
        with pytest.raises(ConfigError, match=f"run_dir={name}: expected a folder, got {what}"):
            new_folder("train", Config(run_dir=name))


def test_progress_in_a_log_is_a_line_now_and_then(tmp_path, monkeypatch):
    seconds = iter([0.0, 1.0, 31.0, 40.0, 61.5])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(seconds))
    with open(tmp_path / "log", "w") as log:
        lines = ProgressLines(PlainConsole(file=log), "training", "tokens")
        for done in (10_000, 20_000, 30_000, 40_000):
            lines(done, 100_000, "FVU 0.5")
    said = (tmp_path / "log").read_text().splitlines()
    # 10,000 were there before: 10,000 of the 90,000 took 31 seconds, 30,000 took 61.5
    assert said == [
        "training: 20,000 of 100,000 tokens, ETA 0:04:08, FVU 0.5",
        "training: 40,000 of 100,000 tokens, ETA 0:02:03, FVU 0.5",
    ]


def test_the_eta_of_the_next_part_is_of_its_own_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    with open(tmp_path / "log", "w") as log:
        context = RunContext(command="evaluate", folder=tmp_path, config=Config())
        context.console = PlainConsole(file=log)
        with context.progress("evaluating", 100) as progress:
            for seconds, done, total, note in (
                (0.0, 0, 100, "reconstruct"), (1000.0, 100, 100, "reconstruct"),
                (1000.0, 10, 50, "splice"), (1040.0, 30, 50, "splice"),
            ):  # fmt: skip
                clock[0] = seconds
                progress(done, total, note=note)
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line]
    assert said == ["evaluating: 10 of 50 tokens, splice", "evaluating: 30 of 50 tokens, ETA 0:00:40, splice"]


def test_progress_on_a_terminal_is_a_bar_alone(tmp_path):
    with open(tmp_path / "log", "w") as log:
        context = RunContext(command="train", folder=tmp_path, config=Config())
        context.console = PlainConsole(file=log, force_terminal=True)
        with context.progress("training", 10) as progress:
            progress(10)
    assert "10/10" in (tmp_path / "log").read_text()
    assert "10 of 10" not in (tmp_path / "log").read_text()


def test_resume_latest_takes_the_newest_run_in_which_something_was_done():
    interrupted = started()
    with pytest.raises(InterruptedRunError), running(interrupted):
        raise KeyboardInterrupt
    empty = started()
    with pytest.raises(ValueError, match="x"), running(empty):
        raise ValueError("x")
    assert resume_folder("train", Config(resume="latest"), ("trainer",)) == interrupted.folder
    worked = started()

    def work():
        (worked.folder / "checkpoints").mkdir()
        raise ConfigError("the disk is too small")

    with pytest.raises(ConfigError), running(worked):
        work()
    assert read_manifest(worked.folder)["status"] == "failed"
    assert resume_folder("train", Config(resume="latest"), ("trainer",)) == worked.folder
    with (
        pytest.raises(ConfigError),
        running(RunContext(command="train", folder=empty.folder, config=Config(), resumed=True)),
    ):
        raise ConfigError("refused again")
    assert read_manifest(empty.folder)["status"] == "failed"  # a resumed run is never taken back


def test_outputs_are_found_where_a_moved_project_has_them_now(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    done = started("extract")
    with running(done):
        done.outputs |= {
            "store": str(done.folder / "a.zarr"),
            "beside": "stores/b.zarr",
            "far": "s3://bucket/c",
            "out": "/d",
        }
    assert str(tmp_path) not in json.dumps(json.loads((done.folder / "manifest.json").read_text())["outputs"])
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    folder, manifest = newest_finished("extract")
    assert manifest["outputs"] == {
        "store": str(folder.resolve() / "a.zarr"), "beside": str(tmp_path / "new" / "stores" / "b.zarr"),
        "far": "s3://bucket/c", "out": "/d",
    }  # fmt: skip


def test_resume_finds_the_unfinished_run_and_names_a_changed_setting():
    context = started(config=Config(trainer=TrainerConfig(lr=0.5)))
    with pytest.raises(InterruptedRunError), running(context):
        raise KeyboardInterrupt
    same = Config(trainer=TrainerConfig(lr=0.5, log_steps=3), resume="latest")
    assert resume_folder("train", same, ("trainer",)) == context.folder
    elsewhere = Config(trainer=TrainerConfig(lr=0.5), executor=ExecutorConfig(kind="pool", workers=3), resume="latest")
    assert resume_folder("train", elsewhere, ("trainer", "executor")) == context.folder
    with pytest.raises(ConfigError, match=r"trainer\.lr: 0\.5 -> 0\.1"):
        resume_folder("train", Config(trainer=TrainerConfig(lr=0.1), resume=str(context.folder)), ("trainer",))
    with pytest.raises(ConfigError, match="expected latest or the folder of a"):
        resume_folder("extract", Config(resume=str(context.folder)), ("corpus",))


def test_a_manifest_is_replaced_whole(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_full_disk_is_named_and_hides_no_earlier_error(tmp_path, monkeypatch):
    context = started()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail():
        monkeypatch.setattr(run.os, "fsync", full)
        raise ValueError("before")

    with pytest.raises(ValueError, match="before"), running(context):
        fail()
    with pytest.raises(OSError, match="manifest") as caught:
        context.write("running")
    assert caught.value.filename == str(context.folder / "manifest.json")
    assert not list(context.folder.glob("*.tmp"))


def test_the_metrics_file_continues_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path)
    for step in (10, 20, 30):
        first.log({"step": step, "fvu": 1 / step})
    first.close()
    with open(path, "a") as f:
        f.write('{"step": 40, "fv')  # what a kill leaves
    again = JsonlLogger(path, resume_step=20)
    again.log({"step": 30, "fvu": 0.5})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "fvu": 0.1}, {"step": 20, "fvu": 0.05}, {"step": 30, "fvu": 0.5},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "junk",
    [b"5", b'"x"', b"[1]", b"null", b'{"step": "a"}', b'{"step": null}', b'{"step": true}', b'{"fvu": 1}', b"\xff{"],
)
def test_a_line_that_is_no_row_is_left_out_of_the_metrics_file(junk, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n' + junk + b'\n{"step": 20}\n{"step": 30}\n')
    JsonlLogger(path, resume_step=20).close()
    assert path.read_bytes() == b'{"step": 10}\n{"step": 20}\n'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = open_loggers(LoggerConfig(tensorboard=True), tmp_path, {}, 0)
    for logger in loggers:
        logger.log({"step": 5, "fvu": 0.25, "note": "text"})
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(5, 0.25)]


@pytest.mark.parametrize(
    ("setting", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio")],
)
def test_a_missing_logger_package_is_named(setting, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"ggscope\[{setting}\]"):
        open_loggers(LoggerConfig(**{setting: True}), tmp_path, {}, 0)


def test_a_resumed_run_has_its_own_settings_where_none_are_typed():
    old = Config(
        trainer=TrainerConfig(lr=0.5, lr_search=[0.1, 0.2]), extract=ExtractConfig(plan_only=True, dtype="float32")
    )
    context = started(config=old)
    with pytest.raises(InterruptedRunError), running(context):
        raise KeyboardInterrupt
    given = Config(trainer=TrainerConfig(log_steps=7), resume="latest")
    found = with_settings_of_run("train", given, ["trainer.log_steps", "resume"])
    assert found.trainer == replace(old.trainer, log_steps=7)
    assert found.extract == replace(old.extract, plan_only=False)
    assert found.resume == "latest"
    assert resume_folder("train", found, ("trainer", "extract")) == context.folder
    typed = with_settings_of_run("train", given, ["trainer.log_steps", "trainer.lr", "resume"])
    with pytest.raises(ConfigError, match=r"settings differ \(trainer\.lr: 0\.5 -> "):
        resume_folder("train", typed, ("trainer",))
    assert with_settings_of_run("train", given, ["trainer", "resume"]) == given


def test_the_manifest_says_finished_before_the_last_lines():
    context = started()
    with running(context):
        context.three_lines("a", "b", "c")
        assert read_manifest(context.folder)["status"] == "finished"


def test_a_resumed_run_has_its_own_lists_of_settings():
    directions = [DirectionConfig(sae="a", latents=[1], coeffs=[2])]
    context = started("cvector", Config(cvector=CVectorConfig(directions=directions)))
    with pytest.raises(InterruptedRunError), running(context):
        raise KeyboardInterrupt
    found = with_settings_of_run("cvector", Config(resume="latest"), ["resume"])
    assert found.cvector.directions == directions
    assert resume_folder("cvector", found, ("cvector",)) == context.folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": None}, "config: expected dict, got None"),
        ({"config": 3}, "config: expected dict, got 3"),
        ({"config": {"sae": 3}}, "config.sae: expected dict, got 3"),
        ({"config": {"sae": {"k": "abc"}}}, "config.sae.k: expected int, got 'abc'"),
        ({"config": {"sae": {"k": None}}}, "config.sae.k: expected int, got None"),
        ({"config": {"trainer": {"lr": "1"}}}, "config.trainer.lr: expected float, got '1'"),
        ({"config": {"trainer": {"lr_search": [None]}}}, "config.trainer.lr_search: expected float, got None"),
        ({"config": {"cvector": {"directions": [3]}}}, "config.cvector.directions: expected dict, got 3"),
        ({"inputs": 3}, "inputs: expected dict, got 3"),
        ({"inputs": []}, "inputs: expected dict, got []"),
        ({"inputs": {"store": 3}}, "inputs.store: expected dict, got 3"),
        ({"inputs": {"store": {}}}, "inputs.store.path: expected str, got None"),
    ],
)
@pytest.mark.parametrize("resume", ["latest", "FOLDER"])
def test_a_damaged_manifest_of_a_run_to_resume_is_one_line(change, said, resume):
    context = started()
    context.write("interrupted")
    path = context.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError) as refused:
        resume_folder("train", Config(resume=resume.replace("FOLDER", str(context.folder))), ("trainer",))
    assert f"manifest.json is damaged ({said}); start a new run" in str(refused.value)


def test_settings_that_there_are_no_more_and_new_ones_stop_no_resume():
    context = started()
    context.write("interrupted")
    path = context.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"gone": 1, "trainer": {"lr": 1, "old": 2}}}))
    assert with_settings_of_run("train", Config(resume="latest"), ["resume"]).trainer == TrainerConfig(lr=1)
