"""Rows that are not finite are left out of a stream, and named and counted as extract does."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

from pipeline.llama.model import Model
from pipeline.store.reader import ActivationStore
from pipeline.stream.batches import StreamBatches
from pipeline.stream.process import CaptureProcess
from sae.checkpoint import load_weights
from tests.tiny_llama import write_tiny_llama

from .conftest import OPTIONS, POINT, TEXT, ggscope, settings
from .test_train import TRAIN

SPOILED = {3: "~", 11: "ab ~ c", 12: "~" * 40, 17: "~", 20: "~", 29: "~", 31: "~"}
BATCHES = {"batch_rows": 128, "seed": 0}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model without a value for `~`, and texts of which seven hold one."""
    path = tmp_path_factory.mktemp("not_finite")
    write_tiny_llama(path / "tiny.gguf")
    with Model(path / "tiny.gguf") as model:
        (token,) = model.tokenize(b"~")
    reader = gguf.GGUFReader(path / "tiny.gguf", "r+")
    next(t for t in reader.tensors if t.name == "token_embd.weight").data[token] = np.nan
    reader.data.flush()
    for number in range(40):
        (path / f"{number:02}.txt").write_text(TEXT.format(number) * (1 + number % 4) + SPOILED.get(number, ""))
    return path


@pytest.fixture(scope="module")
def summary(poisoned):
    """What extract says of the same corpus."""
    done = ggscope("extract", *OPTIONS, "store.path=store", f"run_dir={poisoned / 'extract'}", cwd=poisoned)
    assert "rows have values that are not finite" in done.stderr
    return json.loads((poisoned / "extract" / "manifest.json").read_text())["metrics"]


def test_a_training_names_what_extract_names(poisoned, summary, tmp_path):
    done = ggscope(*TRAIN, f"run_dir={tmp_path / 'run'}", cwd=poisoned)
    (line,) = [line for line in done.stderr.splitlines() if "not finite" in line]
    assert f"warning: {summary['not_finite_rows']:,} rows have values that are not finite" in line
    spoiled = {f"{number:02}.txt" for number in SPOILED}
    named = [part.split(":")[0].strip() for part in line.partition("(")[2].split(",")[:-1]]
    assert len(named) == 5
    assert set(named) <= spoiled
    training = load_weights(tmp_path / "run" / "sae").training
    assert training["not_finite_rows"] == summary["not_finite_rows"] > 40
    assert training["statistics"]["rows"] == ActivationStore(poisoned / "store").stats(POINT).count


def test_a_block_counts_once_and_over_a_resumed_stream(poisoned, summary, tmp_path):
    with CaptureProcess(settings(poisoned), tmp_path) as capture:
        for buffer_rows in (600, 10**5):  # captured anew every epoch, and once
            stream, counts = StreamBatches(capture, buffer_rows=buffer_rows, **BATCHES), []
            for number in range(2 * capture.header.unflagged_rows // 128):
                stream.next()
                counts.append(stream.not_finite().rows)
                if number % 7 == 5:
                    state = json.loads(json.dumps(stream.state()))
                    stream = StreamBatches(capture, buffer_rows=buffer_rows, **BATCHES)
                    stream.load_state(state)
                    assert stream.not_finite().rows == counts[-1]
            assert counts == sorted(counts)
            assert counts[-1] == summary["not_finite_rows"]
            assert len(stream.not_finite().windows) == 5
        assert counts[0] == counts[-1]  # a buffer that holds all has seen all


def test_a_corpus_without_such_rows_says_nothing(capture):
    stream = StreamBatches(capture, buffer_rows=2000, **BATCHES)
    stream.next()
    assert (stream.not_finite().rows, stream.not_finite().windows) == (0, ())
