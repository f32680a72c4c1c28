"""Corpora from the command line: settings that reach the readers, text that comes back from the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipeline.cli import checked_overrides
from pipeline.config import ModelConfig
from pipeline.corpus.stdlib import is_held_out
from pipeline.corpus.texts import document_text, row_texts
from pipeline.corpus.windows import COLUMN_DTYPES, FLAG_GENERATED, DocumentInfo
from pipeline.llama.identity import file_vocabulary
from pipeline.llama.model import Model
from pipeline.stages.inputs import model_path
from pipeline.store.reader import ActivationStore

from .conftest import ggscope, last_line

TEXT = "def größe(x):\n    return x * 2\n\n" * 30


def stored(folder):
    """Columns, documents and pieces of the only store below a folder."""
    (path,) = folder.glob("runs/extract/*/activations.zarr")
    store = ActivationStore(path)
    documents = [DocumentInfo(**values) for values in store.documents]
    return {name: store.column(name) for name in COLUMN_DTYPES}, documents


@pytest.fixture(scope="module")
def piece():
    with Model(model_path(ModelConfig())) as model:
        yield model.piece


def test_conditions_are_taken_without_quotes_of_hydra_s_own():
    given = ["corpus.filter=[lang==en,score>=0.5]", "corpus.filter=[name~^a.*b$]", 'corpus.filter=["a==b,c"]']
    assert checked_overrides("extract", given) == [
        'corpus.filter=["lang==en","score>=0.5"]', 'corpus.filter=["name~^a.*b$"]', 'corpus.filter=["a==b,c"]',
    ]  # fmt: skip


def test_standard_input_is_captured_and_comes_back_from_the_store(tmp_path, piece):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "extract", "corpus=stdin", "corpus.bos=never", "corpus.context_tokens=100"],
        cwd=tmp_path, input=TEXT.encode(), capture_output=True, timeout=300, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    columns, documents = stored(tmp_path)
    assert [d.name for d in documents] == ["stdin"]
    assert document_text(columns, documents, 0, piece) == TEXT.encode()


def test_joined_records_that_meet_the_conditions_come_back_row_by_row(tmp_path, piece):
    rows = [{"text": f"# {i}\n{TEXT[: 20 * i]}", "score": i} for i in range(1, 13)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "corpus.filter=[score>3,score!=7]",
        "corpus.packing=concat",
        "corpus.split=all",
        "corpus.context_tokens=32",
    ]
    ggscope("extract", "corpus=jsonl", "corpus.paths=[d.jsonl]", *options, cwd=tmp_path)
    columns, documents = stored(tmp_path)
    wanted = {f"d.jsonl:{row['score']}": row["text"].encode() for row in rows if row["score"] > 3 and row["score"] != 7}
    assert {d.name: document_text(columns, documents, i, piece) for i, d in enumerate(documents)} == wanted
    pieces = row_texts(columns, documents, 0, len(columns["doc"]), piece)
    assert b"".join(pieces) == b"".join(wanted[d.name] for d in documents)


def test_generated_rows_are_marked_in_the_store(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"import os\ndef f{i}("}) + "\n" for i in range(6)))
    options = ["corpus.split=all", "corpus.generate_tokens=12", "corpus.context_tokens=32", "model.n_threads=1"]
    ggscope("extract", "corpus=jsonl", "corpus.paths=[d.jsonl]", *options, cwd=tmp_path)
    columns, documents = stored(tmp_path)
    generated = (columns["flags"] & FLAG_GENERATED) > 0
    assert 6 <= generated.sum() <= 6 * 12
    assert all(columns["byte_offset"][generated] >= [documents[d].bytes for d in columns["doc"][generated]])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract", "corpus=datasets"], "missing required setting: corpus.dataset"),
        (
            ["extract", "corpus=jsonl", "corpus.paths=[c.jsonl]", "corpus.messages_key=m", "corpus.split=all"],
            "no chat template",
        ),
        (["run", "corpus=stdin"], "corpus.kind=stdin"),
        (["extract", "corpus=text", "corpus.paths=[none/*.txt]"], "matches no file"),
    ],
)
def test_a_corpus_that_cannot_be_had_is_one_line_and_leaves_no_run(args, message, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"m": [{"role": "user", "content": "hi"}]}) + "\n")
    assert message in last_line(ggscope(*args, cwd=tmp_path, code=2))
    assert not (tmp_path / "runs").exists()


def test_ids_without_a_held_out_document_are_refused_before_they_are_captured(tmp_path):
    with Model(model_path(ModelConfig())) as model:
        ids = model.tokenize(TEXT)
        found = file_vocabulary(model_path(ModelConfig()))
        assert found is not None
        assert (found.n_vocab, found.bos, found.eos) == (model.n_vocab, model.bos, model.eos)
    name = next(f"{i}.bin" for i in range(99) if not is_held_out(f"{i}.bin:0"))
    (tmp_path / name).write_bytes(ids.astype("<u2").tobytes())
    options = ["corpus=tokens", f"corpus.paths=[{name}]"]
    line = last_line(ggscope("run", *options, cwd=tmp_path, code=2))
    assert "no document of this corpus is held out" in line
    assert not list(tmp_path.glob("runs/run/*/extract"))
