"""What goes wrong on the command line: one line, the right exit code, nothing lost."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import ModelConfig
from pipeline.corpus.stdlib import is_held_out
from pipeline.stages.inputs import model_path

from .conftest import QUICK, SMALL, TRAIN, ggscope, last_line


@pytest.fixture
def copy(made, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    return folder


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_a_model_that_cannot_be_read_is_named(damage, tmp_path):
    file = tmp_path / "m.gguf"
    data = model_path(ModelConfig()).read_bytes()
    if damage != "missing":
        file.write_bytes({"empty": b"", "text": b"not a model\n" * 99, "truncated": data[: len(data) // 2]}[damage])
    line = last_line(ggscope("extract", "model.path=m.gguf", cwd=tmp_path, code=2))
    assert "m.gguf" in line


def test_a_hook_that_does_not_exist_lists_those_that_do(tmp_path):
    line = last_line(ggscope("extract", *SMALL, "hook.points=[blocks.40.hook_resid_post]", cwd=tmp_path, code=2))
    assert "blocks.40.hook_resid_post" in line
    assert "0..5" in line or "blocks.5" in line


@pytest.mark.parametrize(
    "points", ["", "blocks.*.hook_resid_post", "blocks.1.hook_z,blocks.2.hook_z", "blocks.2..3.hook_z"]
)
def test_run_refuses_what_it_cannot_train_on_before_it_captures(points, tmp_path):
    line = last_line(ggscope("run", *SMALL, f"hook.points=[{points}]", cwd=tmp_path, code=2))
    assert "trains at one hook point" in line
    assert "`ggscope extract`" in line
    assert not list(tmp_path.glob("runs/run/*/extract"))


def test_what_the_plan_or_the_store_would_refuse_is_refused_before_the_corpus_is_read(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    for setting, said in {
        "extract.batch_tokens=8": "extract.batch_tokens=8 is less than a window",
        "store.path=store": "holds other files (thesis.txt)",
    }.items():
        assert said in last_line(ggscope("extract", *SMALL, setting, cwd=tmp_path, code=2))
    assert not list(tmp_path.glob("runs/extract/*/corpus"))
    assert (tmp_path / "store" / "thesis.txt").read_text() == "mine"


def test_an_sae_of_another_model_is_refused(made, tmp_path):
    from tests.tiny_llama import write_tiny_llama

    write_tiny_llama(tmp_path / "tiny.gguf")
    sae = next(made.glob("runs/train/*/sae"))
    line = last_line(ggscope("apply", f"sae.path={sae}", "model.path=tiny.gguf", "--prompt", "x", cwd=tmp_path, code=2))
    assert "this SAE was made on a model with width 256, this model" in line
    assert ", or apply.allow_model_mismatch=true to try anyway" in line


def test_an_empty_corpus_and_a_missing_glob_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    assert "corpus" in last_line(
        ggscope("extract", "corpus=text", "corpus.paths=[empty.txt]", "corpus.split=all", cwd=tmp_path, code=2)
    )
    assert "none-*.txt" in last_line(
        ggscope("extract", "corpus=text", "corpus.paths=[none-*.txt]", cwd=tmp_path, code=2)
    )


def test_text_and_jsonl_corpora_are_captured_and_bad_documents_counted(tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 40)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe broken")
    done = ggscope("extract", "corpus=text", "corpus.paths=[a.txt,b.txt]", "corpus.split=all", cwd=tmp_path)
    assert "b.txt" in done.stderr
    assert "; 1 document (corpus" in done.stdout
    rows = [{"body": "import os\n" * 30}, {"body": "class A: pass\n" * 30}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["corpus=jsonl", "corpus.paths=[c.jsonl]", "corpus.text_key=body", "corpus.split=all"]
    done = ggscope("extract", *options, cwd=tmp_path)
    assert "2 documents" in done.stdout


def test_a_damaged_shard_is_named_and_extracted_again_to_the_same_bytes(copy):
    (run,) = copy.glob("runs/extract/*")
    (shard,) = [p for p in (run / "activations.zarr" / "hooks").rglob("c/2/0") if p.is_file()]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    line = last_line(ggscope("train", *TRAIN, cwd=copy, code=2))
    assert "shard 2" in line
    done = ggscope("extract", *SMALL, f"resume={run}", cwd=copy)
    assert "1 shard written, 5 were there" in done.stdout
    assert shard.read_bytes() == whole
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = ggscope("extract", *SMALL, f"resume={run}", "store.verify=true", cwd=copy)
    assert "1 shard written, 5 were there" in done.stdout
    assert shard.read_bytes() == whole


def test_resuming_with_other_settings_is_refused_with_the_difference(copy):
    (run,) = copy.glob("runs/extract/*")
    line = last_line(ggscope("extract", *SMALL, "corpus.context_tokens=128", f"resume={run}", cwd=copy, code=2))
    assert "corpus.context_tokens: 256 -> 128" in line
    (run,) = copy.glob("runs/train/*")
    line = last_line(ggscope("train", *TRAIN, "trainer.lr=0.5", f"resume={run}", cwd=copy, code=2))
    assert "trainer.lr: 0.002 -> 0.5" in line


def interrupted(args: list[str], cwd: Path, ready: str, signals: list[int]) -> subprocess.Popen[str]:
    """Start a command, wait until a file matching `ready` exists, send the signals."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *args],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(cwd.glob(ready)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_extract_exits_with_130_and_resumes_to_the_same_bytes(number, made, tmp_path):
    options = ["corpus.max_tokens=16000", "store.shard_rows=512", "extract.batch_tokens=512", QUICK]
    process = interrupted(["extract", *options], tmp_path, "runs/extract/*/activations.zarr/_commits/*.json", [number])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "resume=" in error.strip().splitlines()[-1]
    done = ggscope("extract", *options, "resume=latest", cwd=tmp_path)
    assert "0 were there" not in done.stdout
    other = tmp_path / "other"
    other.mkdir()
    ggscope("extract", *options, cwd=other)
    first, second = (next(folder.glob("runs/extract/*/activations.zarr")) for folder in (tmp_path, other))
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)


@pytest.fixture
def _hang_ups():
    """Not ignored, as a child of `nohup` would have them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hang_ups")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGHUP, signal.SIGKILL]
)
def test_a_stopped_training_resumes_to_bit_identical_weights(number, made, tmp_path):
    store = next(made.glob("runs/extract/*/activations.zarr"))
    options = [*TRAIN, f"store.path={store}", "trainer.tokens=409600", "trainer.checkpoint_steps=10"]
    process = interrupted(["train", *options], tmp_path, "runs/train/*/checkpoints/step_*.pt", [number])
    _, error = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), error
    ggscope("train", *options, "resume=latest", cwd=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    ggscope("train", *options, cwd=other)
    first, second = (next(folder.glob("runs/train/*/sae/sae.safetensors")) for folder in (tmp_path, other))
    assert first.read_bytes() == second.read_bytes()
    steps = [json.loads(line)["step"] for line in (first.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_killed_training_goes_on_with_the_store_it_had_though_there_is_a_newer_one(copy):
    (own,) = copy.glob("runs/extract/*/activations.zarr")
    shutil.rmtree(next(copy.glob("runs/train/*")))
    options = [*TRAIN, "trainer.tokens=409600", "trainer.checkpoint_steps=10"]
    process = interrupted(["train", *options], copy, "runs/train/*/checkpoints/step_*.pt", [signal.SIGKILL])
    process.communicate(timeout=120)
    ggscope("extract", "corpus.max_tokens=4000", QUICK, cwd=copy)
    done = ggscope("train", "resume=latest", cwd=copy)
    assert "going on with the store runs/extract/" in done.stderr
    (run,) = copy.glob("runs/train/*/manifest.json")
    assert json.loads(run.read_text())["inputs"]["store"]["path"] == str(own)
    ggscope("train", f"resume={run.parent}", f"store.path={own}", cwd=copy)  # named, it is the same one
    (other,) = (path for path in copy.glob("runs/extract/*/activations.zarr") if path != own)
    assert "store.path" in last_line(ggscope("train", f"resume={run.parent}", f"store.path={other}", cwd=copy, code=2))


def test_a_training_that_learned_nothing_says_so(copy):
    done = ggscope("train", *TRAIN, "trainer.lr=1000", cwd=copy)
    assert "the mean alone has 1: nothing was learned; try a lower trainer.lr than 1000" in " ".join(
        done.stderr.split()
    )


def test_a_sweep_runs_every_combination(copy):
    done = ggscope("train", "-m", *TRAIN, "sae.k=4,8", cwd=copy)
    assert done.stdout.count("train    output") == 3  # of two runs and of the sweep
    found = sorted(json.loads(p.read_text())["config"]["sae"]["k"] for p in copy.glob("runs/train/*/manifest.json"))
    assert found == [4, 8, 8]


def test_a_folder_that_holds_a_run_is_not_written_over(copy):
    (run,) = copy.glob("runs/extract/*")
    assert "already holds a run" in last_line(ggscope("train", *TRAIN, f"run_dir={run}", cwd=copy, code=2))
    assert json.loads((run / "manifest.json").read_text())["command"] == "extract"


def test_two_processes_do_not_share_a_run(copy):
    (run,) = copy.glob("runs/train/*")
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in last_line(ggscope("train", *TRAIN, f"resume={run}", cwd=copy, code=2))
    done = ggscope("train", *TRAIN, f"resume={run}", cwd=copy)  # finished already: the same numbers again
    assert "L0 8.0" in done.stdout
    assert f"{run} is finished: only what is missing is done" in done.stderr


def test_the_evaluation_of_another_sae_is_refused(copy):
    (copy / "other.json").write_text('{"fvu": 0.5, "sae_id": "0123"}')
    assert "another SAE" in last_line(ggscope("report", "report.evaluation=other.json", cwd=copy, code=2))
    assert "of this SAE" in last_line(ggscope("report", cwd=copy, code=2))


def test_a_report_on_a_latent_that_the_sae_lacks_is_refused(made):
    line = last_line(ggscope("report", "report.steer_latent=256", cwd=made, code=2))
    assert "report.steer_latent=256: this SAE has latents 0..255" in line


def test_evaluate_takes_the_store_of_the_sae_not_the_newest(copy):
    (own,) = copy.glob("runs/extract/*/activations.zarr")
    ggscope("extract", "corpus.max_tokens=4000", QUICK, cwd=copy)
    options = ["evaluate.tokens=2000", "evaluate.splice_tokens=600", "model.n_threads=1"]
    ggscope("evaluate", *options, cwd=copy)
    (run,) = copy.glob("runs/evaluate/*/manifest.json")
    assert json.loads(run.read_text())["inputs"]["store"]["path"] == str(own)


def test_a_plan_is_no_store_for_others_and_resuming_it_captures_the_corpus_it_tokenised(tmp_path):
    done = ggscope("extract", *SMALL, "extract.plan_only=true", cwd=tmp_path)
    assert "nothing was captured" in done.stdout.splitlines()[-1]
    (run,) = tmp_path.glob("runs/extract/*")
    assert json.loads((run / "manifest.json").read_text())["status"] == "planned"
    assert not (run / "activations.zarr").exists()
    for command in (["train", *TRAIN], ["store", "info"]):
        assert "expected a finished `ggscope extract` run" in last_line(ggscope(*command, cwd=tmp_path, code=2))
    spooled = {p.name: p.stat().st_mtime_ns for p in (run / "corpus").iterdir()}
    ggscope("extract", *SMALL, "resume=latest", cwd=tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (run / "corpus").iterdir()} == spooled
    assert "6,000 rows" in ggscope("extract", *SMALL, "extract.plan_only=true", f"resume={run}", cwd=tmp_path).stdout
    assert "6,000 of 6,000 planned" in ggscope("store", "info", cwd=tmp_path).stdout


def test_a_whole_run_cannot_be_only_planned(tmp_path):
    line = last_line(ggscope("run", "extract.plan_only=true", cwd=tmp_path, code=2))
    assert "`ggscope extract extract.plan_only=true`" in line


def test_a_run_with_nothing_to_evaluate_on_stops_before_it_captures(tmp_path):
    name = next(f"{n}.txt" for n in "abcdefgh" if not is_held_out(f"{n}.txt"))
    (tmp_path / name).write_text("some text\n" * 200)
    line = last_line(ggscope("run", "corpus=text", f"corpus.paths=[{name}]", cwd=tmp_path, code=2))
    assert "held out" in line
    assert not list(tmp_path.glob("runs/run/*/extract"))


def test_a_hook_point_that_the_one_of_the_store_is_not_is_refused(copy):
    line = last_line(ggscope("train", *TRAIN, "hook.points=[blocks.1.hook_resid_mid]", cwd=copy, code=2))
    assert "the store holds" in line


def test_paths_that_no_corpus_would_read_are_refused(tmp_path):
    line = last_line(ggscope("extract", *SMALL, "corpus.paths=[notes.txt]", cwd=tmp_path, code=2))
    assert "name a kind, as corpus=text" in line


def test_a_copied_run_folder_is_looked_into_and_not_the_place_it_was_made_at(copy):
    (run,) = copy.glob("runs/extract/*")
    other = copy / "other"
    shutil.copytree(run, other)
    shard = next(path for path in sorted(other.glob("activations.zarr/hooks/**/c/*/0")) if path.is_file())
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert shard.name in ggscope("store", "verify", "other", cwd=copy, code=3).stdout
