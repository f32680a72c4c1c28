"""Merged and compacted stores hold the rows of their sources, in order, with ids that count on."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.windows import FLAG_OUTLIER, DocumentInfo
from pipeline.store.reader import ActivationStore
from pipeline.store.rewrite import compact, merge
from pipeline.store.schema import meta_sha256, to_float32, to_stored
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter
from sae.errors import CheckFailedError, StoreError

from .helpers import FailingBackend, files_of, known_rows, make_meta

ROOT = Path(__file__).parents[2]
HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
WIDTHS = {HOOK: 6, OTHER: 4}


def make(path, rows, *, seed, documents=2, shards=None, dtype="float16", threshold=None, **change):
    """A store with documents of its own; returns its rows and columns."""
    acts, columns = known_rows(rows, WIDTHS, seed=seed)
    columns["doc"] = (np.arange(rows) * documents // rows).astype(np.int32)
    meta = make_meta(rows, WIDTHS, dtype=dtype, **{"corpus_hash": f"corpus {seed}", **change})
    if threshold is not None:
        hooks = tuple(dataclasses.replace(hook, outlier_threshold=threshold) for hook in meta.hooks)
        meta = dataclasses.replace(meta, hooks=hooks)
    names = [DocumentInfo(name=f"{seed}-{i}.py", bytes=10 + i, sha256="0" * 64) for i in range(documents)]
    with StoreWriter(path, meta, names) as writer:
        for shard in range(meta.n_shards) if shards is None else shards:
            part = slice(*meta.shard_range(shard))
            stored = {h.name: to_stored(acts[h.name][part], h.dtype) for h in meta.hooks}
            writer.commit_shard(shard, stored, {name: column[part] for name, column in columns.items()})
    return acts, columns


def quiet(done, total):
    assert 0 < done <= total


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_merged_store_is_the_concatenation_with_ids_that_count_on(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("merge")
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    sizes = data.draw(st.lists(st.integers(1, 120), min_size=2, max_size=4), label="rows")
    parts = [make(folder / str(i), rows, seed=i, documents=i + 1, dtype=dtype) for i, rows in enumerate(sizes)]
    shard_rows = data.draw(st.sampled_from([0, 8, 20, 64]), label="shard rows")
    inputs = [folder / str(i) for i in range(len(sizes))]
    made = merge(inputs, folder / "out", shard_rows=shard_rows, progress=quiet)
    assert made.n_rows == sum(sizes)
    assert made.complete
    assert made.meta.shard_rows == {0: 32, 8: 8, 20: 24, 64: 64}[shard_rows]
    for hook in WIDTHS:
        expected = np.concatenate([to_float32(to_stored(acts[hook], dtype), dtype) for acts, _ in parts])
        np.testing.assert_array_equal(made.rows(hook, 0, made.n_rows), expected)
        kept = np.concatenate([columns["flags"] == 0 for _, columns in parts])
        if kept.any():
            x = expected[kept].astype(np.float64)
            np.testing.assert_allclose(made.stats(hook).mean_D, x.mean(0), rtol=1e-9)
            np.testing.assert_allclose(made.stats(hook).var_D, x.var(0), rtol=1e-9, atol=1e-20)
    for name in ("pos", "token", "byte_offset", "flags"):
        np.testing.assert_array_equal(made.column(name), np.concatenate([columns[name] for _, columns in parts]))
    names = [document["name"] for document in made.documents]
    assert names == [f"{i}-{j}.py" for i in range(len(sizes)) for j in range(i + 1)]
    owners = np.concatenate([[f"{i}-{doc}.py" for doc in columns["doc"]] for i, (_, columns) in enumerate(parts)])
    np.testing.assert_array_equal(np.array(names)[made.column("doc")], owners)
    windows = made.column("window")
    np.testing.assert_array_equal(np.diff(windows), (np.diff(windows) > 0).astype(int))  # in order, none left out
    borders = np.cumsum(sizes)[:-1]
    assert (windows[borders] == windows[borders - 1] + 1).all()
    assert list(verify_store(made, progress=lambda done, total: None)) == []


def test_rows_of_a_store_with_other_thresholds_get_the_outlier_flag_of_the_first_one(tmp_path):
    theirs = known_rows(80, WIDTHS, seed=1)[0].values()
    threshold = float(np.median(np.max([np.linalg.norm(x, axis=1) for x in theirs], axis=0)))
    a = make(tmp_path / "a", 60, seed=0, threshold=threshold)
    b = make(tmp_path / "b", 80, seed=1, threshold=99.0)
    made = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=quiet)
    assert {hook.outlier_threshold for hook in made.meta.hooks} == {threshold}
    np.testing.assert_array_equal(made.column("flags")[:60], a[1]["flags"])
    norms = [np.linalg.norm(b[0][hook].astype(np.float16).astype(np.float64), axis=1) for hook in WIDTHS]
    above = (norms[0] > threshold) | (norms[1] > threshold)
    assert 5 < above.sum() < 75
    expected = (b[1]["flags"] & ~np.uint8(FLAG_OUTLIER)) | np.where(above, FLAG_OUTLIER, 0)
    np.testing.assert_array_equal(made.column("flags")[60:], expected)
    assert made.flagged_rows == (made.column("flags") != 0).sum()
    assert made.meta.config["merged"][1]["meta_sha256"] == meta_sha256(tmp_path / "b")


def test_stores_that_do_not_belong_together_are_refused_with_the_difference(tmp_path):
    make(tmp_path / "a", 40, seed=0)
    for change, named in (
        ({"model": {"sha256": "x"}}, "model.sha256: m, not x"),
        ({"dtype": "bfloat16"}, "width 6 float16, not width 6 bfloat16"),
        ({"config": {"context_tokens": 7}}, "config.context_tokens: None, not 7"),
    ):
        make(tmp_path / named, 40, seed=1, **change)
        with pytest.raises(StoreError, match="do not belong together") as caught:
            merge([tmp_path / "a", tmp_path / named], tmp_path / "out", progress=quiet)
        assert named in str(caught.value)
    with pytest.raises(StoreError, match="two stores or more"):
        merge([tmp_path / "a"], tmp_path / "out", progress=quiet)
    with pytest.raises(StoreError, match="one twice"):
        merge([tmp_path / "a", tmp_path / "." / "a"], tmp_path / "out", progress=quiet)
    with pytest.raises(StoreError, match="one twice"):
        compact(tmp_path / "a", tmp_path / "a", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_corpus_that_would_be_in_the_store_twice_is_refused_by_its_name(tmp_path):
    """The same corpus captured again, or inside a merged or compacted store."""
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        make(tmp_path / name, 40, seed=seed)
    make(tmp_path / "again", 40, seed=7, corpus_hash="corpus 0", config={"a": 1, "batch_tokens": 64})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", progress=quiet)
    merge([tmp_path / "ab", tmp_path / "c"], tmp_path / "abc", progress=quiet)
    compact(tmp_path / "ab", tmp_path / "packed", progress=quiet)
    for first, second in (("a", "again"), ("ab", "again"), ("again", "ab"), ("again", "packed"), ("abc", "again")):
        with pytest.raises(StoreError, match=r"both hold rows of the corpus corpus 0") as caught:
            merge([tmp_path / first, tmp_path / second], tmp_path / "out", progress=quiet)
        assert str(tmp_path / second) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard_rows", [0, 8, 100])
def test_a_compacted_store_has_no_holes_and_keeps_the_ids(tmp_path, shard_rows):
    acts, columns = make(tmp_path / "a", 150, seed=0, shards=[4, 0, 2])
    there = np.r_[0:32, 64:96, 128:150]
    made = compact(tmp_path / "a", tmp_path / "out", shard_rows=shard_rows, progress=quiet)
    assert made.complete
    assert made.meta.shard_rows == {0: 32, 8: 8, 100: 104}[shard_rows]
    for hook in WIDTHS:
        np.testing.assert_array_equal(made.rows(hook, 0, len(there)), acts[hook][there].astype(np.float16))
    for name, column in columns.items():
        np.testing.assert_array_equal(made.column(name), column[there])
    assert made.documents == ActivationStore(tmp_path / "a").documents
    assert list(verify_store(made, progress=lambda done, total: None)) == []
    make(tmp_path / "none", 40, seed=0, shards=[])
    with pytest.raises(StoreError, match="has no committed row"):
        compact(tmp_path / "none", tmp_path / "other", progress=quiet)


MERGE = """
import os, signal, sys
from pathlib import Path
from pipeline.store.rewrite import merge
seen = 0
def progress(done, total):
    global seen
    seen += 1
    if seen == 3:
        os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
merge([folder / "a", folder / "b"], folder / "out", progress=progress)
"""


def test_a_killed_merge_says_what_is_missing_and_goes_on(tmp_path):
    make(tmp_path / "a", 100, seed=0)
    make(tmp_path / "b", 90, seed=1)
    inputs = [tmp_path / "a", tmp_path / "b"]
    killed = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    half = ActivationStore(tmp_path / "out")
    assert (half.complete, half.n_rows) == (False, 96)
    assert "3 of 6 shards (3-5) that are not committed" in str(list(verify_store(half, progress=lambda *_: None)))
    merge(inputs, tmp_path / "out", progress=quiet)
    merge(inputs, tmp_path / "straight", progress=quiet)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")
    with pytest.raises(StoreError, match="made with other settings"):
        merge(inputs[::-1], tmp_path / "out", progress=quiet)


def test_a_row_that_comes_back_as_another_fails_the_check(tmp_path):
    make(tmp_path / "a", 64, seed=0)

    class Bending(FailingBackend):
        def put(self, key, data):
            if key == f"hooks/{HOOK}/acts/c/1/0":
                data = bytearray(b"".join(bytes(part) for part in data))
                data[5] ^= 1
            super().put(key, data)

    with pytest.raises(CheckFailedError, match=r"rows 0:64 of blocks.0.hook_resid_post are not those"):
        compact(tmp_path / "a", Bending(tmp_path / "out", -1), progress=quiet)
    assert os.listdir(tmp_path / "out")
