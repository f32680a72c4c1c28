"""Every kind of corpus: names, order, split, conditions, and going on where a reading stopped."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config import CorpusConfig
from pipeline.corpus import files
from pipeline.corpus.documents import REASONS, SKIPPED_NAMES
from pipeline.corpus.readers import ReadReport, read_documents
from pipeline.corpus.sources import records, tokens
from pipeline.corpus.stdlib import is_held_out
from sae.errors import ConfigError, FormatError

N = 40


class Ids:
    bos, eos, n_vocab = 0, 1, 100


def text(number):
    return f"text {number}\nzwölf"


def rows():
    return [{"text": text(i), "lang": "en" if i % 4 else "de", "score": i / 10, "junk": "x" * 50} for i in range(N)]


def write_jsonl(path, lines):
    data = "".join(line + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":  # two frames, as appending to a file makes them
        data = b"".join(zstandard.compress(part) for part in (data[:100], data[100:]))
    path.write_bytes(data)


@pytest.fixture
def corpora(tmp_path):
    """The same 40 texts in every kind of file; kind -> settings."""
    lines = [json.dumps(row) for row in rows()]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        write_jsonl(tmp_path / name, lines)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.Table.from_pylist(rows()).schema) as writer:
        for start in range(0, N, 15):
            writer.write_table(pa.Table.from_pylist(rows()[start : start + 15]))
    remote = fsspec.filesystem("memory")
    remote.pipe("/bucket/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    half = N // 2
    for part, name in ((lines[:half], "p0.jsonl"), (lines[half:], "p1.jsonl")):
        write_jsonl(tmp_path / name, part)
    base = CorpusConfig(split="all", seed=-1)
    yield {
        "jsonl": replace(base, kind="jsonl", paths=[f"{tmp_path}/a.jsonl"]),
        "jsonl.gz": replace(base, kind="jsonl", paths=[f"{tmp_path}/a.jsonl.gz"]),
        "jsonl.zst": replace(base, kind="jsonl", paths=[f"{tmp_path}/a.jsonl.zst"]),
        "jsonl.url": replace(base, kind="jsonl", paths=["memory://bucket/*.jsonl"]),
        "parquet": replace(base, kind="parquet", paths=[f"{tmp_path}/*.parquet"]),
        "parquet.url": replace(base, kind="parquet", paths=[f"file://{tmp_path}/a.parquet"]),
        "datasets": replace(
            base, kind="datasets", dataset="json", paths=[f"{tmp_path}/p0.jsonl", f"{tmp_path}/p1.jsonl"]
        ),
        "datasets.parquet": replace(base, kind="datasets", dataset="parquet", paths=[f"{tmp_path}/a.parquet"]),
    }
    remote.rm("/bucket", recursive=True)


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.url", "parquet", "parquet.url", "datasets", "datasets.parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_texts_with_names_that_do_not_depend_on_the_order(corpora, kind):
    found = list(read_documents(corpora[kind]))
    assert [d.text for d in found] == [text(i) for i in range(N)]
    shuffled = list(read_documents(replace(corpora[kind], seed=3)))
    assert [d.name for d in shuffled] != [d.name for d in found]
    assert {d.name: d.text for d in shuffled} == {d.name: d.text for d in found}
    assert len({d.name for d in found}) == N
    again = list(read_documents(replace(corpora[kind], seed=3)))
    assert again == shuffled
    if kind.startswith(("jsonl", "parquet")):
        assert [d.name.rpartition(":")[2] for d in found] == [str(i + 1) for i in range(N)]


@pytest.mark.parametrize("kind", KINDS)
def test_split_conditions_and_limit_hold_for_every_kind(corpora, kind):
    everything = {d.name for d in read_documents(corpora[kind])}
    for split in ("train", "held_out"):
        names = {d.name for d in read_documents(replace(corpora[kind], split=split))}
        assert names == {name for name in everything if is_held_out(name) == (split == "held_out")}
    report = ReadReport()
    wanted = replace(corpora[kind], filter=["lang==de", "score>=1"], seed=5)
    assert sorted(d.text for d in read_documents(wanted, report)) == sorted(text(i) for i in range(12, N, 4))
    assert (report.kept, report.filtered, report.n_skipped) == (7, N - 7, 0)
    assert len(list(read_documents(replace(wanted, max_documents=3)))) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [-1, 7])
def test_a_reading_goes_on_where_another_one_stood(corpora, kind, seed, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_RECORDS", 8)
    config = replace(corpora[kind], seed=seed, filter=["score!=0.7"])
    whole = list(read_documents(config))
    for stop in (1, 7, 8, 9, 23, N - 1):
        report = ReadReport()
        first = read_documents(config, report)
        begun = [next(first) for _ in range(stop)]
        state = json.loads(json.dumps(first.state()))
        later_report = ReadReport()
        later = read_documents(config, later_report)
        assert later.restore(state)
        assert begun + list(later) == whole
        assert (later_report.kept, later_report.filtered) == (N - 1, 1)


def test_a_reading_does_not_go_on_in_a_corpus_of_another_size(corpora, tmp_path):
    first = read_documents(replace(corpora["jsonl"], seed=1))
    next(first)
    state = first.state()
    write_jsonl(tmp_path / "a.jsonl", [json.dumps(row) for row in rows()[:-1]])
    assert not read_documents(replace(corpora["jsonl"], seed=1)).restore(state)


def test_the_order_of_indexed_records_is_numpy_s_permutation(corpora):
    names = [d.name for d in read_documents(corpora["jsonl"])]
    order = np.random.default_rng(9).permutation(N)
    assert [d.name for d in read_documents(replace(corpora["jsonl"], seed=9))] == [names[i] for i in order]


def test_blank_lines_keep_the_numbers_of_those_after_them(tmp_path):
    lines = ["", json.dumps({"text": "one"}), "", " ", json.dumps({"text": "two"}), json.dumps({"text": "three"}), ""]
    for name in ("b.jsonl", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, lines)
        for seed in (-1, 4):
            config = CorpusConfig(kind="jsonl", paths=[f"{tmp_path}/{name}"], split="all", seed=seed)
            assert {(d.name, d.text) for d in read_documents(config)} == {
                (f"{name}:2", "one"), (f"{name}:5", "two"), (f"{name}:6", "three"),
            }  # fmt: skip


def test_broken_records_and_files_are_named_and_the_rest_is_kept(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 9999)[:-40])
    (tmp_path / "no.jsonl.zst").write_bytes(b"not compressed")
    write_jsonl(tmp_path / "good.jsonl", [json.dumps({"text": "good"}), json.dumps({"text": None}), json.dumps({})])
    report = ReadReport()
    config = CorpusConfig(kind="jsonl", paths=[f"{tmp_path}/*"], split="all", seed=0)
    assert {d.text for d in read_documents(config, report)} == {"whole", "good"}
    reasons = dict(report.skipped)
    assert reasons["cut.jsonl.gz"].startswith("unreadable")
    assert reasons["no.jsonl.zst"].startswith("unreadable")
    assert reasons["good.jsonl:2"] == "field 'text' is null, not a string"
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}, {"text": " "}]), tmp_path / "t.parquet")
    (tmp_path / "u.parquet").write_bytes(b"PAR1 not really")
    report = ReadReport()
    config = CorpusConfig(kind="parquet", paths=[f"{tmp_path}/*.parquet"], split="all")
    assert [d.text for d in read_documents(config, report)] == ["a"]
    assert {name: reason.split(" (")[0] for name, reason in report.skipped} == {
        "t.parquet:2": "field 'text' is null, not a string", "t.parquet:3": "empty", "u.parquet": "not Parquet",
    }  # fmt: skip


def test_a_report_keeps_counts_but_not_every_name():
    report = ReadReport()
    for number in range(10_000):
        report.skip(f"d:{number}", f"reason {number % 1000} (particulars {number}); more {number}")
    assert report.n_skipped == 10_000
    assert len(report.skipped) == SKIPPED_NAMES
    assert len(report.reasons) <= REASONS + 1
    assert "9995 more" in report.describe_skipped()


def test_standard_input_is_one_document():
    code = (
        "from pipeline.corpus.readers import read_documents; from pipeline.config import CorpusConfig\n"
        "print([(d.name, d.text) for d in read_documents(CorpusConfig(kind='stdin', split='all'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], input="größe\n".encode(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == str([("stdin", "größe\n")])


def test_token_files_are_split_at_eos_and_read_in_any_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SCAN_TOKENS", 3)  # documents across the parts of the scan
    monkeypatch.setattr(tokens, "MOST_TOKENS", 5)
    ids = [7, 8, 1, 1, 9, *range(10, 17), 1, 5]
    for dtype in ("uint16", "uint32", "int32"):
        np.array(ids, dtype).tofile(tmp_path / "t.bin")
        config = CorpusConfig(kind="tokens", paths=[f"{tmp_path}/t.bin"], token_dtype=dtype, split="all", seed=-1)
        found = [(d.name, d.token_T.tolist()) for d in read_documents(config, vocabulary=Ids())]
        assert found == [
            ("t.bin:0", [7, 8]),
            ("t.bin:4", [9, 10, 11, 12, 13]),
            ("t.bin:9", [14, 15, 16]),
            ("t.bin:13", [5]),
        ]
    shuffled = read_documents(replace(config, seed=1), vocabulary=Ids())
    assert {d.name: d.token_T.tolist() for d in shuffled} == dict(found)


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        ([3, 100], "uint16", "token 1 is 100, the model's vocabulary has 100"),
        ([3, -1], "int32", "token 1 is -1"),
        ([3, 4, 5], "uint16", "no multiple of 4"),
    ],
)
def test_ids_the_model_lacks_are_refused_by_file_and_place(tmp_path, ids, dtype, message):
    np.array(ids, dtype).tofile(tmp_path / "t.bin")
    read_as = "uint32" if "multiple" in message else dtype
    config = CorpusConfig(kind="tokens", paths=[f"{tmp_path}/t.bin"], token_dtype=read_as, split="all")
    with pytest.raises(FormatError, match=message) as caught:
        next(read_documents(config, vocabulary=Ids()))
    assert "t.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "parquet", "text_key": "body"}, "no column 'body'; it has text, lang, score, junk"),
        ({"kind": "parquet", "filter": ["year>1"]}, "no column 'year'"),
        ({"kind": "text", "filter": ["year>1"]}, "corpus.filter needs records"),
        ({"kind": "jsonl", "paths": ["nowhere://x/a.jsonl"]}, "nowhere"),
        ({"kind": "jsonl", "paths": ["memory://none/*.jsonl"]}, "matches no file"),
        ({"kind": "datasets"}, "missing required setting: corpus.dataset"),
        ({"kind": "datasets", "dataset": "json", "paths": ["none.jsonl"]}, "corpus.dataset=json cannot be opened"),
        ({"kind": "tokens", "token_dtype": "float"}, "corpus.token_dtype='float'"),
        ({"kind": "jsonl", "filter": ["lang"]}, "no condition"),
        ({"kind": "parquet", "filter": ["lang==fr"]}, "40 do not meet corpus.filter"),
    ],
)
def test_settings_that_do_not_fit_the_corpus_are_one_line(corpora, change, message):
    config = replace(corpora["parquet"], **change)
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_documents(config, vocabulary=Ids()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "package"), [("parquet", "pyarrow"), ("jsonl.url", "fsspec"), ("jsonl.zst", "zstandard")]
)
def test_a_missing_package_is_named_with_what_installs_it(corpora, kind, package, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'ggscope\[data\]'"):
        list(read_documents(corpora[kind]))


def test_local_files_need_none_of_the_optional_packages(corpora, tmp_path):
    code = (
        "import sys\n"
        "for name in ('fsspec', 'pyarrow', 'datasets', 'zstandard'): sys.modules[name] = None\n"
        "from pipeline.corpus.readers import read_documents; from pipeline.config import CorpusConfig\n"
        "print(len(list(read_documents(CorpusConfig(kind='jsonl', paths=sys.argv[1:], split='all')))))"
    )
    paths = [f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl.gz"]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(2 * N)


def test_datasets_does_not_bring_torch_into_the_process(corpora):
    code = (
        "import sys, json\n"
        "from pipeline.corpus.readers import read_documents; from pipeline.config import CorpusConfig\n"
        "n = len(list(read_documents(CorpusConfig(kind='datasets', dataset='json', paths=sys.argv[1:], split='all'))))\n"
        "print(n, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *corpora["datasets"].paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(N), "False"]


def test_names_of_remote_files_are_those_of_local_ones(corpora, tmp_path):
    remote = [d.name for d in read_documents(corpora["jsonl.url"])]
    assert remote == [d.name for d in read_documents(corpora["jsonl"])]
    assert [f.name for f in files.expand([f"file://{tmp_path}/*.parquet"], "parquet")] == ["a.parquet"]


def test_only_the_columns_in_use_are_read_from_parquet(corpora, monkeypatch):
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        asked.append(options["columns"])
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    list(read_documents(replace(corpora["parquet"], filter=["lang==en"])))
    assert asked
    assert all(columns == ["text", "lang"] for columns in asked)


def test_a_compressed_text_file_is_read_by_its_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    (found,) = read_documents(CorpusConfig(kind="text", paths=[f"{tmp_path}/*.gz"], split="all"))
    assert found.text == "zipped text"


def test_chat_messages_come_the_same_way_out_of_every_kind_with_fields(tmp_path):
    chats = [[{"role": "user", "content": f"größe {i}"}, {"role": "assistant", "content": "ok"}] for i in range(3)]
    rows = [{"chat": chat} for chat in chats]
    write_jsonl(tmp_path / "c.jsonl", [json.dumps(row) for row in rows])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    base = CorpusConfig(split="all", seed=-1, messages_key="chat")
    for options in (
        {"kind": "jsonl", "paths": [f"{tmp_path}/c.jsonl"]},
        {"kind": "parquet", "paths": [f"{tmp_path}/c.parquet"]},
        {"kind": "datasets", "dataset": "json", "paths": [f"{tmp_path}/c.jsonl"]},
    ):
        found = [d.messages for d in read_documents(replace(base, **options))]
        assert [[dict(m) for m in messages or ()] for messages in found] == chats


def test_messages_that_are_none_are_named(tmp_path):
    odd = [5, [], [{"role": "user"}], ["hi"], [{"role": "user", "content": "fine"}], None]
    write_jsonl(tmp_path / "c.jsonl", [json.dumps({"m": messages}) for messages in odd])
    report = ReadReport()
    config = CorpusConfig(kind="jsonl", paths=[f"{tmp_path}/c.jsonl"], split="all", seed=-1, messages_key="m")
    assert [d.name for d in read_documents(config, report)] == ["c.jsonl:5"]
    reasons = dict(report.skipped)
    assert list(reasons) == [f"c.jsonl:{i}" for i in (1, 2, 3, 4, 6)]
    assert reasons["c.jsonl:1"] == "field 'm' is a int, not a list of messages"
    assert reasons["c.jsonl:2"] == "empty"
    assert (
        reasons["c.jsonl:3"] == reasons["c.jsonl:4"] == "field 'm' has a message without the strings role and content"
    )
    assert reasons["c.jsonl:6"] == "field 'm' is null, not a list of messages"


READING = """
import sys
from tests.peak_memory import peak_kib
from pipeline.config import CorpusConfig
from pipeline.corpus.readers import read_documents
kind, *paths = sys.argv[1:]
read = lambda path: sum(1 for _ in read_documents(CorpusConfig(kind=kind, paths=[path], split="all", seed=1)))
peaks = []
for path in paths:
    count = read(path)
    peaks.append(peak_kib())
print(count, *peaks)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_a_corpus_sixteen_times_as_large_takes_the_same_memory(tmp_path, kind):
    rng = np.random.default_rng(0)
    paths = []
    for count in (2000, 32_000):
        rows = [{"text": rng.bytes(1000).hex()} for _ in range(count)]
        paths.append(tmp_path / f"{count}.{kind}")
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), paths[-1], row_group_size=count)  # one large row group
        else:
            write_jsonl(paths[-1], [json.dumps(row) for row in rows])
    done = subprocess.run(
        [sys.executable, "-c", READING, kind, *map(str, paths)], capture_output=True, text=True, check=True
    )
    count, small_kib, large_kib = map(int, done.stdout.split())
    assert count == 32_000
    assert large_kib - small_kib < 16 << 10  # of 64 MB


def test_the_index_of_jsonl_is_eight_bytes_a_record(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ['{"text": "x"}'] * 1000)
    from pipeline.corpus.sources.jsonl import _LineIndex

    (file,) = files.expand([f"{tmp_path}/a.jsonl"], "jsonl")
    index = _LineIndex(file)
    assert index.offsets.itemsize == 4
    order = read_documents(CorpusConfig(kind="jsonl", paths=[str(tmp_path / "a.jsonl")], split="all"))
    next(order)
    assert order._records.order.nbytes == 4 * 1000
