"""A stage's corpus as a window table."""

from __future__ import annotations

import dataclasses

from sae.errors import ConfigError

from ..corpus.readers import ReadReport, read_documents
from ..corpus.windows import WindowTable, windows
from ..llama.model import Model
from ..run import RunContext


def window_table(context: RunContext, model: Model, *, split: str = "", max_tokens: int = -1) -> WindowTable:
    """The windows of the settings' corpus; skipped documents are counted on the console."""
    config = context.config.corpus
    if config.kind in ("text", "jsonl") and not config.paths:
        raise ConfigError(
            f"missing required setting: corpus.paths (corpus.kind={config.kind}); give it as corpus.paths=[FILE,...]"
        )
    if split:
        config = dataclasses.replace(config, split=split)
    report = ReadReport()
    limit = config.max_tokens if max_tokens < 0 else max_tokens
    table = windows(
        model, read_documents(config, report), config.context_tokens, limit, packing=config.packing, report=report
    )
    if report.skipped:
        context.console.print(f"warning: {report.describe_skipped()}", style="yellow", highlight=False)
    context.add_input("corpus", config.kind, table.corpus_hash, documents=len(table.documents), rows=table.rows)
    return table
