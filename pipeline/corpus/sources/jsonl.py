"""JSON lines, plain, .gz and .zst: a record for each line that is not blank, named `file:line`.

Plain local files in a seeded order are scanned once for the beginnings of their lines, kept as 4 bytes a
record in files below 4 GiB, else 8. All others are streamed.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..documents import Document, Record, UnusableError
from ..files import CorpusFile
from .records import IndexedRecords, Keep, RecordForm, Records, StreamedRecords, broken, shuffled
from .text import decode


def jsonl_records(files: list[CorpusFile], form: RecordForm, *, keep: Keep, seed: int) -> Records:
    if seed >= 0 and all(file.seekable for file in files):
        return _indexed(files, form, keep, seed)
    return shuffled(StreamedRecords([partial(_lines, file, form) for file in files], keep=keep, seed=seed), seed)


class _LineIndex:
    """Where the lines of a file that are not blank begin."""

    def __init__(self, file: CorpusFile) -> None:
        self.file, self.failure = file, ""
        size_bytes = Path(file.path).stat().st_size if Path(file.path).is_file() else 0
        self.offsets = array("I" if size_bytes < 1 << 32 else "Q")
        self.blank = array("Q")  # of each blank line: how many records lie before it
        try:
            with file.reading() as stream:
                self._scan(stream)
        except UnusableError as failure:
            self.failure = str(failure)

    def __len__(self) -> int:
        return 1 if self.failure else len(self.offsets)

    def _scan(self, stream: Iterator[bytes]) -> None:
        offset = 0
        for line in stream:
            if line.strip():
                self.offsets.append(offset)
            else:
                self.blank.append(len(self.offsets))
            offset += len(line)

    def name(self, index: int) -> str:
        if self.failure:
            return self.file.name
        return f"{self.file.name}:{index + 1 + bisect_right(self.blank, index)}"

    def record(self, index: int, form: RecordForm) -> Record:
        if self.failure:
            return broken(self.file.name, self.failure)
        name = self.name(index)
        return Record(name, partial(self._load, index, name, form), 0)

    def _load(self, index: int, name: str, form: RecordForm) -> Document:
        with self.file.reading() as stream:
            stream.seek(self.offsets[index])
            line = stream.readline()
        return _document(name, line, form)


def _indexed(files: list[CorpusFile], form: RecordForm, keep: Keep, seed: int) -> Records:
    indexes = [_LineIndex(file) for file in files]
    starts = np.cumsum([0, *map(len, indexes)]).tolist()

    def place(number: int) -> tuple[_LineIndex, int]:
        which = bisect_right(starts, number) - 1
        return indexes[which], number - starts[which]

    def name(number: int) -> str:
        index, at = place(number)
        return index.name(at)

    def record(number: int) -> Record:
        index, at = place(number)
        return index.record(at, form)

    return IndexedRecords(starts[-1], name, record, keep=keep, seed=seed)


def _lines(file: CorpusFile, form: RecordForm) -> Iterator[Record]:
    try:
        with file.reading() as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    name = f"{file.name}:{number}"
                    yield Record(name, partial(_document, name, line, form), len(line))
    except UnusableError as failure:
        yield broken(file.name, str(failure))


def _document(name: str, line: bytes, form: RecordForm) -> Document:
    try:
        record = json.loads(decode(line))
    except json.JSONDecodeError as error:
        raise UnusableError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise UnusableError("not JSON (nested too deep)") from None
    except ValueError:
        raise UnusableError("not JSON (a number of too many digits)") from None
    return form.document(name, record)
