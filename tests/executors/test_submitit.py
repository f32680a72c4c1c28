"""Jobs of submitit, on this machine: the same contract as the pool's. SLURM itself is not here to be tested."""

from __future__ import annotations

import signal

import pytest

from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from sae.errors import ConfigError, LlamaError
from tests.executors.drivers import kill_the_driver, stop_the_parent
from tests.executors.file_work import FileWork, alive
from tests.executors.kills import kill_mid_shard

JOBS = ExecutorConfig(kind="submitit", cluster="local", workers=2, threads_per_worker=1)


def test_a_killed_job_is_submitted_again_for_what_it_left(model_path, tmp_path, straight):
    kill_mid_shard(JOBS, model_path, tmp_path, straight, after_rows=400)
    logs = list((tmp_path / "submitit").glob("*_log.out"))
    assert len(logs) == 3  # two jobs and one more
    assert len((tmp_path / "submitit" / "jobs.txt").read_text().split()) == 3


def test_an_error_of_a_job_comes_out_as_raised_once_and_stops_the_others(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=200, fails=0, batch_seconds=0.05)
    with pytest.raises(LlamaError) as caught:
        open_executor(JOBS, tmp_path).run(work)
    assert str(caught.value) == "shard 0 cannot be captured"
    assert work.starts_of(0) == 1
    assert len(work.missing()) > 100
    assert not any(alive(int(words[0])) for words in work.logged("task"))


def test_each_job_has_its_neighbouring_shards_and_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    work = FileWork(folder=tmp_path, n_shards=5)
    open_executor(JOBS, tmp_path / "run").run(work)
    assert sorted(words[2] for words in work.logged("task")) == ["0,1", "2,3,4"]
    assert sorted(words[1:] for words in work.logged("place")) == [["1", "0", "3"], ["1", "1", "4"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_driver_stops_its_jobs(tmp_path, number):
    work, code = stop_the_parent(tmp_path, "submitit", number)
    assert code == 130
    assert 2 in work.missing()


def test_jobs_of_a_killed_driver_leave_after_the_batch_they_are_at(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=400, batch_seconds=0.05)
    pids = kill_the_driver(work, "submitit")
    assert len(work.missing()) > 100
    assert len(pids) == 2


def test_slurm_that_is_not_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = {"": "no SLURM on this machine", "slurm": r"set executor\.cluster=local", "pbs": "'pbs' is unknown"}
    for cluster, message in refused.items():
        executor = open_executor(ExecutorConfig(kind="submitit", cluster=cluster), tmp_path)
        with pytest.raises(ConfigError, match=message):
            executor.run(FileWork(folder=tmp_path, n_shards=1))


@pytest.mark.long
@pytest.mark.parametrize("after_rows", [64, 300, 420])
def test_jobs_killed_anywhere_leave_no_trace(model_path, tmp_path, straight, after_rows):
    kill_mid_shard(JOBS, model_path, tmp_path, straight, after_rows=after_rows)
