"""Readers: what is kept, what is named and left out, and in which order documents come."""

from __future__ import annotations

import json

import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.readers import ReadReport, read_documents
from pipeline.corpus.stdlib import is_held_out, stdlib_files
from sae.errors import ConfigError


def names(config, report=None):
    return [document.name for document in read_documents(config, report)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("grüße\r\nline\n".encode())
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "blank.txt").write_bytes(b" \n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "sub" / "c.md").write_text("c")
    return tmp_path


def test_unusable_text_files_are_named_with_their_reason_and_the_rest_is_kept_byte_for_byte(folder):
    report = ReadReport()
    config = CorpusConfig(kind="text", paths=[f"{folder}/**/*.txt"], split="all", seed=-1)
    documents = list(read_documents(config, report))
    assert {d.name: d.text for d in documents} == {"a.txt": "grüße\r\nline\n", "sub/b.txt": "b"}
    assert report.kept == 2
    reasons = dict(report.skipped)
    assert reasons["latin.txt"] == "not UTF-8"
    assert reasons["blank.txt"] == "empty"
    assert reasons["gone.txt"].startswith("unreadable")
    assert "3 skipped" in report.describe_skipped()
    assert "latin.txt: not UTF-8" in report.describe_skipped()


def test_a_document_keeps_its_name_when_the_corpus_folder_moves(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "corpus"
    config = CorpusConfig(kind="text", paths=[f"{folder}/**/*.md", f"{folder}/a.txt"], split="all", seed=-1)
    before = names(config)
    folder.rename(moved)
    after = names(CorpusConfig(kind="text", paths=[f"{moved}/**/*.md", f"{moved}/a.txt"], split="all", seed=-1))
    assert before == after == ["a.txt", "sub/c.md"]


def test_a_file_matched_twice_comes_once_and_equal_names_of_different_files_stay_apart(tmp_path):
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "same.txt").write_text(part)
    paths = [f"{tmp_path}/x/*.txt", f"{tmp_path}/x/same.txt", f"{tmp_path}/y/*.txt"]
    found = names(CorpusConfig(kind="text", paths=paths, split="all", seed=-1))
    assert len(found) == len(set(found)) == 2


@pytest.mark.parametrize("pattern", ["*.nothing", "missing.txt", "sub"])
def test_a_path_or_glob_that_matches_no_file_is_refused_by_name(folder, pattern):
    with pytest.raises(ConfigError, match="matches no file") as caught:
        names(CorpusConfig(kind="text", paths=[f"{folder}/{pattern}"]))
    assert pattern in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "csv"}, "stdlib, text, stdin, jsonl, parquet, datasets, tokens"),
        ({"split": "test"}, "train, held_out, all"),
        ({"kind": "text", "paths": []}, "corpus.paths is empty"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_alternatives(change, message):
    with pytest.raises(ConfigError, match=message):
        names(CorpusConfig(**change))


def test_a_corpus_without_usable_documents_is_an_error_that_names_what_was_skipped(folder):
    with pytest.raises(ConfigError, match=r"empty corpus.*latin.txt: not UTF-8"):
        names(CorpusConfig(kind="text", paths=[f"{folder}/latin.txt", f"{folder}/blank.txt"], split="all"))


def test_train_and_held_out_split_every_kind_by_the_documents_name(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(60)))
    for kind, pattern in (("stdlib", None), ("text", "*.txt"), ("jsonl", "all.jsonl")):
        split = {}
        for side in ("train", "held_out", "all"):
            paths = [f"{tmp_path}/{pattern}"] if pattern else []
            split[side] = set(names(CorpusConfig(kind=kind, paths=paths, split=side)))
        assert split["train"]
        assert split["held_out"]
        assert split["train"] | split["held_out"] == split["all"]
        assert all(is_held_out(name) for name in split["held_out"])
        assert not any(is_held_out(name) for name in split["train"])


def test_the_standard_library_documents_are_the_files_own_text():
    files = dict(stdlib_files())
    documents = list(read_documents(CorpusConfig(max_documents=5)))
    assert len(documents) == 5
    for document in documents:
        assert document.text.encode() == files[document.name].read_bytes()


def test_the_seed_decides_the_order_and_a_negative_one_sorts_by_name():
    sorted_names = names(CorpusConfig(seed=-1))
    assert sorted_names == sorted(sorted_names)
    assert names(CorpusConfig(seed=3)) == names(CorpusConfig(seed=3))
    assert names(CorpusConfig(seed=3)) != names(CorpusConfig(seed=4))
    assert sorted(names(CorpusConfig(seed=3))) == sorted_names
    assert names(CorpusConfig(seed=3, max_documents=7)) == names(CorpusConfig(seed=3))[:7]


def test_bad_lines_of_jsonl_are_named_by_file_and_line(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"body": "no such field"}',
        b"{broken",
        b'{"text": 5}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        '{"text": "schön"}'.encode(),
        b'{"text": "fine", "n": ' + b"9" * 5000 + b"}",
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    report = ReadReport()
    config = CorpusConfig(kind="jsonl", paths=[f"{tmp_path}/d.jsonl"], split="all", seed=-1)
    assert [d.text for d in read_documents(config, report)] == ["good", "schön"]
    reasons = dict(report.skipped)
    assert list(reasons) == [f"d.jsonl:{n}" for n in (3, 4, 5, 6, 7, 8, 10)]
    assert "no field 'text'" in reasons["d.jsonl:3"]
    assert "body" in reasons["d.jsonl:3"]
    assert reasons["d.jsonl:4"].startswith("not JSON")
    assert "int, not a string" in reasons["d.jsonl:5"]
    assert "list, not an object" in reasons["d.jsonl:6"]
    assert reasons["d.jsonl:7"] == "not UTF-8"
    assert "surrogate" in reasons["d.jsonl:8"]
    assert "too many digits" in reasons["d.jsonl:10"]
