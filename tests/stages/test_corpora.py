"""Tables of the stages: no more generated rows than a stage takes."""

from __future__ import annotations

import json

import pytest

from pipeline.config import Config, ConvertConfig, CorpusConfig, EvaluateConfig, ModelConfig, ReportConfig
from pipeline.llama.model import Model
from pipeline.run import RunContext
from pipeline.stages.corpora import window_table
from tests.tiny_llama import write_tiny_llama

SIZES = {
    "evaluate": EvaluateConfig(tokens=60, splice_tokens=150),
    "report": ReportConfig(tokens=100),
    "convert": ConvertConfig(probe_tokens=80),
}
ROWS = {"evaluate": 300, "report": 200, "convert": 160}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_tiny_llama(folder / "tiny.gguf")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": f"import os\ndef f{i}("}) + "\n" for i in range(400)))
    with Model(folder / "tiny.gguf") as model:
        yield folder, model


def context(folder, command, generate_tokens, **sizes):
    corpus = CorpusConfig(
        kind="jsonl", paths=[str(folder / "d.jsonl")], context_tokens=32, generate_tokens=generate_tokens
    )
    config = Config(model=ModelConfig(n_threads=1), corpus=corpus, **(SIZES | sizes))
    return RunContext(command=command, folder=folder, config=config)


@pytest.mark.parametrize("command", ROWS)
def test_generated_rows_end_at_twice_what_the_command_takes(command, tiny, capsys):
    folder, model = tiny
    table = window_table(context(folder, command, 20), model, split="held_out", max_tokens=0)
    assert ROWS[command] - 1 <= table.rows <= ROWS[command]
    assert f"only the first {table.rows} rows of the corpus are used" in capsys.readouterr().err
    read = window_table(context(folder, command, 0), model, split="held_out", max_tokens=0)  # text costs nothing
    assert read.rows > ROWS[command]
    assert not capsys.readouterr().err


def test_all_generated_rows_are_taken_where_all_are_asked_for(tiny, capsys):
    folder, model = tiny
    asked = context(folder, "evaluate", 20, evaluate=EvaluateConfig(tokens=0, splice_tokens=150))
    table = window_table(asked, model, split="held_out", max_tokens=0)
    assert table.rows > ROWS["evaluate"]
    assert not capsys.readouterr().err
