"""The documents of a corpus, whatever its kind: one order, one split, one account of what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pipeline.config import CorpusConfig
from sae.errors import ConfigError

from .conditions import parse_conditions
from .documents import Document, NotMatchedError, ReadReport, UnusableError, Vocabulary
from .files import CorpusFile, expand
from .sources.datasets import datasets_records
from .sources.jsonl import jsonl_records
from .sources.parquet import parquet_records
from .sources.records import RecordForm, Records
from .sources.text import stdin_records, text_records
from .sources.tokens import token_records
from .stdlib import is_held_out, stdlib_files

__all__ = ["KINDS", "SPLITS", "Document", "DocumentStream", "ReadReport", "read_documents"]

KINDS = ("stdlib", "text", "stdin", "jsonl", "parquet", "datasets", "tokens")
WITH_FIELDS = ("jsonl", "parquet", "datasets")
SPLITS = ("train", "held_out", "all")


class DocumentStream(Iterator[Document]):
    """The documents of `config`, in the order its seed gives (below 0: as they lie, files sorted by name).

    Documents that are empty, unreadable or not UTF-8 are noted in `report` and left out; the rest is kept.
    `max_documents` counts kept ones. Tokens are limited where windows are cut. `vocabulary` (of the model)
    is needed for corpus.kind=tokens. Nothing is opened before the first document is asked for.

    Raises ConfigError for an unknown kind, split or condition, a path or glob that matches no file, a missing
    package, and for a corpus without a single usable document.
    """

    def __init__(self, config: CorpusConfig, report: ReadReport, vocabulary: Vocabulary | None) -> None:
        self.config, self.report, self.vocabulary = config, report, vocabulary
        self._records: Records | None = None
        self._documents: Iterator[Document] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Document:
        if self._documents is None:
            self._documents = self._read()
        return next(self._documents)

    def state(self) -> dict[str, Any]:
        """Where the reading stands, report included, as JSON."""
        assert self._records is not None, "nothing was read yet"
        return {"records": self._records.state(), "report": self.report.as_dict()}

    def restore(self, state: dict[str, Any]) -> bool:
        """Before the first document: go on where `state` was taken; False where the corpus has changed since."""
        self._records = open_records(self.config, self.vocabulary)
        if not self._records.restore(state["records"]):
            self._records = None
            return False
        self.report.restore(state["report"])
        return True

    def _read(self) -> Iterator[Document]:
        config, report = self.config, self.report
        if config.max_documents and report.kept >= config.max_documents:  # restored at its end
            return
        self._records = self._records or open_records(config, self.vocabulary)
        for record in self._records:
            try:
                document = record.load()
                if document.messages is None and document.token_T is None and not document.text.strip():
                    raise UnusableError("empty")
            except NotMatchedError:
                report.filtered += 1
            except UnusableError as reason:
                report.skip(record.name, str(reason))
            else:
                report.kept += 1
                yield document
                if report.kept == config.max_documents:
                    return
        if report.kept == 0:
            raise _empty(config, report)


def read_documents(
    config: CorpusConfig, report: ReadReport | None = None, vocabulary: Vocabulary | None = None
) -> DocumentStream:
    """See `DocumentStream`."""
    return DocumentStream(config, ReadReport() if report is None else report, vocabulary)


def open_records(config: CorpusConfig, vocabulary: Vocabulary | None) -> Records:
    """The records of the settings' kind and split. Raises ConfigError."""
    kind, seed = config.kind, config.seed
    if config.split not in SPLITS:
        raise ConfigError(f"corpus.split={config.split!r} is unknown; use one of {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise ConfigError(f"corpus.kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    form = RecordForm(
        text_key=config.text_key, messages_key=config.messages_key, conditions=parse_conditions(config.filter)
    )
    for key in ("filter", "messages_key"):
        if getattr(config, key) and kind not in WITH_FIELDS:
            raise ConfigError(
                f"corpus.{key} needs records with fields; use it with corpus.kind={'|'.join(WITH_FIELDS)}"
            )

    def keep(name: str) -> bool:
        return config.split == "all" or is_held_out(name) == (config.split == "held_out")

    if kind == "stdin":
        return stdin_records(keep=keep)
    if kind == "datasets":
        return datasets_records(
            config.dataset, config.dataset_config, config.dataset_split, config.paths, form, keep=keep, seed=seed
        )
    if kind == "stdlib":
        files = [CorpusFile(name=name, path=str(path)) for name, path in stdlib_files()]
    else:
        files = expand(config.paths, kind)
    if kind == "jsonl":
        return jsonl_records(files, form, keep=keep, seed=seed)
    if kind == "parquet":
        return parquet_records(files, form, keep=keep, seed=seed)
    if kind == "tokens":
        if vocabulary is None:
            raise ConfigError("corpus.kind=tokens can only be read with a model, whose ids they are")
        return token_records(files, config.token_dtype, vocabulary, keep=keep, seed=seed)
    return text_records(files, keep=keep, seed=seed)


def _empty(config: CorpusConfig, report: ReadReport) -> ConfigError:
    found = f"empty corpus: kind={config.kind} has no usable document in split {config.split!r}"
    if report.filtered:
        found += f"; {report.filtered} do not meet corpus.filter"
    if report.n_skipped:
        return ConfigError(f"{found}; {report.describe_skipped()}")
    hint = (
        ""
        if report.filtered
        else " (a tenth of all documents, by their names, is held out); give other paths or corpus.split=all"
    )
    return ConfigError(f"{found}{hint}")
