"""What verify finds: every kind of damage, each named, and nothing in a whole store."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.store.reader import ActivationStore
from pipeline.store.summary import info, ranges, write_stats
from pipeline.store.verify import unchecked, verify_store
from pipeline.store.writer import invalidate

from .helpers import fill, known_rows, make_meta

HOOK = "blocks.0.hook_resid_post"
ROWS = 150


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    acts, columns = known_rows(ROWS, {HOOK: 12})
    fill(path, make_meta(ROWS, {HOOK: 12}, dtype="float16"), acts, columns)
    write_stats(path)
    return path, columns


def problems_of(path):
    seen = []
    found = [
        str(p) for p in verify_store(ActivationStore(path), progress=lambda done, total: seen.append((done, total)))
    ]
    assert seen[-1][0] == seen[-1][1] > 0
    return found


def change_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_a_whole_store_has_no_problem(made):
    assert problems_of(made[0]) == []


def flip(file, at=-30):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def after(file, text):
    """Where in the file the text ends."""
    return file.read_bytes().index(text) + len(text)


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: flip(p / f"hooks/{HOOK}/acts/c/1/0"), [f"shard 1: hooks/{HOOK}/acts/c/1/0 has another sha256 than its commit"]),
        (lambda p: (p / "columns/pos/c/0").unlink(), ["shard 0: columns/pos/c/0 is missing"]),
        (lambda p: (p / "columns/pos/c/0").write_bytes(b"xx"), ["shard 0: columns/pos/c/0 has 2 bytes, not 128"]),
        (lambda p: (p / "columns/token/zarr.json").unlink(), ["columns/token/zarr.json cannot be read"]),
        (
            lambda p: change_json(p / "columns/token/zarr.json", lambda d: d.update(shape=[128])),
            ["columns/token/zarr.json is not as the store was made: shape changed"],
        ),
        (
            lambda p: change_json(p / "_commits/00000002.json", lambda d: d.update(valid_rows=31)),
            ["shard 2: commit says 31 valid rows, not 32", "shard 2: commit counts"],
        ),
        (
            lambda p: change_json(p / "_commits/00000002.json", lambda d: d["files"].pop("columns/doc/c/2")),
            ["shard 2: commit names other files than the store's arrays: columns/doc/c/2"],
        ),
        (
            lambda p: change_json(p / "_commits/00000002.json", lambda d: d["hooks"].clear()),
            ["shard 2: commit has not the statistics of the store's hooks"],
        ),
        (
            lambda p: (p / "_commits/00000009.json").write_bytes((p / "_commits/00000001.json").read_bytes().replace(b'"shard": 1', b'"shard": 9')),
            ["shard 9: commit is of a shard the store does not have: it has 5"],
        ),
        (
            lambda p: change_json(p / "stats.json", lambda d: d.update(rows=1)),
            ["stats.json is not the statistics of the commits"],
        ),
        (lambda p: (p / "docs.jsonl").unlink(), ["docs.jsonl cannot be used: "]),
        (lambda p: (p / "docs.jsonl").write_bytes(b""), ["docs.jsonl has 0 bytes, not "]),
        (lambda p: cut(p / "docs.jsonl"), ["docs.jsonl cannot be used: "]),
        (lambda p: flip(p / "docs.jsonl"), ["docs.jsonl has another sha256 than checksums.json"]),
        (lambda p: flip(p / "meta.json", after(p / "meta.json", b'"corpus_hash": "')), ["meta.json has another sha256 than checksums.json"]),
        (
            lambda p: flip(p / "_commits/00000003.json", after(p / "_commits/00000003.json", b'"norm_sum": ')),
            ["shard 3: _commits/00000003.json has another sha256 than checksums.json"],
        ),
        (lambda p: cut(p / "checksums.json"), ["checksums.json cannot be read"]),
        (
            lambda p: [(p / "checksums.json").unlink(), (p / "docs.jsonl").write_bytes(b"")],
            ["docs.jsonl names 0 documents, there are rows of 1"],
        ),
        (
            lambda p: [invalidate(p, shard) for shard in (1, 2, 4)],
            ["meta.json plans 3 of 5 shards (1-2, 4) that are not committed"],
        ),
    ],
)  # fmt: skip
def test_each_damage_is_found_and_named(made, tmp_path, damage, named):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    damage(copy)
    found = problems_of(copy)
    for start in named:
        assert [problem for problem in found if problem.startswith(start)], found
    about_statistics = [problem for problem in found if problem.startswith("stats.")]
    assert len(found) - len(about_statistics) <= len(named)


def test_every_byte_of_the_documents_and_of_a_commit_counts(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    for name in ("docs.jsonl", "_commits/00000001.json"):
        whole = (copy / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 20)):
            flip(copy / name, at)
            store = ActivationStore(copy, damaged_commits=True)
            assert list(verify_store(store, progress=lambda done, total: None)), (name, at)
            (copy / name).write_bytes(whole)


def test_an_older_store_says_what_was_not_compared_until_a_run_ends_in_it(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    assert unchecked(ActivationStore(copy)) == []
    (copy / "checksums.json").unlink()
    assert problems_of(copy) == []
    commits = [f"_commits/{shard:08d}.json" for shard in range(5)]
    assert unchecked(ActivationStore(copy)) == ["meta.json", "docs.jsonl", *commits]
    write_stats(copy)
    assert unchecked(ActivationStore(copy)) == []
    assert (copy / "checksums.json").read_bytes() == (made[0] / "checksums.json").read_bytes()


def test_what_was_noted_stays_and_a_shard_captured_again_is_noted_anew(made, tmp_path):
    acts, columns = known_rows(ROWS, {HOOK: 12})
    meta = make_meta(ROWS, {HOOK: 12}, dtype="float16")
    copy = shutil.copytree(made[0], tmp_path / "copy")
    flip(copy / "docs.jsonl")
    write_stats(copy)
    assert [problem.split()[0] for problem in problems_of(copy)] == ["docs.jsonl"]
    shutil.copy(made[0] / "docs.jsonl", copy)
    invalidate(copy, 1)
    other = {name: column.copy() for name, column in columns.items()}
    other["flags"][40] ^= 8
    fill(copy, meta, acts, other)  # another commit than before
    assert unchecked(ActivationStore(copy)) == ["_commits/00000001.json"]
    write_stats(copy)
    assert problems_of(copy) == []
    assert unchecked(ActivationStore(copy)) == []


def test_a_commit_that_counts_other_flags_than_its_column_holds_is_found(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")

    def change(commit):
        commit["flagged_rows"] -= 1
        stats = commit["hooks"][HOOK]
        stats["count"] += 1
        stats["norm_bins"]["1"]["zero"] = 1

    change_json(copy / "_commits/00000000.json", change)
    flagged = int((made[1]["flags"][:32] != 0).sum())
    assert f"shard 0: commit says {flagged - 1} flagged rows, {flagged} are" in problems_of(copy)


def test_info_counts_rows_shards_flags_and_bytes(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    invalidate(copy, 1)
    found = info(ActivationStore(copy))
    flags = made[1]["flags"][[*range(32), *range(64, ROWS)]]
    assert (found["rows"], found["rows_planned"], found["shards_missing"]) == (ROWS - 32, ROWS, [1])
    assert found["flags"]["bos"] == (flags & 1 > 0).sum()
    assert found["flags"]["outlier"] == (flags & 8 > 0).sum() > 0
    assert found["flags"]["not_finite"] == 0
    assert found["flagged_rows"] == (flags != 0).sum()
    sizes = sum(p.stat().st_size for p in copy.rglob("c/**/*") if p.is_file())
    assert found["bytes"] == sizes * 4 // 5  # the files of the shard taken back are still there
    assert found["statistics"][HOOK]["rows"] == found["rows"] - found["flagged_rows"]
    json.dumps(found, allow_nan=False)


def test_ranges_of_numbers_are_short():
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ..."
