"""Documents cut into token windows that remember, row by row, where they came from: in memory.

`spool.py` does the same on disk, for corpora of any size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sae.errors import ConfigError

from .cutting import PACKINGS, Cutter
from .documents import Document, ReadReport
from .encoding import Continuation, Tokenizer
from .table import (
    COLUMN_DTYPES,
    FLAG_BOS,
    FLAG_FIRST,
    FLAG_GENERATED,
    FLAG_NOT_FINITE,
    FLAG_OUTLIER,
    FLAG_SPECIAL,
    FLAGS_ALL,
    DocumentInfo,
    WindowTable,
    table_hash,
)

__all__ = [
    "COLUMN_DTYPES",
    "FLAGS_ALL",
    "FLAG_BOS",
    "FLAG_FIRST",
    "FLAG_GENERATED",
    "FLAG_NOT_FINITE",
    "FLAG_OUTLIER",
    "FLAG_SPECIAL",
    "PACKINGS",
    "DocumentInfo",
    "Tokenizer",
    "WindowTable",
    "empty_corpus",
    "windows",
]


def windows(
    model: Tokenizer,
    documents: Iterable[Document],
    context_tokens: int,
    max_tokens: int = 0,
    *,
    packing: str = "documents",
    bos: str = "auto",
    generate: Continuation | None = None,
    report: ReadReport | None = None,
) -> WindowTable:
    """The table of `documents`, see `Cutter`. `max_tokens` > 0 limits the rows in all; BOS rows count.

    Raises ConfigError for settings that do not fit, or no rows at all.
    """
    cutter = Cutter(
        model,
        context_tokens=context_tokens,
        max_tokens=max_tokens,
        packing=packing,
        bos=bos,
        generate=generate,
        report=report,
    )
    parts = list(cutter.parts(documents))
    if not parts:
        raise empty_corpus()
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMN_DTYPES}
    for column in columns.values():
        column.flags.writeable = False
    infos = tuple(part.info for part in parts)
    return WindowTable(
        **{f"{name}_N": column for name, column in columns.items()},
        window_starts=np.append(np.flatnonzero(columns["pos"] == 0), len(columns["pos"])).astype(np.int64),
        documents=infos,
        context_tokens=context_tokens,
        corpus_hash=table_hash(context_tokens, infos, columns),
        report=report or ReadReport(kept=len(infos)),
    )


def empty_corpus() -> ConfigError:
    return ConfigError("empty corpus: no document gave a token; check corpus.paths and corpus.max_tokens")
