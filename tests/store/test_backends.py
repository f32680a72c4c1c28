"""Folders as backends: a put is whole or absent, ranges are exact, what failed leaves nothing that is read."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.backends import CHUNK_BYTES, LocalBackend, open_backend
from pipeline.store.commits import committed_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.schema import is_store, to_float32, to_stored
from pipeline.store.summary import write_stats
from pipeline.store.writer import StoreWriter
from sae.errors import StoreError

from .helpers import FailingBackend, files_of, fill, known_rows, make_meta

WIDTHS = {"blocks.0.hook_resid_post": 6, "blocks.1.hook_mlp_out": 10}
ROOT = Path(__file__).parents[2]


def test_objects_come_back_whole_in_ranges_and_in_chunks(tmp_path):
    backend = open_backend(tmp_path / "new" / "folder")
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 5)
    backend.put("a/b/c", iter([data[:3], bytearray(data[3:10]), memoryview(data)[10:]]))
    assert backend.get("a/b/c") == data
    assert backend.get_range("a/b/c", 9, 100) == data[9:109]
    assert b"".join(backend.chunks("a/b/c", len(data))) == data
    with pytest.raises(StoreError, match="cut short: expected 20 more bytes, got 10"):
        backend.get_range("a/b/c", len(data) - 10, 20)
    assert (backend.size("a/b/c"), backend.size("a/x"), backend.size("a/b/c/d")) == (len(data), None, None)
    backend.put("a/z", b"")
    assert backend.list("a/") == ["a/b/c", "a/z"]
    assert backend.list("nothing/") == []
    assert backend.entries() == {"a"}
    for _ in range(2):
        backend.delete("a/z")
    assert backend.list() == ["a/b/c"]


def test_a_put_that_fails_leaves_the_old_object_and_no_other_file(tmp_path):
    backend = open_backend(tmp_path)
    backend.put("x", b"old")

    def pieces():
        yield b"half of the new one"
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        backend.put("x", pieces())
    assert files_of(tmp_path) == {"x": b"old"}


def test_two_writers_of_one_object_do_not_mix(tmp_path):
    """A shard may be written by two workers at once: each has a temporary file of its own."""
    backend = open_backend(tmp_path)

    def slow():
        yield b"aaaa"
        backend.put("x", b"bb")
        yield b"aaaa"

    backend.put("x", slow())
    assert files_of(tmp_path) == {"x": b"aaaaaaaa"}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_failure_at_any_put_leaves_whole_shards_only_and_resumes_to_identical_bytes(tmp_path_factory, data):
    rows = data.draw(st.integers(1, 100), label="rows")
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]), label="dtype")
    chunk_rows = data.draw(st.sampled_from([1, 2, 8]), label="chunk rows")
    shard_rows = chunk_rows * data.draw(st.integers(1, 6), label="chunks")
    meta = make_meta(rows, WIDTHS, dtype=dtype, shard_rows=shard_rows, chunk_rows=chunk_rows)
    acts, columns = known_rows(rows, WIDTHS)
    straight, broken = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    fill(straight, meta, acts, columns)
    puts = 9 + 2 + 9 * meta.n_shards  # zarr's documents, ours, then 8 arrays and a commit a shard
    fail_at = data.draw(st.integers(1, puts + 3), label="failing put")
    failing = FailingBackend(broken, fail_at, after=data.draw(st.booleans(), label="after"))
    with contextlib.suppress(OSError):
        fill(failing, meta, acts, columns)
    if is_store(broken):
        store = ActivationStore(broken)
        assert store.verify() == []
        for commit in store.commits:
            low, high = meta.shard_range(commit.shard)
            first = int(store._starts[store.commits.index(commit)])
            for name, x_ND in acts.items():
                stored = to_float32(to_stored(x_ND[low:high], dtype), dtype)
                np.testing.assert_array_equal(store.rows(name, first, first + high - low), stored)
    else:
        assert committed_shards(broken) == []
    fill(broken, meta, acts, columns)
    for path in (straight, broken):
        write_stats(path)
    assert files_of(straight) == files_of(broken)


def test_documents_may_be_lazy_and_are_read_once_and_only_for_a_new_store(tmp_path):
    from pipeline.corpus.windows import DocumentInfo

    meta, asked = make_meta(40, WIDTHS), []

    def documents():
        for index in range(3000):
            asked.append(index)
            yield DocumentInfo(name=f"file {index}.py", bytes=index, sha256="0" * 64)

    StoreWriter(tmp_path, meta, documents()).close()
    assert asked == list(range(3000))
    StoreWriter(tmp_path, meta, documents()).close()
    assert len(asked) == 3000
    assert [d["name"] for d in ActivationStore(tmp_path).iter_documents()] == [f"file {i}.py" for i in range(3000)]


READ_ALL = """
import sys
import numpy as np
from pipeline.store.reader import ActivationStore
def resident():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
store = ActivationStore(sys.argv[1])
hook = next(iter(store.hooks))
total = store.stored_rows(hook, 0, 256).sum(dtype=np.float64)
before = resident()
for start in range(256, store.n_rows, 256):
    total += store.stored_rows(hook, start, start + 256).sum(dtype=np.float64)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory from /proc")
def test_reading_a_whole_store_does_not_grow_the_memory(tmp_path):
    rows, width = 32_768, 768  # 50 MB
    meta = make_meta(rows, {"ggml:x": width}, dtype="float16", shard_rows=8192, chunk_rows=256)
    acts, columns = known_rows(rows, {"ggml:x": 1})
    acts = {"ggml:x": np.broadcast_to(acts["ggml:x"], (rows, width))}
    fill(tmp_path, meta, acts, columns)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 8  # MB


def test_unfinished_writes_are_removed_also_where_their_writer_is_quicker(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.01234567.partial").touch()
    rglob = type(tmp_path).rglob

    def overtaken(self, pattern):
        found = sorted(rglob(self, pattern))
        found[0].unlink()
        return iter(found)

    monkeypatch.setattr(type(tmp_path), "rglob", overtaken)
    LocalBackend(tmp_path).remove_partial()
    assert list(tmp_path.iterdir()) == []
