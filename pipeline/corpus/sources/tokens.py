"""Flat files of token ids. A document ends at the model's EOS, which is not part of it, or with the file.

A document is named `file:first`, the place of its first token, and longer ones are read as several of at
most 1,048,576 tokens, so that no file has to fit in memory. 16 bytes a document are held.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from functools import partial

import numpy as np

from sae.errors import ConfigError, FormatError

from ..documents import Document, Record, UnusableError, Vocabulary
from ..files import CorpusFile
from .records import IndexedRecords, Keep, Records

TOKEN_DTYPES = ("uint16", "uint32", "int32")
MOST_TOKENS = 1 << 20  # of one document
SCAN_TOKENS = 1 << 20


def token_records(files: list[CorpusFile], dtype: str, vocabulary: Vocabulary, *, keep: Keep, seed: int) -> Records:
    """Raises ConfigError for an unknown dtype, FormatError for a file that is no array of this vocabulary's ids."""
    if dtype not in TOKEN_DTYPES:
        raise ConfigError(f"corpus.token_dtype={dtype!r} is unknown; use one of {', '.join(TOKEN_DTYPES)}")
    spans = [_Spans(file, np.dtype(dtype).newbyteorder("<"), vocabulary) for file in files]
    starts = np.cumsum([0, *(len(span.first) for span in spans)]).tolist()

    def place(number: int) -> tuple[_Spans, int]:
        which = bisect_right(starts, number) - 1
        return spans[which], number - starts[which]

    def name(number: int) -> str:
        span, at = place(number)
        return f"{span.file.name}:{span.first[at]}"

    def record(number: int) -> Record:
        span, at = place(number)
        return Record(name(number), partial(span.load, at, name(number)), 0)

    return IndexedRecords(starts[-1], name, record, keep=keep, seed=seed)


class _Spans:
    """The documents of one file: first token and number of tokens."""

    def __init__(self, file: CorpusFile, dtype: np.dtype, vocabulary: Vocabulary) -> None:
        self.file, self.dtype, self.vocabulary = file, dtype, vocabulary
        self.first, self.count = array("Q"), array("I")
        if not file.path.endswith((".gz", ".zst")):
            self._scan()
        else:
            raise ConfigError(f"{file.name}: corpus.kind=tokens reads plain files; decompress it first")

    def load(self, index: int, name: str) -> Document:
        with self.file.reading() as stream:
            stream.seek(self.first[index] * self.dtype.itemsize)
            data = stream.read(self.count[index] * self.dtype.itemsize)
        token_T = np.frombuffer(data, self.dtype).astype(np.int32)
        if len(token_T) != self.count[index]:
            raise UnusableError("unreadable (the file became shorter)")
        return Document(name=name, token_T=token_T)

    def _scan(self) -> None:
        """One pass over the file: every id is checked, every EOS noted."""
        start = at = 0
        try:
            with self.file.reading() as stream:
                while data := stream.read(SCAN_TOKENS * self.dtype.itemsize):
                    token_T = self._checked(data, at)
                    eos = self.vocabulary.eos
                    ends = np.flatnonzero(token_T == eos) + at if eos is not None else []
                    for end in map(int, ends):
                        self._add(start, end)
                        start = end + 1
                    at += len(token_T)
        except UnusableError as error:
            raise FormatError(f"{self.file.name}: {error}") from None
        self._add(start, at)

    def _checked(self, data: bytes, at: int) -> np.ndarray:
        if len(data) % self.dtype.itemsize:
            raise FormatError(
                f"{self.file.name} is no array of {self.dtype.name}: its size is no multiple of {self.dtype.itemsize}; "
                f"check corpus.token_dtype"
            )
        token_T = np.frombuffer(data, self.dtype)
        outside = np.flatnonzero((token_T < 0) | (token_T >= self.vocabulary.n_vocab))
        if len(outside):
            place = int(outside[0])
            raise FormatError(
                f"{self.file.name}: token {at + place} is {int(token_T[place])}, the model's vocabulary has "
                f"{self.vocabulary.n_vocab}; check corpus.token_dtype, and that the file is of this model's tokenizer"
            )
        return token_T

    def _add(self, start: int, stop: int) -> None:
        for first in range(start, stop, MOST_TOKENS):
            self.first.append(first)
            self.count.append(min(MOST_TOKENS, stop - first))
