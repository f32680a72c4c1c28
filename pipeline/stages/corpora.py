"""A stage's corpus as a window table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sae.errors import ConfigError

from ..config import CorpusConfig
from ..corpus.documents import Vocabulary
from ..corpus.readers import DocumentStream, ReadReport, read_documents
from ..corpus.spool import spool_table
from ..corpus.windows import WindowTable, windows
from ..run import SPOOL_NAME, RunContext

if TYPE_CHECKING:
    from ..continuation import BatchGenerator
    from ..llama.model import Model

IN_MEMORY_ROWS = 4 << 20  # of a table that is not spooled, 110 MB
WITH_PATHS = ("text", "jsonl", "parquet", "tokens")


def window_table(
    context: RunContext, model: Model, *, split: str = "", max_tokens: int = -1, spool: bool = False
) -> WindowTable:
    """The windows of the settings' corpus; skipped documents are counted on the console.

    With `spool` the table lies on disk, in the run folder's `corpus`: for corpora of any size, and for other
    processes to open. Without, it is held in memory and cut where no stage needs more (said on the console).
    """
    config = context.config.corpus
    check_settings(config)
    if config.context_tokens > model.n_ctx_train:  # before hours of tokenising
        raise ConfigError(
            f"corpus.context_tokens={config.context_tokens} is more than the {model.n_ctx_train} the model was trained for"
        )
    if split:
        config = dataclasses.replace(config, split=split)
    if config.split == "held_out":
        check_held_out(config, model)
    report = ReadReport()
    limit = config.max_tokens if max_tokens < 0 else max_tokens
    documents = read_documents(config, report, model)
    with generator(context, model) as generate:
        options: dict[str, Any] = {"packing": config.packing, "bos": config.bos, "generate": generate, "report": report}
        if spool:
            table = _spooled(context, model, documents, limit, options)
        else:
            most = max(IN_MEMORY_ROWS, 2 * context.config.evaluate.tokens, 2 * context.config.report.tokens)
            if not limit:
                most = sampled_rows(context) or most
            table = windows(model, documents, config.context_tokens, min(limit or most, most), **options)
            if table.rows >= most - 1:
                context.console.print(f"only the first {table.rows:,} rows of the corpus are used", highlight=False)
    if table.report.skipped:
        harmless = set(table.report.reasons) == {"empty"}  # the built-in corpus has two such files
        word, style = ("note", "dim") if harmless else ("warning", "yellow")
        context.console.print(f"{word}: {table.report.describe_skipped()}", style=style, highlight=False)
    context.add_input("corpus", config.kind, table.corpus_hash, documents=len(table.documents), rows=table.rows)
    return table


def sampled_rows(context: RunContext) -> int:
    """Twice what the command takes of a table whose rows the model has to generate one by one; 0: all, or no such table."""
    config = context.config
    samples = {
        "evaluate": (config.evaluate.tokens, config.evaluate.splice_tokens),
        "report": (config.report.tokens,),
        "convert": (config.convert.probe_tokens,),
    }.get(context.command, (0,))
    return 2 * max(samples) if config.corpus.generate_tokens and all(samples) else 0


def _spooled(
    context: RunContext, model: Model, documents: DocumentStream, limit: int, options: dict[str, Any]
) -> WindowTable:
    config = documents.config
    settings = {"corpus": dataclasses.asdict(config), "vocabulary": model.id.vocab_sha256}
    if config.generate_tokens:  # then the weights and how they are run decide the table too
        run = dataclasses.asdict(context.config.model)
        settings["generator"] = {"sha256": model.id.sha256, **{k: run[k] for k in ("kv_type", "flash_attn")}}
    with context.progress("tokenising", limit) as progress:
        return spool_table(
            model, documents, config.context_tokens, limit, folder=context.folder / SPOOL_NAME, settings=settings,
            progress=lambda done, rows: progress(rows, note=f"{done:,} documents"), **options,
        )  # fmt: skip


@contextmanager
def generator(context: RunContext, model: Model) -> Iterator[BatchGenerator | None]:
    """What continues the documents, where corpus.generate_tokens asks for it."""
    from ..continuation import BatchGenerator

    config = context.config.corpus
    if not config.generate_tokens:
        yield None
        return
    with BatchGenerator(
        model,
        context_tokens=config.context_tokens,
        max_tokens=config.generate_tokens,
        temperature=config.generate_temperature,
        seed=config.seed,
        config=context.config.model,
    ) as generate:
        yield generate


def check_settings(config: CorpusConfig) -> None:
    """ConfigError for a kind whose own setting is missing."""
    missing = {
        "paths": config.kind in WITH_PATHS and not config.paths,
        "dataset": config.kind == "datasets" and not config.dataset,
    }
    if config.paths and config.kind in ("stdlib", "stdin"):
        raise ConfigError(
            f"corpus.paths is given, and corpus.kind={config.kind} reads no files; name a kind, as corpus=text"
        )
    example = {"paths": "corpus.paths=[FILE,...]", "dataset": "corpus.dataset=owner/name"}
    for key, is_missing in missing.items():
        if is_missing:
            raise ConfigError(
                f"missing required setting: corpus.{key} (corpus.kind={config.kind}); give it as {example[key]}"
            )


def check_held_out(config: CorpusConfig, vocabulary: Vocabulary | None = None) -> None:
    """ConfigError where no document of the corpus is held out: there is nothing to evaluate on.

    Ids (corpus.kind=tokens) are checked with a vocabulary only, which says where their documents end.
    """
    if config.kind == "stdin":
        raise ConfigError(
            "corpus.kind=stdin is one document that can be read once, so nothing is left to evaluate on; save it to "
            "files and use corpus=text"
        )
    if config.kind == "tokens" and vocabulary is None:
        return  # found out when the model is open
    try:
        next(read_documents(dataclasses.replace(config, split="held_out", max_documents=0), vocabulary=vocabulary))
    except ConfigError as error:
        # a wrong path is its own error
        next(read_documents(dataclasses.replace(config, split="all", max_documents=0), vocabulary=vocabulary))
        raise ConfigError(
            "no document of this corpus is held out (a tenth is, chosen by name), so nothing is left to evaluate on; "
            "give more documents: split the text into several files or into JSONL records"
        ) from error
