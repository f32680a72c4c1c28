"""`ggscope store ...` as people type it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from pipeline.store.reader import ActivationStore
from pipeline.store.summary import write_stats
from tests.store.helpers import fill, known_rows, make_meta

from .conftest import ggscope, last_line

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with two stores, one of which is the output of a finished run."""
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("a.zarr", "b.zarr")):
        acts, columns = known_rows(300, {HOOK: 16}, seed=seed)
        model, corpus = {"name": "tiny", "sha256": "abc"}, f"corpus {seed}"
        meta = make_meta(300, {HOOK: 16}, dtype="float16", shard_rows=64, model=model, corpus_hash=corpus)
        fill(folder / name, meta, acts, columns)
        write_stats(folder / name)
    run = folder / "runs" / "extract" / "2026-01-31_12-00-00"
    run.mkdir(parents=True)
    outputs = {"store": str(folder / "a.zarr")}
    (run / "manifest.json").write_text(json.dumps({"command": "extract", "status": "finished", "outputs": outputs}))
    return folder


def test_info_says_rows_shards_flags_and_statistics_of_the_newest_store(folder):
    done = ggscope("store", "info", cwd=folder)
    assert "using the newest store: a.zarr" in done.stderr
    for part in ("300 of 300 planned", "5 of 64 rows; missing: none", "bos 19", HOOK, "float16", "mean norm"):
        assert part in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines()[-3:]] == ["input", "result", "output"]
    assert sorted(p.name for p in folder.iterdir()) == ["a.zarr", "b.zarr", "runs"]  # it keeps no run folder


@pytest.mark.parametrize("place", ["b.zarr", "runs/extract/2026-01-31_12-00-00"])
def test_info_as_json_is_json_alone_for_a_store_or_the_run_around_it(folder, place):
    found = json.loads(ggscope("store", "info", place, "format=json", cwd=folder).stdout)
    assert found["rows"] == found["rows_planned"] == 300
    store = ActivationStore(folder / ("b.zarr" if place == "b.zarr" else "a.zarr"))
    np.testing.assert_allclose(found["statistics"][HOOK]["variance"], store.stats(HOOK).variance, rtol=1e-12)
    same = json.loads(ggscope("store", "info", f"store.path={place}", "format=json", cwd=folder).stdout)
    assert same == found


def test_verify_is_silent_about_a_whole_store_and_lists_what_is_wrong_with_another(folder, tmp_path):
    done = ggscope("store", "verify", "a.zarr", cwd=folder)
    assert "all as their commits say" in done.stdout
    assert "checksums.json" not in done.stderr
    shutil.copytree(folder / "a.zarr", tmp_path / "older.zarr")
    (tmp_path / "older.zarr/checksums.json").unlink()
    older = " ".join(ggscope("store", "verify", "older.zarr", cwd=tmp_path).stderr.split())
    assert "note: checksums.json has no checksum of meta.json, docs.jsonl, _commits/00000000.json, ...: what" in older
    shutil.copytree(folder / "a.zarr", tmp_path / "broken.zarr")
    (tmp_path / "broken.zarr" / "columns/pos/c/1").unlink()
    (tmp_path / "broken.zarr" / f"hooks/{HOOK}/acts/c/3/0").write_bytes(b"short")
    done = ggscope("store", "verify", "broken.zarr", cwd=tmp_path, code=3)
    assert done.stdout.splitlines() == [
        "shard 1: columns/pos/c/1 is missing",
        f"shard 3: hooks/{HOOK}/acts/c/3/0 has 5 bytes, not 2180",
    ]
    assert last_line(done) == "ggscope store: broken.zarr: 2 problems found, see above"


def test_merge_and_compact_write_a_store_that_verifies(folder, tmp_path):
    a, b = str(folder / "a.zarr"), str(folder / "b.zarr")
    done = ggscope("store", "merge", a, b, "store.path=both.zarr", cwd=tmp_path)
    assert "600 rows in 10 shards of 64, every one read back equal" in done.stdout
    ggscope("store", "compact", "both.zarr", "store.path=packed.zarr", "store.shard_rows=600", cwd=tmp_path)
    ggscope("store", "verify", "packed.zarr", cwd=tmp_path)
    merged, packed = ActivationStore(tmp_path / "both.zarr"), ActivationStore(tmp_path / "packed.zarr")
    assert len(packed.commits) == 1
    np.testing.assert_array_equal(packed.rows(HOOK, 0, 600), merged.rows(HOOK, 0, 600))
    np.testing.assert_array_equal(merged.rows(HOOK, 300, 600), ActivationStore(b).rows(HOOK, 0, 300))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inf"], "expected `ggscope store info|verify|merge|compact ...`, got 'inf'; did you mean info?"),
        (["info", "a.zarr", "b.zarr"], "`ggscope store info` takes one store, got 2"),
        (["info", "nothing.zarr"], "no activation store at nothing.zarr"),
        (["info", "gs://bucket/x"], "expected a folder or s3://bucket/prefix, got gs://bucket/x"),
        (["merge", "a.zarr", "b.zarr"], "`ggscope store merge` writes a new store: give store.path=OUT"),
        (["compact", "store.path=c.zarr"], "`ggscope store compact` takes one store, got 0"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(folder, words, line):
    assert last_line(ggscope("store", *words, cwd=folder, code=2)).startswith(f"ggscope store: {line}")
