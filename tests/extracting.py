"""What the tests of extract share: documents, settings, and one call for a whole capture."""

from __future__ import annotations

from pipeline.config import ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.extract import extract, plan_extraction

POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
EXACT = ModelConfig(n_threads=1, kv_type="f32", flash_attn="off")
DOCUMENTS = [
    Document(name="long.py", text="def walk(tree):\n    return [node for node in tree]\n" * 9),
    Document(name="short.py", text="x = 1\n"),
    Document(name="odd.txt", text="Grüße, 世界 🙂 <|bos|> <|eos|>\r\n\ttail"),
    Document(name="more.py", text="import argparse\nparser = argparse.ArgumentParser()\n" * 5),
]


def run(model, path, *, documents=DOCUMENTS, points=POINTS, model_config=EXACT, progress=None, shard_rows=64, **config):
    settings = ExtractConfig(**{"batch_tokens": 100, "ubatch_tokens": 32, "calibration_tokens": 200, **config})
    table = windows(model, documents, 24)
    plan = plan_extraction(model, table, points, extract=settings, store=StoreConfig(shard_rows=shard_rows))
    summary = extract(
        model, table, plan, config=settings, model_config=model_config, store_path=path, progress=progress
    )
    return table, summary
