"""The writer: what is committed is whole, what is not is done again, and the bytes do not depend on the way there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.commits import committed_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.schema import to_float32, to_stored
from pipeline.store.writer import StoreWriter, invalidate, lock
from sae.errors import ShapeError, StoreError

from .helpers import DOCUMENTS, files_of, fill, known_rows, make_meta

WIDTHS = {"blocks.0.hook_resid_post": 6, "blocks.1.hook_mlp_out": 10}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_order_and_any_interruption_give_the_same_bytes(tmp_path_factory, data):
    rows = data.draw(st.integers(1, 150), label="rows")
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]), label="dtype")
    meta = make_meta(rows, WIDTHS, dtype=dtype)
    acts, columns = known_rows(rows, WIDTHS)
    straight, broken = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    fill(straight, meta, acts, columns)
    order = data.draw(st.permutations(range(meta.n_shards)), label="order")
    cut = data.draw(st.integers(0, len(order)), label="cut")
    fill(broken, meta, acts, columns, order[:cut])
    for shard in order[:cut][:1]:
        invalidate(broken, shard)
    (broken / "hooks" / "stray.partial").write_bytes(b"half a shard")
    fill(broken, meta, acts, columns)
    assert files_of(straight) == files_of(broken)
    store = ActivationStore(broken)
    for name, x_ND in acts.items():
        np.testing.assert_array_equal(store.rows(name, 0, rows), to_float32(to_stored(x_ND, dtype), dtype))


def test_the_store_is_ordinary_zarr_and_a_shard_is_its_rows_followed_by_the_index(tmp_path):
    meta = make_meta(70, WIDTHS, dtype="float16")
    acts, columns = known_rows(70, WIDTHS)
    acts["blocks.1.hook_mlp_out"][8:16] = 0  # a chunk of nothing but zeros must not be left out
    fill(tmp_path, meta, acts, columns)
    group = zarr.open_group(tmp_path, mode="r")
    for name, x_ND in acts.items():
        array = group[f"hooks/{name}/acts"]
        assert isinstance(array, zarr.Array)
        assert array.shape == (96, WIDTHS[name])
        assert array.attrs["logical_dtype"] == "float16"
        np.testing.assert_array_equal(np.asarray(array[:70]), x_ND.astype(np.float16))
        assert not np.asarray(array[70:]).any()
        raw = (tmp_path / f"hooks/{name}/acts/c/0/0").read_bytes()
        assert raw[: 32 * WIDTHS[name] * 2] == x_ND[:32].astype(np.float16).tobytes()
        assert len(raw) == 32 * WIDTHS[name] * 2 + 4 * 16 + 4
    for name, column in columns.items():
        np.testing.assert_array_equal(np.asarray(group[f"columns/{name}"])[:70], column)
    for array in (group[f"columns/{name}"] for name in columns):
        assert isinstance(array, zarr.Array)
        assert array.shape == (96,)
    sizes = sum(p.stat().st_size for p in tmp_path.rglob("c/**/*") if p.is_file())
    assert sizes == meta.shard_bytes * meta.n_shards


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[::3] &= np.uint32(0xFFFF8000)  # half of them ties
    x = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, 1.0, 1e-40], np.float32)])
    x = x[np.isfinite(x) & (np.abs(x) < 1e38)]
    low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    to_low, to_high = np.abs(x - low.astype(np.float64)), np.abs(high.astype(np.float64) - x)
    even = (low.view(np.uint32) >> 16) % 2 == 0
    expected = np.where((to_low < to_high) | ((to_low == to_high) & even), low, high)
    stored = to_stored(x[None], "bfloat16")
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(to_float32(stored, "bfloat16")[0], expected)


def test_two_runs_into_one_store_are_refused(tmp_path):
    meta = make_meta(40, WIDTHS)
    with (
        StoreWriter(tmp_path, meta, DOCUMENTS),
        pytest.raises(StoreError, match="another run is writing"),
        StoreWriter(tmp_path, meta, DOCUMENTS),
    ):
        pass
    with lock(tmp_path), pytest.raises(StoreError, match="another run is writing"):
        invalidate(tmp_path, 0)
    StoreWriter(tmp_path, meta, DOCUMENTS).close()


def test_going_on_with_other_settings_is_refused_and_the_difference_named(tmp_path):
    acts, columns = known_rows(40, WIDTHS)
    fill(tmp_path, make_meta(40, WIDTHS), acts, columns, [0])
    before = files_of(tmp_path)
    for meta, named in (
        (make_meta(41, WIDTHS), "rows: 40, not 41"),
        (make_meta(40, WIDTHS, model={"sha256": "other"}), "model.sha256: m, not other"),
        (make_meta(40, WIDTHS, config={"a": 2}), "config.a: 1, not 2"),
        (make_meta(40, WIDTHS, dtype="float16"), "dtype: float32, not float16"),
    ):
        with pytest.raises(StoreError, match=named):
            StoreWriter(tmp_path, meta, DOCUMENTS)
    assert files_of(tmp_path) == before


def test_a_folder_with_other_files_is_not_taken_for_a_store(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"thesis.txt"):
        StoreWriter(tmp_path, make_meta(40, WIDTHS), DOCUMENTS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_store_killed_while_it_was_made_is_made_again(tmp_path):
    acts, columns = known_rows(40, WIDTHS)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fill(whole, make_meta(40, WIDTHS), acts, columns)
    fill(broken, make_meta(40, WIDTHS), acts, columns, [0])
    (broken / "meta.json").unlink()
    fill(broken, make_meta(40, WIDTHS), acts, columns)
    assert files_of(whole) == files_of(broken)


def test_a_shard_of_the_wrong_length_is_refused(tmp_path):
    meta = make_meta(40, WIDTHS)
    acts, columns = known_rows(40, WIDTHS)
    with StoreWriter(tmp_path, meta, DOCUMENTS) as writer, pytest.raises(ShapeError, match="holds 8 rows"):
        writer.commit_shard(1, acts, columns)


def test_a_disk_too_small_for_the_store_is_refused_before_anything_is_captured(tmp_path):
    meta = make_meta(2**40, WIDTHS, shard_rows=2**20)
    with pytest.raises(StoreError, match=r"too full: \d+\.\d\d GB needed, \d+\.\d\d GB free"):
        StoreWriter(tmp_path, meta, DOCUMENTS)


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.store.schema import to_stored
from pipeline.store.writer import StoreWriter
from sae.errors import StoreError
from tests.store.helpers import DOCUMENTS, known_rows, make_meta
from tests.store.test_writer import WIDTHS
path, how = Path(sys.argv[1]), sys.argv[2]
meta = make_meta(4096, WIDTHS, shard_rows=1024)
acts, columns = known_rows(4096, WIDTHS)
with StoreWriter(path, meta, DOCUMENTS) as writer:
    for shard in range(4):
        if shard == 2 and how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        if shard == 2 and how == "ballast":
            with open(path.parent / "ballast", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        rows = slice(*meta.shard_range(shard))
        try:
            writer.commit_shard(
                shard,
                {h.name: to_stored(acts[h.name][rows], h.dtype) for h in meta.hooks},
                {name: column[rows] for name, column in columns.items()},
            )
        except StoreError as error:
            sys.exit(f"StoreError: {error}; commits {[p.name for p in sorted((path / '_commits').glob('*.json'))]}")
"""
ROOT = Path(__file__).parents[2]


def check_full_disk(done):
    assert done.returncode == 1, done.stderr
    for part in (
        "disk full",
        "2 committed shards are safe",
        "GB more are needed",
        "['00000000.json', '00000001.json']",
    ):
        assert part in done.stderr


def test_a_write_the_system_refuses_keeps_the_committed_shards_and_a_resume_completes_the_store(tmp_path):
    """The file-size limit of a process stands in for a full disk: the same path, errno EFBIG."""
    meta = make_meta(4096, WIDTHS, shard_rows=1024)
    acts, columns = known_rows(4096, WIDTHS)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "store"), "limit"]
    check_full_disk(subprocess.run(command, capture_output=True, text=True, cwd=ROOT))
    store = ActivationStore(tmp_path / "store")
    assert committed_shards(tmp_path / "store") == [0, 1]
    assert store.verify() == []
    fill(tmp_path / "store", meta, acts, columns)
    fill(tmp_path / "straight", meta, acts, columns)
    assert files_of(tmp_path / "store") == files_of(tmp_path / "straight")


def test_a_file_system_that_fills_up_during_the_run_keeps_the_committed_shards(tmp_path):
    """On a real tmpfs. Needs the right to mount in a namespace of its own."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    try:
        allowed = subprocess.run([*unshare, "bash", "-c", mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("no right to mount a tmpfs here")
    script = f'{mount} && exec "$0" -c "$1" {tmp_path}/store ballast'
    command = [*unshare, "bash", "-c", script, sys.executable, FULL_DISK]
    check_full_disk(subprocess.run(command, capture_output=True, text=True, cwd=ROOT))
