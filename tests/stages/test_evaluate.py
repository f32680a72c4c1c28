"""Held-out documents that were trained on are counted, whatever the size of the corpus."""

from __future__ import annotations

import io
import json
import tracemalloc

import numpy as np
import pytest
from rich.console import Console

from pipeline.config import Config, EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.llama.model import Model
from pipeline.run import RunContext
from pipeline.stages.evaluate_extras import warn_same_start
from pipeline.stages.evaluate_rows import documents_of_training, say_measured, seen_in_training
from pipeline.store.schema import DOCS_FILE
from tests.sae.toy import random_weights
from tests.tiny_llama import write_tiny_llama

TRAINED = 100_000


def test_documents_are_counted_one_after_another_and_not_held(tmp_path, capsys):
    write_tiny_llama(tmp_path / "tiny.gguf")
    with Model(tmp_path / "tiny.gguf") as model:
        table = windows(model, [Document(name=f"{i}.py", text=f"x = {i}\n") for i in range(5)], 32)
    shared = {100: table.documents[1].sha256, TRAINED - 1: table.documents[4].sha256, 7: table.documents[1].sha256}
    documents = ({"name": f"{i}", "sha256": shared.get(i, f"{i:064}")} for i in range(TRAINED))
    tracemalloc.start()
    try:
        seen = seen_in_training(RunContext(command="evaluate", folder=tmp_path, config=Config()), documents, table)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 2
    assert "2 of 5 evaluation documents were trained on" in capsys.readouterr().err
    assert peak < 10 * TRAINED  # bytes: a hash alone is more


def test_a_streams_documents_are_none_where_its_run_is_not_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = random_weights(np.random.default_rng(0), d=8, latents=16, k=2, training={"id": "this"})
    assert documents_of_training(weights) is None
    run = tmp_path / "runs" / "train" / "one"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps({"command": "train", "metrics": {"sae_id": "this"}}))
    assert documents_of_training(weights) is None
    (run / DOCS_FILE).write_text('{"name": "a"}\n{"name": "b"}\n')
    assert [document["name"] for document in documents_of_training(weights)] == ["a", "b"]


@pytest.mark.parametrize(
    ("tokens", "spliced", "said"),
    [(0, 0, "100 of 100 held-out tokens (evaluate.tokens), CE on 100"), (15, 10_000, "20 of 100 held-out tokens (evaluate.tokens), CE on 100")],
)  # fmt: skip
def test_what_will_be_measured_is_said_in_whole_windows_and_0_is_all(tokens, spliced, said, tmp_path):
    write_tiny_llama(tmp_path / "tiny.gguf")
    with Model(tmp_path / "tiny.gguf") as model:
        table = windows(model, [Document(name="a.py", text="x = 1\n" * 200)], 10, max_tokens=100)
    heard = io.StringIO()
    config = Config(evaluate=EvaluateConfig(tokens=tokens, splice_tokens=spliced))
    context = RunContext(command="evaluate", folder=tmp_path, config=config, console=Console(file=heard, width=400))
    assert say_measured(context, table) == int(said.split()[0])
    assert said in heard.getvalue()


def test_two_saes_of_one_seed_are_said_to_share_their_start(tmp_path, capsys):
    context = RunContext(command="evaluate", folder=tmp_path, config=Config())
    rng = np.random.default_rng(0)
    one, same, other, unknown = (
        random_weights(rng, d=8, latents=20, k=2, training=training)
        for training in ({"config": {"seed": 3}}, {"config": {"seed": 3}}, {"config": {"seed": 4}}, {})
    )
    for against in (other, unknown):
        warn_same_start(context, one, against)
    warn_same_start(context, unknown, unknown)
    assert capsys.readouterr().err == ""
    warn_same_start(context, one, same)
    assert "started from the same weights (sae.seed=3)" in " ".join(capsys.readouterr().err.split())
