"""Processes of this machine: deaths cost a shard, errors come out as raised, nobody outlives the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest

from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from sae.errors import LlamaError, StoreError
from tests.executors.drivers import start_driver, stop_the_parent
from tests.executors.file_work import FileWork, alive, wait_until
from tests.executors.kills import kill_mid_shard

POOL = ExecutorConfig(kind="pool", workers=2, threads_per_worker=1)


def texts(work):
    return {shard: work.file(shard).read_text() for shard in range(work.n_shards)}


def test_every_shard_is_captured_once_and_every_row_is_counted(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=9)
    calls = []
    open_executor(POOL, tmp_path).run(work, progress=lambda done, total: calls.append((done, total)))
    assert work.missing() == []
    assert [work.starts_of(shard) for shard in range(9)] == [1] * 9
    assert len({words[0] for words in work.logged("task")}) == 2
    assert calls == sorted(calls)
    assert (calls[0], calls[-1]) == ((0, 360), (360, 360))


def test_what_workers_log_as_a_warning_is_a_line_each_on_stderr(tmp_path, capfd):
    work = FileWork(folder=tmp_path, n_shards=6, warns="a row was odd")
    open_executor(POOL, tmp_path).run(work)
    assert capfd.readouterr() == ("", "warning: a row was odd\n" * 2)


def test_only_the_missing_shards_are_captured(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=6)
    for shard in (0, 3, 4):
        work.file(shard).write_text("there")
    open_executor(POOL, tmp_path).run(work)
    assert [work.starts_of(shard) for shard in range(6)] == [0, 1, 1, 0, 0, 1]
    assert work.file(3).read_text() == "there"
    open_executor(POOL, tmp_path).run(work)
    assert len(work.logged("shard")) == 3


def test_a_dead_worker_costs_the_shard_it_was_at_and_the_rows_are_taken_back(tmp_path):
    straight = FileWork(folder=tmp_path / "straight", n_shards=8)
    broken = FileWork(folder=tmp_path / "broken", n_shards=8, dies={1: 2, 6: 1})
    for work in (straight, broken):
        work.folder.mkdir()
        calls = []
        open_executor(POOL, tmp_path).run(work, progress=lambda done, total, calls=calls: calls.append(done))
        assert calls[-1] == 320
    assert texts(broken) == texts(straight)
    assert [broken.starts_of(shard) for shard in range(8)] == [1, 3, 1, 1, 1, 1, 2, 1]


def test_what_a_dead_worker_left_is_shared_out_to_idle_ones(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=8, holds=0)

    def kill() -> None:
        wait_until(lambda: work.missing() == [0, 1] and bool(work.logged("held")))
        os.kill(int(work.logged("held")[0][0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    open_executor(POOL, tmp_path).run(work)
    killer.join()
    tasks = work.logged("task")
    assert sorted(words[2] for words in tasks) == ["0", "0,1", "1", "2,3", "4", "5", "6", "7"]
    assert {words[1] for words in tasks[-2:]} == {"0", "1"}


def test_a_shard_that_kills_every_worker_ends_the_run_and_the_others_stay(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=4, dies={2: 99})
    config = ExecutorConfig(kind="pool", workers=1, threads_per_worker=1, retries=1)
    with pytest.raises(StoreError, match=r"shard 2 was lost 2 times.*killed by SIGKILL"):
        open_executor(config, tmp_path).run(work)
    assert work.missing() == [2, 3]
    assert work.starts_of(2) == 2


def test_an_error_of_the_work_comes_out_as_raised_once_and_stops_the_others(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=40, fails=1, batch_seconds=0.02)
    with pytest.raises(LlamaError) as caught:
        open_executor(POOL, tmp_path).run(work)
    assert str(caught.value) == "shard 1 cannot be captured"
    assert "accident" in caught.value.__notes__[0]  # the traceback in the worker
    assert work.starts_of(1) == 1
    assert 0 not in work.missing()
    assert len(work.missing()) > 10
    assert not any(alive(int(words[0])) for words in work.logged("task"))


def test_work_that_commits_nothing_is_an_error_and_not_a_loop(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=1, commits=False)
    with pytest.raises(StoreError, match="shard 0 was lost 4 times, last because it ended without a commit"):
        open_executor(POOL, tmp_path).run(work)


def test_work_that_a_worker_cannot_load_is_an_error_and_not_a_death(tmp_path):
    with pytest.raises(ZeroDivisionError):
        open_executor(POOL, tmp_path).run(Unloadable(folder=tmp_path, n_shards=2))


class Unloadable(FileWork):
    def __reduce__(self):
        return divmod, (1, 0)


def test_each_worker_sees_its_own_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    work = FileWork(folder=tmp_path, n_shards=12, batch_seconds=0.01)
    open_executor(ExecutorConfig(kind="pool", threads_per_worker=3), tmp_path).run(work)
    assert {tuple(words) for words in work.logged("place")} == {("0", "3", "0", "5"), ("1", "3", "1", "GPU-7")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_parent_leaves_no_worker_and_a_run_that_goes_on(tmp_path, number):
    work, code = stop_the_parent(tmp_path, "pool", number)
    assert code == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    there = len(work.logged("shard"))
    assert 2 in work.missing()
    assert len(work.missing()) < 6
    left = len(work.missing())
    straight = FileWork(folder=tmp_path, n_shards=6)
    open_executor(POOL, tmp_path).run(straight)
    assert straight.missing() == []
    assert len(work.logged("shard")) == there + left


def test_a_ctrl_c_to_the_whole_group_is_the_parents_to_answer(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=6, holds=2)
    driver = start_driver(work, "pool", start_new_session=True, stderr=subprocess.PIPE)
    wait_until(lambda: bool(work.logged("held")))
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors) == (130, "")


def test_a_worker_killed_mid_shard_leaves_the_bytes_of_an_undisturbed_capture(model_path, tmp_path, straight):
    kill_mid_shard(POOL, model_path, tmp_path, straight, after_rows=400)


@pytest.mark.long
@pytest.mark.parametrize("after_rows", [64, 150, 300, 420, 700])
def test_kills_anywhere_in_a_task_leave_no_trace(model_path, tmp_path, straight, after_rows):
    config = ExecutorConfig(kind="pool", workers=1, threads_per_worker=1)
    kill_mid_shard(config, model_path, tmp_path, straight, after_rows=after_rows)


@pytest.mark.long
def test_forty_deaths_cost_forty_shards(tmp_path):
    started = time.monotonic()
    dies = dict.fromkeys(range(0, 60, 3), 2)
    work = FileWork(folder=tmp_path, n_shards=60, dies=dies)
    open_executor(POOL, tmp_path).run(work)
    assert [work.starts_of(shard) for shard in range(60)] == [1 + dies.get(shard, 0) for shard in range(60)]
    assert time.monotonic() - started < 300
