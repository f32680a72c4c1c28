"""Stores in object storage, against a real S3 server in a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ObjectStore

from pipeline.store import object_store
from pipeline.store.backends import as_location, open_backend
from pipeline.store.commits import committed_shards
from pipeline.store.object_store import Lease, machine_id
from pipeline.store.reader import ActivationStore
from pipeline.store.rewrite import compact, merge
from pipeline.store.summary import write_stats
from pipeline.store.writer import ShardWriter, StoreWriter, invalidate
from sae.errors import StoreError

from .helpers import DOCUMENTS, files_of, fill, known_rows, make_meta

ROOT = Path(__file__).parents[2]
HOOK = "blocks.0.hook_resid_post"
WIDTHS = {HOOK: 12, "blocks.1.hook_mlp_out": 4}
ROWS = 150


def objects_of(location):
    """Key -> bytes of everything but the lease."""
    backend = open_backend(location)
    return {key: backend.get(key) for key in backend.list() if key != ".lock"}


@pytest.fixture(scope="module")
def both(s3, tmp_path_factory):
    """The same store in a folder and in object storage."""
    folder, url = tmp_path_factory.mktemp("store"), f"{s3}/both/prefix"
    acts, columns = known_rows(ROWS, WIDTHS)
    for location in (folder, url):
        fill(location, make_meta(ROWS, WIDTHS, dtype="float16"), acts, columns)
        write_stats(location)
    return folder, url


def test_the_objects_are_the_files_of_a_local_store_byte_for_byte(both):
    folder, url = both
    local = files_of(folder)
    del local[".lock"]
    assert objects_of(url) == local


@pytest.mark.parametrize("fast_path", [True, False])
def test_rows_columns_statistics_and_batches_equal_those_of_the_local_store(both, fast_path):
    here, there = ActivationStore(both[0]), ActivationStore(both[1], fast_path=fast_path)
    assert there.path == both[1]
    for start, stop in ((0, ROWS), (0, 0), (31, 33), (64, 96), (149, 150)):
        for name in WIDTHS:
            np.testing.assert_array_equal(there.stored_rows(name, start, stop), here.stored_rows(name, start, stop))
        for name in here.meta.columns:
            np.testing.assert_array_equal(there.column_rows(name, start, stop), here.column_rows(name, start, stop))
    blocks = [(140, 150), (0, 3), (30, 70), (5, 5)]
    for start, stop in blocks:
        block = there.stored_rows(HOOK, start, stop)
        np.testing.assert_array_equal(block, here.stored_rows(HOOK, start, stop))
    assert there.documents == here.documents
    assert there.verify() == []
    np.testing.assert_array_equal(there.stats(HOOK).mean_D, here.stats(HOOK).mean_D)
    batches = [s.batches(HOOK, batch_rows=16, seed=3, buffer_rows=60) for s in (here, there)]
    for _ in range(12):
        np.testing.assert_array_equal(batches[0].next(), batches[1].next())


def test_zarr_opens_the_store_in_the_bucket_by_itself(both):
    from obstore.store import S3Store

    bucket = S3Store("bucket", prefix="both/prefix", client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    array = group[f"hooks/{HOOK}/acts"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:ROWS]), ActivationStore(both[0]).stored_rows(HOOK, 0, ROWS))


def test_an_object_longer_than_one_part_comes_back_whole_and_in_ranges(s3):
    backend = open_backend(f"{s3}/long")
    data = np.random.default_rng(0).bytes(19_000_001)
    backend.put("a/b", [data[:7], memoryview(data)[7:]])
    assert backend.size("a/b") == len(data)
    assert b"".join(backend.chunks("a/b", len(data))) == data
    assert backend.get_range("a/b", 100, 18_000_000) == data[100:18_000_100]
    assert backend.list("a/") == ["a/b"]
    assert backend.entries() == {"a"}
    with pytest.raises(StoreError, match="cut short"):
        backend.get_range("a/b", len(data) - 10, 20)
    backend.put("empty", b"")
    assert backend.get("empty") == b""
    for _ in range(2):
        backend.delete("a/b")
    assert backend.size("a/b") is None
    with pytest.raises(FileNotFoundError):
        backend.get("a/b")


def test_lazy_data_may_be_read_from_object_storage_while_they_are_put(s3):
    backend, data = open_backend(f"{s3}/lazy"), np.random.default_rng(1).bytes(17_000_001)
    backend.put("from", data)
    backend.put("to", backend.chunks("from", len(data)))
    assert backend.get("to") == data
    backend.put("to", iter(()))
    assert backend.get("to") == b""


def test_stores_in_object_storage_are_merged_and_compacted_into_it_as_in_folders(s3, tmp_path):
    for place in (str(tmp_path), f"{s3}/rewrite"):
        for seed, name in enumerate("ab"):
            acts, columns = known_rows(ROWS, WIDTHS, seed=seed)
            meta = make_meta(ROWS, WIDTHS, dtype="float16", shard_rows=80, corpus_hash=name)
            fill(f"{place}/{name}", meta, acts, columns)
        merge([f"{place}/a", f"{place}/b"], f"{place}/merged", progress=lambda done, total: None)
        compact(f"{place}/merged", f"{place}/packed", shard_rows=128, progress=lambda done, total: None)
    for name in ("merged", "packed"):
        local = files_of(tmp_path / name)
        del local[".lock"]
        assert objects_of(f"{s3}/rewrite/{name}") == local


def test_a_url_that_went_through_path_is_mended():
    assert as_location(Path("s3://bucket/a/b")) == as_location("s3://bucket/a/b/") == "s3://bucket/a/b"
    with pytest.raises(StoreError, match="expected a folder or s3://bucket/prefix, got gs://b"):
        open_backend("gs://b")
    with pytest.raises(StoreError, match="expected s3://bucket/prefix"):
        open_backend("s3://")


def test_a_shard_writer_goes_to_another_process_by_its_location(s3):
    meta, (acts, columns) = make_meta(64, {HOOK: 12}), known_rows(64, {HOOK: 12})
    with StoreWriter(f"{s3}/workers", meta, DOCUMENTS):
        worker = pickle.loads(pickle.dumps(ShardWriter(f"{s3}/workers")))
        assert not worker.committed(1)
        worker.commit_shard(1, {HOOK: acts[HOOK][32:]}, {name: column[32:] for name, column in columns.items()})
        assert worker.committed(1)
        assert worker.missing() == [0]


def test_a_damaged_object_is_named_and_the_shard_can_be_taken_back(s3):
    url, meta = f"{s3}/damaged", make_meta(ROWS, WIDTHS)
    acts, columns = known_rows(ROWS, WIDTHS)
    fill(url, meta, acts, columns)
    whole, key = objects_of(url), f"hooks/{HOOK}/acts/c/2/0"
    open_backend(url).put(key, whole[key][:-100])
    with pytest.raises(StoreError, match=r"shard 2 of s3://.* is damaged.*captures it again"):
        ActivationStore(url).rows(HOOK, 60, 70)
    assert [(p.shard, p.file) for p in ActivationStore(url).verify()] == [(2, key)]
    invalidate(url, 2)
    fill(url, meta, acts, columns)
    assert objects_of(url) == whole


WRITE = """
import os, signal, sys
from pipeline.store.schema import to_stored
from pipeline.store.writer import StoreWriter
from tests.store.helpers import DOCUMENTS, known_rows, make_meta
from tests.store.test_object_store import WIDTHS, ROWS
location, kill_at = sys.argv[1], int(sys.argv[2])
meta = make_meta(ROWS, WIDTHS)
acts, columns = known_rows(ROWS, WIDTHS)
puts = 0
with StoreWriter(location, meta, DOCUMENTS) as writer:
    put = writer.backend.put
    def counted(key, data):
        global puts
        if puts == kill_at:
            print("here", flush=True)
            if kill_at >= 0 and sys.argv[3] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            sys.stdin.read()
        puts += 1
        put(key, data)
    writer.backend.put = counted
    for shard in writer.missing():
        rows = slice(*meta.shard_range(shard))
        stored = {h.name: to_stored(acts[h.name][rows], h.dtype) for h in meta.hooks}
        writer.commit_shard(shard, stored, {name: column[rows] for name, column in columns.items()})
"""


def writer_process(location, kill_at, how):
    command = [sys.executable, "-c", WRITE, str(location), str(kill_at), how]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kill_at", [3, 9, 13])
def test_a_writer_killed_between_objects_is_resumed_to_identical_bytes(s3, kill_at):
    """9 objects a shard; its lease is taken over at once, because its process on this host is gone."""
    url, meta = f"{s3}/killed{kill_at}", make_meta(ROWS, WIDTHS)
    killed = writer_process(url, kill_at, "kill")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert committed_shards(url) == list(range(kill_at // 9))
    acts, columns = known_rows(ROWS, WIDTHS)
    fill(url, meta, acts, columns)
    fill(f"{url}-straight", meta, acts, columns)
    assert objects_of(url) == objects_of(f"{url}-straight")


@pytest.mark.parametrize("where", ["s3", "folder"])
def test_two_runs_into_one_store_are_refused_while_the_first_lives(s3, tmp_path, where):
    location = f"{s3}/two" if where == "s3" else tmp_path / "two"
    first = writer_process(location, 4, "wait")
    try:
        assert first.stdout.readline() == "here\n"
        second = subprocess.run(
            [sys.executable, "-c", WRITE, str(location), "-1", ""], cwd=ROOT, capture_output=True, text=True
        )
        assert second.returncode == 1
        assert "another run is writing into" in second.stderr
        if where == "s3":
            assert f"host {socket.gethostname()}, process {first.pid}, lease until" in second.stderr
    finally:
        first.communicate("", timeout=60)
    assert first.returncode == 0
    with StoreWriter(location, make_meta(ROWS, WIDTHS), DOCUMENTS) as writer:
        assert writer.missing() == []


def put_lease(url, **change):
    holder = {"host": "elsewhere", "pid": 1, "id": "theirs", "expires": time.time() + 100, **change}
    open_backend(url).put(".lock", json.dumps(holder).encode())


def test_only_a_lease_that_nobody_keeps_is_taken_over(s3):
    url = f"{s3}/lease"
    put_lease(url)
    with pytest.raises(StoreError, match=r"another run is writing into .*host elsewhere.*lease until"):
        Lease(open_backend(url))
    put_lease(url, host=socket.gethostname(), pid=os.getpid(), machine=machine_id())
    with pytest.raises(StoreError, match="another run is writing"):
        Lease(open_backend(url))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"host": socket.gethostname(), "pid": gone.pid}
    boot, namespace = machine_id().split("/")
    for machine in ("", f"{boot}/1", f"another boot/{namespace}"):  # a container of the same name, another machine
        put_lease(url, **here, machine=machine)
        with pytest.raises(StoreError, match="another run is writing"):
            Lease(open_backend(url))
    for change in ({**here, "machine": machine_id()}, {"expires": time.time() - 1}):
        put_lease(url, **change)
        with Lease(open_backend(url)) as lease:
            lease.check()
            assert json.loads(open_backend(url).get(".lock"))["pid"] == os.getpid()
        assert json.loads(open_backend(url).get(".lock"))["expires"] == 0
    open_backend(url).put(".lock", b"not json")
    Lease(open_backend(url)).close()


def test_where_the_system_does_not_tell_machines_apart_only_expiry_counts(s3, tmp_path, monkeypatch):
    url = f"{s3}/unknown"
    monkeypatch.setattr(object_store, "BOOT_ID", tmp_path / "none")
    assert machine_id() == ""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put_lease(url, host=socket.gethostname(), pid=gone.pid, machine="")
    with pytest.raises(StoreError, match="another run is writing"):
        Lease(open_backend(url))
    put_lease(url, host=socket.gethostname(), pid=gone.pid, machine="", expires=time.time() - 1)
    Lease(open_backend(url)).close()


def test_a_conditional_put_is_refused_by_the_server_when_someone_was_quicker(s3):
    backend = open_backend(f"{s3}/conditional")
    first = backend.put_if("x", b"1", None)
    assert backend.put_if("x", b"2", None) is None
    second = backend.put_if("x", b"3", first)
    assert second is not None
    assert backend.put_if("x", b"4", first) is None
    assert backend.get_versioned("x") == (b"3", second)


def test_a_lease_is_renewed_and_one_that_was_taken_is_noticed(s3, monkeypatch):
    monkeypatch.setattr(object_store, "LEASE_SECONDS", 0.9)
    url = f"{s3}/renewed"
    with StoreWriter(url, make_meta(ROWS, WIDTHS), DOCUMENTS) as writer:
        until = json.loads(writer.backend.get(".lock"))["expires"]
        time.sleep(1.5)
        writer.check_lock()
        assert json.loads(writer.backend.get(".lock"))["expires"] > until + 0.5
        put_lease(url)
        time.sleep(0.7)
        acts, columns = known_rows(32, WIDTHS)
        with pytest.raises(StoreError, match=r"the lease of .* was lost"):
            writer.commit_shard(0, acts, columns)
    assert json.loads(open_backend(url).get(".lock"))["id"] == "theirs"


def test_what_the_storage_cannot_do_is_one_line(s3, monkeypatch):
    with pytest.raises(StoreError, match="no activation store at s3://bucket/nothing"):
        ActivationStore(f"{s3}/nothing")
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x.*the bucket does not exist"):
        ActivationStore("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match=r"the bucket does not exist"):
        StoreWriter("s3://no-such-bucket/x", make_meta(ROWS, WIDTHS), DOCUMENTS)
    monkeypatch.setattr(object_store, "RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"^s3://bucket/x cannot be used: .*AWS_ENDPOINT_URL.*$") as caught:
        ActivationStore(f"{s3}/x")
    assert "\n" not in str(caught.value)


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"pip install 'ggscope\[s3\]'"):
        open_backend("s3://bucket/x")


def test_a_prefix_with_other_objects_is_not_taken_for_a_store(s3):
    open_backend(f"{s3}/mine").put("thesis.txt", b"mine")
    with pytest.raises(StoreError, match=r"holds other files \(thesis.txt\)"):
        StoreWriter(f"{s3}/mine", make_meta(40, WIDTHS), DOCUMENTS)
    assert open_backend(f"{s3}/mine").get("thesis.txt") == b"mine"
