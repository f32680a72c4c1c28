"""A tiny model's store, made by the command line, that several tests train on."""

from __future__ import annotations

import pytest

from tests.cli.conftest import ggscope
from tests.tiny_llama import write_tiny_llama

TEXT = "def walk(tree):\n    return [node for node in tree if node.kind]\n\n\nclass Node:\n    kind = 'x{}'\n"
EXTRACT = [
    "model.path=tiny.gguf", "hook.points=[blocks.2.hook_resid_post]", "corpus=text", "corpus.paths=[*.txt]",
    "corpus.split=all", "corpus.context_tokens=24", "extract.calibration_tokens=400", "model.n_threads=1",
]  # fmt: skip
TRAIN = [
    "sae.num_latents=96", "sae.k=4", "trainer.batch_tokens=128", "trainer.tokens=7680", "trainer.warmup_steps=5",
    "trainer.dead_after_tokens=2000", "trainer.n_threads=1", "trainer.log_steps=10", "trainer.encoder_dtype=float32",
    "trainer.auxk_dtype=float32",
]  # fmt: skip


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A folder with a finished extract run."""
    folder = tmp_path_factory.mktemp("training")
    write_tiny_llama(folder / "tiny.gguf")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(TEXT.format(i * j) for j in range(20)))
    ggscope("extract", *EXTRACT, cwd=folder)
    return folder
