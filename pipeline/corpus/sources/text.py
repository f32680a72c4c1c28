"""Whole files and standard input: one document each."""

from __future__ import annotations

import sys
from functools import partial

from ..documents import Document, Record, UnusableError
from ..files import CorpusFile
from .records import IndexedRecords, Keep, Records


def text_records(files: list[CorpusFile], *, keep: Keep, seed: int) -> Records:
    def record(index: int) -> Record:
        return Record(files[index].name, partial(_load, files[index]), 0)

    return IndexedRecords(len(files), lambda index: files[index].name, record, keep=keep, seed=seed)


def stdin_records(*, keep: Keep) -> Records:
    def load() -> Document:
        return Document(name="stdin", text=decode(sys.stdin.buffer.read()))

    return IndexedRecords(1, lambda _: "stdin", lambda _: Record("stdin", load, 0), keep=keep, seed=-1)


def decode(data: bytes) -> str:
    """Bytes as text, newlines as they are. Raises UnusableError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8") from None


def _load(file: CorpusFile) -> Document:
    with file.reading() as stream:
        data = stream.read()
    return Document(name=file.name, text=decode(data))
