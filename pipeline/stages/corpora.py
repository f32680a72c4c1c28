"""A stage's corpus as a window table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sae.errors import ConfigError

from ..config import CorpusConfig
from ..corpus.readers import ReadReport, read_documents
from ..corpus.windows import WindowTable, windows
from ..run import RunContext

if TYPE_CHECKING:
    from ..llama.model import Model


def window_table(context: RunContext, model: Model, *, split: str = "", max_tokens: int = -1) -> WindowTable:
    """The windows of the settings' corpus; skipped documents are counted on the console."""
    config = context.config.corpus
    if config.kind in ("text", "jsonl") and not config.paths:
        raise ConfigError(
            f"missing required setting: corpus.paths (corpus.kind={config.kind}); give it as corpus.paths=[FILE,...]"
        )
    if split:
        config = dataclasses.replace(config, split=split)
    if config.split == "held_out":
        check_held_out(config)
    report = ReadReport()
    limit = config.max_tokens if max_tokens < 0 else max_tokens
    table = windows(
        model, read_documents(config, report), config.context_tokens, limit, packing=config.packing, report=report
    )
    if report.skipped:
        context.console.print(f"warning: {report.describe_skipped()}", style="yellow", highlight=False)
    context.add_input("corpus", config.kind, table.corpus_hash, documents=len(table.documents), rows=table.rows)
    return table


def check_held_out(config: CorpusConfig) -> None:
    """ConfigError where no document of the corpus is held out: there is nothing to evaluate on."""
    try:
        next(read_documents(dataclasses.replace(config, split="held_out", max_documents=0)))
    except ConfigError as error:
        next(read_documents(dataclasses.replace(config, split="all", max_documents=0)))  # a wrong path is its own error
        raise ConfigError(
            "no document of this corpus is held out (a tenth is, chosen by name), so nothing is left to evaluate on; "
            "give more documents: split the text into several files or into JSONL records"
        ) from error
