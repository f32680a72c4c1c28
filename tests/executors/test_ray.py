"""A Ray cluster on this machine: the same contract as the pool's. One cluster for all, it takes its time to start."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import ray

from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from pipeline.executors.ray import RayCrew, cluster, shape
from sae.errors import ConfigError, LlamaError, StoreError
from tests.executors.file_work import FileWork, alive, wait_until
from tests.executors.kills import kill_mid_shard

_hire = RayCrew._hire

RAY = ExecutorConfig(kind="ray", workers=2, threads_per_worker=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # ours, of models' hashes
        yield home


@pytest.fixture(scope="module")
def running(home):
    handler = signal.getsignal(signal.SIGTERM)
    with cluster(RAY):
        yield
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.usefixtures("running")
def test_a_ray_worker_killed_mid_shard_leaves_the_bytes_of_an_undisturbed_capture(
    model_path, tmp_path, straight, home, capsys
):
    kill_mid_shard(RAY, model_path, tmp_path, straight, after_rows=400)
    wait_until((tmp_path / "ray.log").exists, 10)
    assert "(raylet)" in (tmp_path / "ray.log").read_text()
    assert capsys.readouterr() == ("", "")
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("running")
def test_an_error_in_a_ray_worker_comes_out_as_raised_once_and_stops_the_others(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=400, fails=1, batch_seconds=0.02)
    with pytest.raises(LlamaError) as caught:
        open_executor(RAY, tmp_path).run(work)
    assert str(caught.value) == "shard 1 cannot be captured"
    assert "accident" in caught.value.__notes__[0]
    assert work.starts_of(1) == 1
    assert len(work.missing()) > 300
    wait_until(lambda: not any(alive(int(words[0])) for words in work.logged("task")), 10)


@pytest.mark.usefixtures("running")
def test_a_shard_that_kills_every_ray_worker_ends_the_run(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=3, dies={1: 99})
    config = ExecutorConfig(kind="ray", workers=1, threads_per_worker=2, retries=1)
    with pytest.raises(StoreError, match="shard 1 was lost 2 times, last because its Ray worker died"):
        open_executor(config, tmp_path).run(work)
    assert work.missing() == [1, 2]
    assert {words[1] for words in work.logged("place")} == {"2"}


@pytest.mark.usefixtures("running")
def test_actors_that_die_before_they_begin_cost_no_shard_anything(tmp_path, monkeypatch):
    hired = []

    def hire(crew: RayCrew, number: int) -> Any:
        hired.append(number)
        actor = _hire(crew, number)
        if len(hired) <= 4:
            ray.kill(actor)
        return actor

    monkeypatch.setattr(RayCrew, "_hire", hire)
    config = ExecutorConfig(kind="ray", workers=1, threads_per_worker=1, retries=0)
    work = FileWork(folder=tmp_path, n_shards=2)
    open_executor(config, tmp_path).run(work)
    assert work.missing() == []
    assert len(hired) == 5
    assert [work.starts_of(shard) for shard in range(2)] == [1, 1]


def test_no_actor_ever_beginning_ends_the_run(tmp_path, monkeypatch):
    def hire(crew: RayCrew, number: int) -> Any:
        actor = _hire(crew, number)
        ray.kill(actor)
        return actor

    monkeypatch.setattr(RayCrew, "_hire", hire)
    monkeypatch.setattr("pipeline.executors.ray.PLACING_SECONDS", 1.0)
    config = ExecutorConfig(kind="ray", workers=1, threads_per_worker=1, retries=0)
    with pytest.raises(StoreError, match="shard 0 was lost 1 times, last because its Ray worker died"):
        open_executor(config, tmp_path).run(FileWork(folder=tmp_path, n_shards=1))


def test_more_than_the_cluster_has_is_refused_with_what_it_has(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=3)
    with pytest.raises(ConfigError, match=r"no room for executor\.workers=999"):
        open_executor(ExecutorConfig(kind="ray", workers=999), tmp_path).run(work)
    assert work.missing() == [0, 1, 2]


def test_workers_are_as_many_and_as_wide_as_the_nodes_take():
    nodes = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert shape(ExecutorConfig(), nodes) == (3, 8)
    assert shape(ExecutorConfig(workers=5), nodes) == (5, 8)
    assert shape(ExecutorConfig(workers=6), nodes) == (6, 5)  # 3 + 3 + 1 of them have room
    assert shape(ExecutorConfig(workers=4, threads_per_worker=2), nodes) == (4, 2)
    assert shape(ExecutorConfig(gpus_per_worker=1.0), nodes) == (5, 4)
    assert shape(ExecutorConfig(gpus_per_worker=0.5, workers=2), nodes) == (2, 16)
    for config in (
        ExecutorConfig(workers=4, threads_per_worker=16),
        ExecutorConfig(gpus_per_worker=5.0, workers=1),
        ExecutorConfig(gpus_per_worker=8.0),
    ):
        with pytest.raises(ConfigError, match="5 GPUs in all, no room"):
            shape(config, nodes)


@pytest.mark.long
@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("after_rows", [64, 300, 420])
def test_ray_workers_killed_anywhere_leave_no_trace(model_path, tmp_path, straight, after_rows):
    kill_mid_shard(RAY, model_path, tmp_path, straight, after_rows=after_rows)
