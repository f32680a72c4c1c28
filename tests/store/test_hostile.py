"""Stores whose JSON is damaged, or made to harm: one line that says so, never a traceback, nothing read outside."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.reader import ActivationStore
from pipeline.store.rewrite import Concatenation
from pipeline.store.summary import info, write_stats
from pipeline.store.verify import verify_store
from sae.errors import StoreError
from tests.cli.conftest import ggscope, last_line

from .helpers import fill, known_rows, make_meta

HOOK = "blocks.0.hook_resid_post"
COMMIT = "_commits/00000001.json"
KEY = f"hooks/{HOOK}/acts/c/1/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    acts, columns = known_rows(80, {HOOK: 4})
    fill(path, make_meta(80, {HOOK: 4}, dtype="float16"), acts, columns)
    write_stats(path)
    return path


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data) + "\n")


def use_all(path):
    """Whatever reads a store. Verify opens what it can and reports."""
    problems = list(verify_store(ActivationStore(path, damaged_commits=True), progress=lambda done, total: None))
    store = ActivationStore(path)
    info(store)
    store.rows(HOOK, 0, store.n_rows)
    ActivationStore(path, fast_path=False).rows(HOOK, 0, store.n_rows)
    store.column("token")
    list(Concatenation([store], renumber=True).documents())
    return problems


def with_file(key, entry):
    return lambda commit: commit["files"].update({key: entry})


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("meta.json", lambda m: m.update(shard_rows=0), "shard_rows: expected 1 to"),
        ("meta.json", lambda m: m.update(shard_rows=30), "expected shards of whole chunks"),
        ("meta.json", lambda m: m.update(rows=1 << 40), "at most 1048576"),
        ("meta.json", lambda m: m["hooks"][0].update(dtype="int4"), "expected float16, bfloat16, float32, got 'int4'"),
        ("meta.json", lambda m: m["hooks"][0].update(name=".."), "expected a path inside the store"),
        ("meta.json", lambda m: m["hooks"].append(m["hooks"][0]), "hooks: one twice"),
        ("meta.json", lambda m: m.update(hooks=[]), "hooks: expected at least one"),
        ("meta.json", lambda m: m["columns"].update({"../x": "int32"}), "columns: expected doc"),
        (COMMIT, with_file(KEY, {}), "keys are missing or not known: ['bytes', 'sha256']"),
        (COMMIT, with_file(KEY, {"bytes": "9", "sha256": ""}), "expected int, got '9'"),
        (COMMIT, with_file("../../x", {"bytes": 9, "sha256": ""}), "expected a path inside the store, got '../../x'"),
        (COMMIT, with_file("/etc/passwd", {"bytes": 9, "sha256": ""}), "expected a path inside the store"),
        (COMMIT, lambda c: c.update(valid_rows="12"), "valid_rows: expected int, got '12'"),
        (COMMIT, lambda c: c.update(valid_rows=33), "valid_rows: expected 0 to 32, got 33"),
        (COMMIT, lambda c: c.update(flagged_rows=33), "flagged_rows: expected 0 to 32, got 33"),
        (COMMIT, lambda c: c.update(shard=2), "shard: expected 1 to 1, got 2"),
    ],
)
def test_what_is_no_store_is_refused_with_what_was_expected(made, tmp_path, file, change, said):
    copy = shutil.copytree(made, tmp_path / "copy")
    edit(copy / file, change)
    with pytest.raises(StoreError) as caught:
        ActivationStore(copy)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 40 + "]" * 40, "9" * 5000, '{"rows": NaN}', '"\\ud800"', "\xff"])
@pytest.mark.parametrize("file", ["meta.json", COMMIT, "docs.jsonl"])
def test_text_that_breaks_parsers_is_one_line(made, tmp_path, file, text):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / file).write_bytes(text.encode("latin-1") + b"\n")
    with pytest.raises(StoreError, match=r"is damaged") as caught:
        ActivationStore(copy).documents  # noqa: B018  reading them is the test
    assert "\n" not in str(caught.value)


def test_verify_reports_damaged_commits_and_documents_and_goes_on(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    edit(copy / COMMIT, with_file(KEY, {}))
    (copy / "columns/pos/c/2").unlink()
    (copy / "docs.jsonl").write_text("[1]\n")
    done = ggscope("store", "verify", str(copy), cwd=tmp_path, code=3)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("shard 1: commit cannot be used: ")
    assert lines[1].startswith("docs.jsonl cannot be used: ")
    assert "shard 2: columns/pos/c/2 is missing" in lines
    assert "4 problems found" in last_line(done)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**400, 1e308, "..", "a/../b", "float16", "int64", "zero"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FILES = ["meta.json", "meta.json", COMMIT, COMMIT, "docs.jsonl", "stats.json", "columns/token/zarr.json"]
FILES += [f"hooks/{HOOK}/acts/zarr.json"]


def mutate(data, value):
    """`value` with one place in it changed, taken away or added."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or data.draw(st.integers(0, 5)) == 0:
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(children))
    if (what := data.draw(st.sampled_from(["inside", "inside", "inside", "away", "other key"]))) == "inside":
        value[key] = mutate(data, value[key])
    elif what == "away":
        del value[key]
    elif isinstance(value, dict):
        value[data.draw(st.text(max_size=8))] = value.pop(key)
    return value


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_changes_of_the_json_give_only_store_errors(made, tmp_path_factory, data):
    copy = shutil.copytree(made, tmp_path_factory.mktemp("hostile") / "copy")
    name = data.draw(st.sampled_from(FILES))
    changed = mutate(data, json.loads((copy / name).read_text()))
    (copy / name).write_text(json.dumps(changed) + "\n")
    said = ""
    try:
        use_all(copy)
    except StoreError as error:
        said = str(error)
    assert "\n" not in said
    shutil.rmtree(copy.parent)


def test_the_whole_store_passes_what_the_mutated_ones_go_through(made):
    assert use_all(made) == []
