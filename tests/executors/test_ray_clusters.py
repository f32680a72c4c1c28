"""Ray clusters that come and go: none at an address, a node that is lost, a driver that is stopped."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from ray.cluster_utils import Cluster

from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from sae.errors import ConfigError
from tests.executors.drivers import stop_the_parent
from tests.executors.file_work import FileWork, wait_until


def test_an_address_without_a_cluster_is_one_line(tmp_path):
    for address, reason in (("127.0.0.1:9", "refused"), ("nonsense", "Invalid address")):
        executor = open_executor(ExecutorConfig(kind="ray", address=address), tmp_path)
        with pytest.raises(ConfigError, match=rf"no Ray cluster at executor\.address={address} \(.*{reason}"):
            executor.run(FileWork(folder=tmp_path, n_shards=1))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_driver_takes_its_cluster_along(tmp_path, monkeypatch, number):
    monkeypatch.setenv("HOME", str(tmp_path))
    work, code = stop_the_parent(tmp_path, "ray", number)
    assert code == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    assert 2 in work.missing()


@pytest.mark.long
def test_the_shards_of_a_lost_node_are_captured_on_the_others(tmp_path, monkeypatch):
    # the cluster's processes inherit it; Ray's part in this one goes on with the token it saw first
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "0" * 64))
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        doomed = nodes.add_node(**small)
        nodes.wait_for_nodes()
        work = FileWork(folder=tmp_path, n_shards=12, batch_seconds=0.2)

        def lose() -> None:
            wait_until(lambda: len(work.logged("shard")) >= 3)
            nodes.remove_node(doomed, allow_graceful=False)

        loser = threading.Thread(target=lose)
        loser.start()
        config = ExecutorConfig(kind="ray", workers=2, threads_per_worker=1, address=nodes.address)
        open_executor(config, tmp_path).run(work)
        loser.join()
    finally:
        nodes.shutdown()
    assert work.missing() == []
    assert sorted(work.starts_of(shard) for shard in range(12)) == [1] * 11 + [2]
