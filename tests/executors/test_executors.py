"""What all executors share: how shards are cut into tasks, where workers go, what is refused, and the local one."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ExecutorConfig
from pipeline.cores import usable_cores
from pipeline.executors import Placement, open_executor
from pipeline.executors.base import even_tasks, guided_tasks
from pipeline.executors.placement import gpus_of, thread_count, visible_gpus, worker_count
from pipeline.store.writer import invalidate
from sae.errors import ConfigError, LlamaError
from tests.executors.capture_work import extract_with
from tests.executors.file_work import FileWork
from tests.store.helpers import files_of

shards = st.lists(st.integers(0, 10_000), unique=True, max_size=400).map(sorted)
workers = st.integers(1, 40)


@given(shards, workers)
def test_every_missing_shard_is_in_exactly_one_task_and_neighbours_stay_together(missing, n_workers):
    for cut in (guided_tasks, even_tasks):
        tasks = cut(missing, n_workers)
        assert [
            shard for task in tasks for shard in task
        ] == missing  # in order: a task is a slice, its borders are all the cuts
        assert all(tasks)


@given(shards, workers)
def test_guided_tasks_keep_all_workers_busy_with_few_cuts(missing, n_workers):
    sizes = [len(task) for task in guided_tasks(missing, n_workers)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= min(len(missing), n_workers)
    # A worker can be behind by one task: the last one to start is small, the first at most half of a fair share.
    if n_workers > 1 and missing:
        assert max(sizes) <= len(missing) / (2 * n_workers) + 1
        assert sizes[-1] == 1
    # Every 2 workers tasks take more than 1 - 1/e of what is left, until only single shards are.
    assert len(sizes) <= 2 * n_workers * (1 + math.ceil(math.log(max(1, len(missing) / (2 * n_workers)))) + 1)


@given(shards, workers)
def test_even_tasks_are_one_a_worker_and_as_long_as_each_other(missing, n_workers):
    sizes = [len(task) for task in even_tasks(missing, n_workers)]
    assert len(sizes) == min(n_workers, len(missing))
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_the_gpus_go_round():
    assert [gpus_of(worker, ["0", "1", "2"], 0) for worker in range(4)] == [[0], [1], [2], [0]]
    assert [gpus_of(worker, ["0", "1"], 0.5) for worker in range(5)] == [[0], [0], [1], [1], [0]]
    assert [gpus_of(worker, ["0", "1"], 0.1)[0] for worker in range(20)] == [0] * 10 + [1] * 10
    assert [gpus_of(worker, ["0", "1", "2", "3"], 2.0) for worker in range(3)] == [[0, 1], [2, 3], [0, 1]]
    assert gpus_of(3, [], 1.0) == []


def test_the_gpus_that_may_be_seen_are_the_environments(monkeypatch):
    for value, seen in (("2,GPU-a", ["2", "GPU-a"]), ("", []), ("-1", []), ("7", ["7"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == seen


def test_nvidia_smi_counts_the_gpus_where_there_are_no_device_files(monkeypatch, tmp_path):
    if any(name.startswith("nvidia") for name in os.listdir("/dev")):
        pytest.skip("this machine has its own")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g Device 0: (UUID: y)'\necho 'GPU 1: B (UUID: z)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus() == ["0", "1"]
    smi.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert visible_gpus() == []


def test_workers_and_threads_share_the_machine_out():
    assert worker_count(ExecutorConfig(workers=7), ["0"]) == 7
    assert worker_count(ExecutorConfig(), ["0", "1", "2"]) == 3
    assert worker_count(ExecutorConfig(gpus_per_worker=0.5), ["0", "1", "2"]) == 6
    assert worker_count(ExecutorConfig(gpus_per_worker=2.0), ["0", "1", "2"]) == 1
    assert worker_count(ExecutorConfig(), []) == max(1, usable_cores() // 2)
    assert worker_count(ExecutorConfig(threads_per_worker=1), []) == usable_cores()
    assert thread_count(ExecutorConfig(), 1) == usable_cores()
    assert thread_count(ExecutorConfig(), 1000) == 1
    assert thread_count(ExecutorConfig(threads_per_worker=5), 1000) == 5


def test_the_local_executor_captures_what_is_missing_in_this_process(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=4)
    work.file(1).write_text("there")
    calls = []
    executor = open_executor(ExecutorConfig(threads_per_worker=3), tmp_path)
    executor.run(work, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 120) for done in range(0, 121, 10)]
    assert work.missing() == []
    assert [words[:2] for words in work.logged("shard")] == [[str(os.getpid()), "0"]] * 3
    assert work.logged("place")[0][:3] == ["0", "3", "None"]
    executor.run(work)
    assert len(work.logged("task")) == 1


def test_what_local_work_raises_comes_out(tmp_path):
    work = FileWork(folder=tmp_path, n_shards=4, fails=2)
    with pytest.raises(LlamaError, match="shard 2 cannot"):
        open_executor(ExecutorConfig(), tmp_path).run(work)
    assert work.missing() == [2, 3]


def test_real_shards_captured_in_any_order_are_those_of_a_straight_run(model_path, tmp_path, straight):
    work, _ = extract_with(ExecutorConfig(threads_per_worker=1), model_path, tmp_path)
    assert files_of(tmp_path / "store") == straight
    for shard in (1, 2, 4):
        invalidate(tmp_path / "store", shard)
    calls = []
    work.capture([4, 1, 2], place=Placement(n_threads=1), done=calls.append)
    assert work.missing() == []
    assert sum(calls) == work.rows([1, 2, 4])
    assert files_of(tmp_path / "store") == straight


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"executor\.kind='dask' is unknown; use one of local, pool, ray, submitit"):
        open_executor(ExecutorConfig(kind="dask"), tmp_path)


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from pathlib import Path
from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from sae.errors import ConfigError
open_executor(ExecutorConfig(), Path()), open_executor(ExecutorConfig(kind="pool"), Path())
assert not {"llama_cpp", "torch", "ray", "submitit", "zarr"} & {name for name in sys.modules if sys.modules[name]}
try:
    open_executor(ExecutorConfig(kind=sys.argv[1]), Path())
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it(kind, extra):
    done = subprocess.run([sys.executable, "-c", WITHOUT, kind], capture_output=True, text=True, check=True)
    assert done.stdout == f"executor.kind={kind} needs the package {kind}; pip install 'ggscope[{extra}]'\n"
