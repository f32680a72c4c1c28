"""`ggscope run` on a tiny model: all stages, where the settings put them."""

from __future__ import annotations

import json

from pipeline.store.reader import ActivationStore
from tests.tiny_llama import write_tiny_llama

from .conftest import ggscope

TINY = [
    "model.path=tiny.gguf", "hook.points=[blocks.1.hook_resid_post]", "corpus=jsonl", "corpus.paths=[d.jsonl]",
    "corpus.context_tokens=32", "sae.num_latents=32", "sae.k=4", "trainer.tokens=2048", "trainer.batch_tokens=256",
    "trainer.buffer_rows=2048", "evaluate.tokens=300", "evaluate.splice_tokens=100", "report.tokens=300",
    "report.top_latents=2", "extract.calibration_tokens=256", "model.n_threads=1", "trainer.n_threads=1",
]  # fmt: skip


def test_store_path_is_where_the_store_of_a_run_lies(tmp_path):
    write_tiny_llama(tmp_path / "tiny.gguf")
    rows = [{"text": f"def f{i}(a, b):\n    return {i} * (a + b)\n\n" * (3 + i % 4)} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ggscope("run", *TINY, "store.path=elsewhere/store", "run_dir=out", cwd=tmp_path)
    store = ActivationStore(tmp_path / "elsewhere" / "store")
    assert store.complete
    assert not (tmp_path / "out" / "extract" / "activations.zarr").exists()
    for stage in ("train", "evaluate"):
        inputs = json.loads((tmp_path / "out" / stage / "manifest.json").read_text())["inputs"]
        assert inputs["store"]["path"].endswith("elsewhere/store"), stage
    assert ActivationStore(tmp_path / "out" / "random" / "extract" / "activations.zarr").complete
    evaluation = json.loads((tmp_path / "out" / "evaluate" / "evaluation.json").read_text())
    assert evaluation["documents_trained_on"] == 0
    assert evaluation["baselines"]["random_model"]["fvu"] is not None
    assert (tmp_path / "out" / "report" / "report.html").is_file()
