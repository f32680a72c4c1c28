"""The window table: all rows of a corpus, before any model ran.

Letters: N rows, W windows. A row is one token of one window; rows of a window are consecutive, and
so are the rows of a document. With packing=documents a window lies inside one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .documents import ReadReport

if TYPE_CHECKING:
    from .disk import DiskColumn

FLAG_BOS = 1
FLAG_SPECIAL = 2
FLAG_FIRST = 4  # the first row of a window, whether BOS or not
FLAG_OUTLIER = 8  # set during capture: the norm at some hook exceeds its threshold
FLAG_NOT_FINITE = 16  # set during capture: the model gave a value that is not finite at some hook; stored as 0
FLAG_GENERATED = 32  # the model's own continuation, not the document's text; marks, and leaves nothing out
FLAGS_ALL = FLAG_BOS | FLAG_SPECIAL | FLAG_FIRST | FLAG_OUTLIER | FLAG_NOT_FINITE  # rows with any of these are left out

# The columns of a row, in their order in the store.
COLUMN_DTYPES: dict[str, str] = {
    "doc": "int32",
    "window": "int32",
    "pos": "int32",
    "token": "int32",
    "byte_offset": "int64",
    "flags": "uint8",
}
HASH_ROWS = 1 << 16

Column: TypeAlias = "np.ndarray | DiskColumn"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentInfo:
    """One document of a table: `doc` of a row is its index.

    `bytes` and `sha256` are those of its text: what the file holds, the messages in the model's template
    (`form` chat), or the pieces of its ids (`form` tokens). What the model generated is not part of it.
    """

    name: str
    bytes: int
    sha256: str
    exact_offsets: bool = True  # False: the tokenizer normalises text, byte offsets are an alignment
    form: str = "text"  # text | chat | tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowTable:
    """All rows of a corpus as flat columns, in memory or on disk.

    `doc_N, window_N, pos_N, token_N` int32; `byte_offset_N` int64: where the row's text starts in its
    document (BOS rows have no text, they carry the offset of the next row; separators and generated rows lie
    past its end); `flags_N` uint8. `window_starts` (W + 1): rows of window w are
    `window_starts[w] : window_starts[w + 1]`. `corpus_hash`: sha256 over the columns and the documents; equal
    tables have equal hashes.

    A column on disk (`DiskColumn`) is read by index, slice or index array; `np.asarray` reads all of it.
    """

    doc_N: Column
    window_N: Column
    pos_N: Column
    token_N: Column
    byte_offset_N: Column
    flags_N: Column
    window_starts: Column
    documents: Sequence[DocumentInfo]
    context_tokens: int
    corpus_hash: str
    report: ReadReport = field(default_factory=ReadReport)

    @property
    def rows(self) -> int:
        return len(self.token_N)

    @property
    def n_windows(self) -> int:
        return len(self.window_starts) - 1

    def columns(self) -> dict[str, Column]:
        """Name to column, as the store keeps them."""
        return {name: getattr(self, f"{name}_N") for name in COLUMN_DTYPES}

    def window_tokens(self, window: int) -> np.ndarray:
        """The tokens of one window, BOS included, as they go into llama_decode at positions 0, 1, ..."""
        return self.token_N[self.window_starts[window] : self.window_starts[window + 1]]


def table_hash(context_tokens: int, documents: Iterable[DocumentInfo], columns: Mapping[str, Any]) -> str:
    """sha256 over window length, documents and columns, which are read in slices."""
    digest = hashlib.sha256(f"{context_tokens}\n".encode())
    for info in documents:
        digest.update(f"{info.name}\0{info.bytes}\0{info.sha256}\n".encode())
    for name in COLUMN_DTYPES:
        digest.update(name.encode())
        for part in slices(columns[name]):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def slices(column: Any, rows: int = HASH_ROWS) -> Iterator[np.ndarray]:
    """A column part by part."""
    for start in range(0, len(column), rows):
        yield column[start : start + rows]
