"""The table on disk: equal to the one in memory, the same bytes after kills, memory that does not grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import CorpusConfig, ExtractConfig, StoreConfig
from pipeline.corpus import spool
from pipeline.corpus.plan import make_plan
from pipeline.corpus.readers import Document, ReadReport, read_documents
from pipeline.corpus.spool import open_table, spool_table
from pipeline.corpus.windows import windows
from sae.errors import ConfigError, FormatError

from .test_packing import Parrot, named, packings, texts
from .test_windows import PairTokenizer

ROOT = Path(__file__).parents[2]


def same(table, other):
    assert table.corpus_hash == other.corpus_hash
    assert (table.rows, table.n_windows, table.context_tokens) == (other.rows, other.n_windows, other.context_tokens)
    for name, column in table.columns().items():
        assert column.dtype == other.columns()[name].dtype
        np.testing.assert_array_equal(np.asarray(column), np.asarray(other.columns()[name]))
    np.testing.assert_array_equal(np.asarray(table.window_starts), np.asarray(other.window_starts))
    assert tuple(table.documents) == tuple(other.documents)
    assert table.report == other.report


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=60, deadline=None)
@given(found=texts, context=st.integers(6, 17), limit=st.sampled_from([0, 9, 30]), generated=st.booleans(), **packings)
def test_the_table_on_disk_is_the_table_in_memory(
    tmp_path_factory, found, context, limit, generated, packing, bos, add_bos, prefix
):
    model = PairTokenizer(add_bos=add_bos, prefix=prefix)
    options = {"packing": packing, "bos": bos}
    if generated:
        options = {"packing": "documents", "bos": bos, "generate": Parrot()}
    folder = tmp_path_factory.mktemp("spool") / "corpus"
    memory = windows(model, named(found), context, limit, report=ReadReport(), **options)
    disk = spool_table(model, named(found), context, limit, folder=folder, report=ReadReport(), **options)
    same(disk, memory)
    same(open_table(folder), memory)
    hooks = {"a": 8}
    config = {"hooks": hooks, "extract": ExtractConfig(batch_tokens=40), "store": StoreConfig()}
    assert make_plan(disk, **config).config_hash == make_plan(memory, **config).config_hash
    for window in range(memory.n_windows):
        np.testing.assert_array_equal(disk.window_tokens(window), memory.window_tokens(window))
    assert disk.documents[-1] == memory.documents[-1]
    assert list(disk.documents[:2]) == list(memory.documents[:2])
    with pytest.raises(IndexError):
        disk.documents[len(memory.documents)]


def test_a_finished_spool_is_opened_without_reading_the_corpus_and_other_settings_make_it_again(tmp_path):
    model, folder = PairTokenizer(), tmp_path / "corpus"
    first = spool_table(model, named(["cde", "fgh"]), 4, folder=folder, settings={"a": 1})

    def unread():
        raise AssertionError("the corpus was read again")
        yield

    same(spool_table(model, unread(), 4, folder=folder, settings={"a": 1}), first)
    other = spool_table(model, named(["xy"]), 4, folder=folder, settings={"a": 2})
    assert other.rows == 3
    assert [d.name for d in open_table(folder).documents] == ["0"]


def test_a_folder_without_a_whole_spool_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no finished spool"):
        open_table(tmp_path)
    folder = tmp_path / "corpus"
    spool_table(PairTokenizer(), named(["cde"]), 4, folder=folder)
    (folder / "token.i4").write_bytes((folder / "token.i4").read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"token\.i4"):
        open_table(folder)


def test_a_corpus_without_rows_leaves_no_spool(tmp_path):
    with pytest.raises(ConfigError, match="empty corpus"):
        spool_table(PairTokenizer(), [], 4, folder=tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(FormatError):
        open_table(tmp_path / "corpus")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Settings by kind, over the same 3000 records, some of them broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("records")
    rows = [{"text": f"record {i} " + "ab c" * (i % 37) if i % 50 else " "} for i in range(3000)]
    for part in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in rows[part::3])
        (folder / f"{part}.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=700)
    base = CorpusConfig(split="train", seed=3, context_tokens=16)
    parts = [f"{folder}/{part}.jsonl" for part in range(3)]
    return {
        "jsonl": replace(base, kind="jsonl", paths=parts),
        "parquet": replace(base, kind="parquet", paths=[f"{folder}/a.parquet"]),
        "datasets": replace(base, kind="datasets", dataset="json", paths=parts),
    }


SCRIPT = """
import sys, json, time
from pathlib import Path
from pipeline.config import CorpusConfig
from pipeline.corpus.readers import ReadReport, read_documents
from pipeline.corpus.spool import spool_table
from tests.corpus.test_windows import PairTokenizer
from tests.corpus.test_packing import Parrot
from pipeline.corpus import spool
spool.BUFFER_BYTES = 64  # much is on disk that the last checkpoint does not know
folder, settings, packing, pause = Path(sys.argv[1]), CorpusConfig(**json.loads(sys.argv[2])), sys.argv[3], float(sys.argv[4])
def progress(documents, rows):
    if documents % 100 == 0:
        print(documents, flush=True)
        time.sleep(pause)
report = ReadReport()
generate = {"generate": Parrot()} if packing == "generated" else {"packing": packing}
spool_table(PairTokenizer(), read_documents(settings, report), settings.context_tokens, folder=folder, report=report,
            progress=progress, checkpoint_documents=64, **generate)
"""


def start(folder, config, packing, pause=0.0):
    values = json.dumps({name: getattr(config, name) for name in config.__slots__})
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), values, packing, str(pause)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "packing", "kills"),
    [
        ("jsonl", "generated", 1),
        ("parquet", "documents", 1),
        ("datasets", "concat", 2),
        pytest.param("jsonl", "concat", 8, marks=pytest.mark.long),
        pytest.param("parquet", "generated", 8, marks=pytest.mark.long),
        pytest.param("datasets", "documents", 8, marks=pytest.mark.long),
    ],
)
def test_a_killed_spool_goes_on_and_has_the_bytes_of_an_undisturbed_one(corpora, tmp_path, kind, packing, kills):
    with start(tmp_path / "whole", corpora[kind], packing) as process:
        assert process.stdout is not None
        total = len(process.stdout.readlines())
    assert process.returncode == 0
    rng = np.random.default_rng(len(kind + packing))
    counted = []
    for limit in sorted(rng.integers(2, 15, kills).tolist()):
        with start(tmp_path / "killed", corpora[kind], packing, pause=0.02) as process:
            assert process.stdout is not None
            seen = [process.stdout.readline()]
            while seen[-1] and int(seen[-1]) < 100 * limit:
                seen.append(process.stdout.readline())
            time.sleep(rng.random() * 0.02)
            process.send_signal(signal.SIGKILL)
        counted.append(int(seen[0]))
        assert not (tmp_path / "killed" / spool.SPOOL_FILE).exists()
        assert (tmp_path / "killed" / spool.PROGRESS_FILE).exists()
    with start(tmp_path / "killed", corpora[kind], packing) as process:
        assert process.stdout is not None
        rest = process.stdout.readlines()
    assert kills == 1 or counted[-1] > 100  # it went on and did not begin again
    assert len(rest) < total
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert open_table(tmp_path / "killed").report.n_skipped > 0


def test_a_changed_corpus_is_read_from_its_beginning(tmp_path):
    def write(count):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(count)))

    config = CorpusConfig(kind="jsonl", paths=[f"{tmp_path}/a.jsonl"], split="all")

    class Stop(Exception):
        pass

    def stop(documents, rows):
        if documents == 30:
            raise Stop

    write(50)
    with pytest.raises(Stop):
        spool_table(
            PairTokenizer(), read_documents(config), 9, folder=tmp_path / "c", progress=stop, checkpoint_documents=10
        )
    write(40)
    table = spool_table(PairTokenizer(), read_documents(config), 9, folder=tmp_path / "c")
    assert table.corpus_hash == windows(PairTokenizer(), read_documents(config), 9).corpus_hash


def test_rows_of_a_spool_are_read_in_slices_and_never_whole(tmp_path, monkeypatch):
    documents = [Document(name=str(i), text="abc" * 40) for i in range(200)]
    table = spool_table(PairTokenizer(), documents, 16, folder=tmp_path / "c")

    def refuse(self, dtype=None, copy=None):
        if self is not table.window_starts:
            raise AssertionError("a whole column was read")
        return self[:].astype(dtype or self.dtype)

    monkeypatch.setattr(spool.DiskColumn, "__array__", refuse)
    plan = make_plan(table, hooks={"a": 8}, extract=ExtractConfig(), store=StoreConfig())
    low, high = plan.shard_range(1)
    part = {name: column[low:high] for name, column in table.columns().items()}
    assert {len(column) for column in part.values()} == {high - low}


MEMORY = """
import sys
from tests.peak_memory import peak_kib
from pathlib import Path
from pipeline.corpus.documents import Document
from pipeline.corpus.spool import spool_table
from pipeline.corpus.plan import make_plan
from pipeline.config import ExtractConfig, StoreConfig
from tests.corpus.test_windows import PairTokenizer
def documents(count):
    for i in range(count):
        yield Document(name=f"d{i}", text=f"document {i} " + "lorem ipsum " * 100)
peaks = []
for count in (100, 1600):
    table = spool_table(PairTokenizer(), documents(count), 64, folder=Path(sys.argv[1]) / str(count))
    make_plan(table, hooks={"a": 8}, extract=ExtractConfig(), store=StoreConfig())
    for start in range(0, table.rows, 4096):
        sum(int(column[start : start + 4096].max()) for column in table.columns().values())
    peaks.append(peak_kib())
print(table.rows, *peaks)
"""


def test_peak_memory_of_a_corpus_sixteen_times_as_large_is_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows, small_kib, large_kib = map(int, done.stdout.split())
    assert rows > 1_900_000  # 48 MB of columns
    assert large_kib - small_kib < 8 << 10
