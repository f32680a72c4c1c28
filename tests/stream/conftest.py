"""A tiny model, a corpus and its store, made by the command line: what a stream is compared with. No llama.cpp here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.config import Config, CorpusConfig, ExtractConfig, HookConfig, ModelConfig, TrainerConfig
from pipeline.store.reader import ActivationStore
from pipeline.stream.process import CaptureProcess
from tests.tiny_llama import write_tiny_llama

POINT = "blocks.2.hook_resid_post"
TEXT = "def walk(tree):\n    return [node for node in tree if node.kind]\n\n\nclass Node:\n    kind = 'x{}'\n"
OPTIONS = [
    "model.path=tiny.gguf", f"hook.points=[{POINT}]", "corpus=text", "corpus.paths=[*.txt]", "corpus.split=all",
    "corpus.context_tokens=24", "extract.batch_tokens=100", "extract.calibration_tokens=400",
    "extract.outlier_factor=1.15", "model.n_threads=1",
]  # fmt: skip


def settings(folder, queue_batches=3, **corpus):
    """OPTIONS as the process of a training has them."""
    texts = {"kind": "text", "paths": [str(folder / "*.txt")], "split": "all", "context_tokens": 24, **corpus}
    return Config(
        model=ModelConfig(path=str(folder / "tiny.gguf"), n_threads=1),
        hook=HookConfig(points=[POINT]),
        corpus=CorpusConfig(**texts),
        extract=ExtractConfig(batch_tokens=100, calibration_tokens=400, outlier_factor=1.15),
        trainer=TrainerConfig(queue_batches=queue_batches),
    )


def ggscope(*args, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *args], cwd=cwd, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == code, f"{args}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    write_tiny_llama(path / "tiny.gguf")
    for number in range(40):
        (path / f"{number:02}.txt").write_text(TEXT.format(number) * (1 + number % 4))
    return path


@pytest.fixture(scope="session")
def store(folder):
    ggscope("extract", *OPTIONS, "store.path=store", "store.shard_rows=640", cwd=folder)
    return ActivationStore(folder / "store")


@pytest.fixture(scope="session")
def capture(folder, tmp_path_factory):
    with CaptureProcess(settings(folder), tmp_path_factory.mktemp("run")) as process:
        yield process
