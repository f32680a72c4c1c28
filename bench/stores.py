"""Stores of random rows to be read back, and taking files out of the page cache. Without llama.cpp, so torch may be near."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpus.windows import COLUMN_DTYPES, DocumentInfo
from pipeline.store.schema import HookInfo, StoreMeta
from pipeline.store.writer import StoreWriter


def write_store(path: str, rows: int, width: int, shard_rows: int) -> dict[str, Any]:
    """A store of random rows, to be read back."""
    meta = StoreMeta(
        rows=rows, shard_rows=shard_rows, chunk_rows=256, columns=dict(COLUMN_DTYPES), corpus_hash="random",
        hooks=(HookInfo(name="blocks.0.hook_resid_post", width=width, dtype="float16", outlier_threshold=1e9),),
        config_hash="random", model={},
    )  # fmt: skip
    with StoreWriter(Path(path), meta, [DocumentInfo(name="random", bytes=rows, sha256="0" * 64)]) as writer:
        rng = np.random.default_rng(0)
        pattern_SD = rng.standard_normal((shard_rows, width), np.float32).astype(np.float16)
        for shard in writer.missing():
            start, stop = meta.shard_range(shard)
            columns = {name: np.zeros(stop - start, dtype) for name, dtype in meta.columns.items()}
            writer.commit_shard(shard, {meta.hooks[0].name: pattern_SD[: stop - start]}, columns)
    return {}


def drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
