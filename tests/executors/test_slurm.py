"""What is said to SLURM, with stand-ins for its commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor, submitit
from pipeline.run import read_manifest
from pipeline.store.reader import ActivationStore
from sae.errors import ConfigError, LlamaError
from tests.executors import slurm_stand_in
from tests.executors.file_work import FileWork, alive, wait_until
from tests.tiny_llama import write_tiny_llama

SLURM = ExecutorConfig(
    kind="submitit", cluster="slurm", workers=2, threads_per_worker=3, gpus_per_worker=0.5, partition="fast",
    account="lab", memory_gb=7, timeout_minutes=90,
)  # fmt: skip


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    state = slurm_stand_in.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "slurm" / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # for the tests' own work
    monkeypatch.setattr(submitit, "SLURM_POLL_SECONDS", 0.1)
    monkeypatch.setattr(submitit, "SACCT_SECONDS", 0.5)
    return state


def test_one_array_of_jobs_asks_for_what_the_settings_say(slurm, tmp_path):
    work = FileWork(folder=tmp_path, n_shards=5)
    open_executor(SLURM, tmp_path).run(work)
    assert work.missing() == []
    assert sorted(words[2] for words in work.logged("task")) == ["0,1", "2,3,4"]
    assert sorted(words[:3] for words in work.logged("place")) == [["0", "3", "0"], ["1", "3", "0"]]
    assert {words[3] for words in work.logged("place")} == {"6"}  # what SLURM gave it
    (script,) = (path.read_text() for path in slurm.glob("*.sh"))
    for option in ("partition=fast", "account=lab", "mem=7GB", "time=90", "cpus-per-task=3", "gpus-per-node=1"):
        assert f"#SBATCH --{option}\n" in script
    assert (tmp_path / "submitit" / "jobs.txt").read_text() == "1_0\n1_1\n"


def test_an_error_in_a_slurm_job_comes_out_and_the_other_jobs_are_cancelled(slurm, tmp_path):
    work = FileWork(folder=tmp_path, n_shards=200, fails=0, batch_seconds=0.05)
    with pytest.raises(LlamaError, match="shard 0 cannot be captured"):
        open_executor(SLURM, tmp_path).run(work)
    assert len(work.missing()) > 100
    wait_until(lambda: not any(alive(int(words[0])) for words in work.logged("task")), 10)


def test_a_resumed_run_takes_back_the_jobs_of_a_driver_that_was_killed(slurm, tmp_path):
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as left:
        (slurm / "99_0.pid").write_text(str(left.pid))
        (tmp_path / "submitit").mkdir()
        (tmp_path / "submitit" / "jobs.txt").write_text("99_0\n")
        open_executor(SLURM, tmp_path).run(FileWork(folder=tmp_path, n_shards=1))
    assert left.returncode == -15
    assert (tmp_path / "submitit" / "jobs.txt").read_text() == "1\n"


def test_slurm_that_refuses_and_a_number_of_jobs_that_is_missing_are_one_line(slurm, tmp_path):
    executor = open_executor(ExecutorConfig(kind="submitit"), tmp_path)
    with pytest.raises(ConfigError, match=r"executor\.workers is 0; say how many SLURM jobs"):
        executor.run(FileWork(folder=tmp_path, n_shards=1))
    (slurm.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: fast' >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"SLURM took no job \(.*invalid partition specified: fast\)"):
        open_executor(SLURM, tmp_path).run(FileWork(folder=tmp_path, n_shards=1))


def test_jobs_that_start_in_another_folder_find_a_store_given_by_a_relative_path(slurm, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    write_tiny_llama(work / "tiny.gguf")
    (work / "a.txt").write_text("def walk(tree):\n    return [node for node in tree]\n" * 40)
    assert main([
        "extract", "model.path=tiny.gguf", "model.n_threads=1", "hook.points=[blocks.1.hook_resid_post]",
        "corpus=text", "corpus.paths=[a.txt]", "corpus.split=all", "corpus.context_tokens=24",
        "extract.batch_tokens=100", "extract.calibration_tokens=400", "store.path=store", "executor=submitit",
        "executor.cluster=slurm", "executor.workers=1", "executor.threads_per_worker=1",
    ]) == 0  # fmt: skip
    assert ActivationStore(work / "store").verify() == []
    (manifest,) = (read_manifest(path.parent) for path in work.glob("runs/extract/*/manifest.json"))
    assert manifest["outputs"]["store"] == str(work / "store")
    assert manifest["metrics"]["shards_done"] == len(ActivationStore(work / "store").commits) > 0
    assert list(slurm.glob("*.sh"))  # it was a job that captured


@pytest.mark.long
def test_a_slurm_job_that_dies_is_submitted_again(slurm, tmp_path):
    work = FileWork(folder=tmp_path, n_shards=5, dies={3: 1})
    open_executor(SLURM, tmp_path).run(work)
    assert [work.starts_of(shard) for shard in range(5)] == [1, 1, 1, 2, 1]
