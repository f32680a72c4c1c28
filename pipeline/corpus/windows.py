"""Documents cut into token windows that remember, row by row, where they came from.

Letters: N rows, W windows. A row is one token of one window; rows of a window are consecutive, and
so are the windows of a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sae.errors import ConfigError

from .documents import Document, ReadReport

FLAG_BOS = 1
FLAG_SPECIAL = 2
FLAG_FIRST = 4  # the first row of a window, whether BOS or not
FLAG_OUTLIER = 8  # set during capture: the norm at some hook exceeds its threshold
FLAG_NOT_FINITE = 16  # set during capture: the model gave a value that is not finite at some hook; stored as 0
FLAG_GENERATED = 32  # the model's own continuation, not the document's text; marks, and leaves nothing out
FLAGS_ALL = FLAG_BOS | FLAG_SPECIAL | FLAG_FIRST | FLAG_OUTLIER | FLAG_NOT_FINITE  # rows with any of these are left out

PACKINGS = ("documents",)
ALIGN_SLACK_BYTES = 64

# The columns of a row, in their order in the store.
COLUMN_DTYPES: dict[str, str] = {
    "doc": "int32",
    "window": "int32",
    "pos": "int32",
    "token": "int32",
    "byte_offset": "int64",
    "flags": "uint8",
}


class Tokenizer(Protocol):
    """What cutting windows needs of a model (`pipeline.llama.model.Model` has it)."""

    @property
    def bos(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    def tokenize(self, data: bytes, *, parse_special: bool = False) -> np.ndarray: ...
    def piece(self, token: int) -> bytes: ...
    def is_special(self, token: int) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentInfo:
    """One document of a table: `doc` of a row is its index."""

    name: str
    bytes: int
    sha256: str
    exact_offsets: bool = True  # False: the tokenizer normalises text, byte offsets are an alignment


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowTable:
    """All rows of a corpus as flat columns, before any model ran.

    `doc_N, window_N, pos_N, token_N` int32; `byte_offset_N` int64: where the row's text starts in its
    document (BOS rows have no text, they carry the offset of the next row); `flags_N` uint8.
    `window_starts` (W + 1): rows of window w are `window_starts[w] : window_starts[w + 1]`.
    `corpus_hash`: sha256 over the columns and the documents; equal tables have equal hashes.
    """

    doc_N: np.ndarray
    window_N: np.ndarray
    pos_N: np.ndarray
    token_N: np.ndarray
    byte_offset_N: np.ndarray
    flags_N: np.ndarray
    window_starts: np.ndarray
    documents: tuple[DocumentInfo, ...]
    context_tokens: int
    corpus_hash: str
    report: ReadReport = field(default_factory=ReadReport)

    @property
    def rows(self) -> int:
        return len(self.token_N)

    @property
    def n_windows(self) -> int:
        return len(self.window_starts) - 1

    def columns(self) -> dict[str, np.ndarray]:
        """Name to column, as the store keeps them."""
        return {name: getattr(self, f"{name}_N") for name in COLUMN_DTYPES}

    def window_tokens(self, window: int) -> np.ndarray:
        """The tokens of one window, BOS included, as they go into llama_decode at positions 0, 1, ..."""
        return self.token_N[self.window_starts[window] : self.window_starts[window + 1]]


def windows(
    model: Tokenizer,
    documents: Iterable[Document],
    context_tokens: int,
    max_tokens: int = 0,
    *,
    packing: str = "documents",
    report: ReadReport | None = None,
) -> WindowTable:
    """Cut every document into windows of `context_tokens` rows, BOS included where the model adds one.

    A document is tokenised once, as a whole, with special parsing off; only its last window is shorter.
    `max_tokens` > 0 limits the rows in all (BOS rows count; the last window is cut). `report` is the one
    given to `read_documents`, kept with the table.

    Raises ConfigError for a window too short to hold a token, an unknown packing, or no rows at all.
    """
    if packing not in PACKINGS:
        raise ConfigError(f"corpus.packing={packing!r} is unknown; use one of {', '.join(PACKINGS)}")
    n_bos = int(model.add_bos and model.bos is not None)
    if context_tokens < 1 + n_bos:
        raise ConfigError(f"corpus.context_tokens={context_tokens} is too short; give at least {1 + n_bos}")
    vocabulary = _Vocabulary(model)
    parts: list[dict[str, np.ndarray]] = []
    infos: list[DocumentInfo] = []
    rows = first_window = 0
    for document in documents:
        room = max_tokens - rows if max_tokens > 0 else None
        data = document.text.encode("utf-8")
        part, exact = _cut(vocabulary, data, context_tokens, n_bos, room)
        n_rows = len(part["token"])
        if n_rows:
            part["window"] += first_window
            part["doc"] = np.full(n_rows, len(infos), np.int32)
            first_window = int(part["window"][-1]) + 1
            parts.append(part)
            infos.append(
                DocumentInfo(
                    name=document.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), exact_offsets=exact
                )
            )
            rows += n_rows
        elif report is not None and (room is None or room > n_bos):
            report.skip(document.name, "no tokens")
        if max_tokens > 0 and max_tokens - rows <= n_bos:
            break
    if not rows:
        raise ConfigError("empty corpus: no document gave a token; check corpus.paths and corpus.max_tokens")
    return _table(parts, infos, context_tokens, report or ReadReport(kept=len(infos)))


class _Vocabulary:
    """Pieces and special marks of the tokens met so far; asking llama.cpp for each row would be slow."""

    def __init__(self, model: Tokenizer) -> None:
        self.model = model
        self.pieces: dict[int, bytes] = {}
        self.special: set[int] = set()

    def learn(self, token_N: np.ndarray) -> None:
        for token in np.unique(token_N).tolist():
            if token not in self.pieces:
                self.pieces[token] = self.model.piece(token)
                if self.model.is_special(token):
                    self.special.add(token)

    def special_mask(self, token_N: np.ndarray) -> np.ndarray:
        return np.isin(token_N, list(self.special)) if self.special else np.zeros(len(token_N), bool)


def _cut(
    vocabulary: _Vocabulary, data: bytes, context: int, n_bos: int, room: int | None
) -> tuple[dict[str, np.ndarray], bool]:
    """Columns of one document (`window` counted from 0, `doc` not set), and whether offsets are exact."""
    model = vocabulary.model
    token_n = np.asarray(model.tokenize(data, parse_special=False), np.int32)
    vocabulary.learn(token_n)
    offset_n, exact = _byte_offsets(data, [vocabulary.pieces[t] for t in token_n.tolist()])
    body = context - n_bos
    n_rows = len(token_n) + n_bos * -(-len(token_n) // body)
    row_N = np.arange(n_rows, dtype=np.int32)
    pos_N = row_N % context  # every window but the last has exactly `context` rows
    text_N = pos_N >= n_bos
    token_N = np.full(n_rows, model.bos if n_bos else 0, np.int32)
    token_N[text_N] = token_n
    byte_offset_N = np.zeros(n_rows, np.int64)
    byte_offset_N[text_N] = offset_n
    if n_bos and n_rows:
        byte_offset_N[::context] = byte_offset_N[1::context]
    flags_N = np.where(pos_N == 0, FLAG_FIRST, 0).astype(np.uint8)
    flags_N[vocabulary.special_mask(token_N)] |= FLAG_SPECIAL
    if n_bos:
        flags_N[~text_N] |= FLAG_BOS | FLAG_SPECIAL
    columns = {
        "window": row_N // context,
        "pos": pos_N,
        "token": token_N,
        "byte_offset": byte_offset_N,
        "flags": flags_N,
    }
    if room is not None and n_rows > room:
        keep = room - int(n_bos and room % context == 1)  # a window of nothing but BOS is no window
        columns = {name: column[: max(keep, 0)] for name, column in columns.items()}
    return columns, exact


def _byte_offsets(data: bytes, pieces: list[bytes]) -> tuple[np.ndarray, bool]:
    """Where each piece starts in `data`, and whether that is exact.

    Byte-level tokenizers give the text back, SentencePiece ones with one space put before it. Others
    normalise: their pieces are searched for one after another, a piece not found starts where the last
    one ended.
    """
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    start_n = np.cumsum(lengths) - lengths
    joined = b"".join(pieces)
    if joined == data:
        return start_n, True
    if joined == b" " + data:
        return np.maximum(start_n - 1, 0), True
    cursor = 0
    for index, piece in enumerate(pieces):
        wanted = piece.lstrip() or piece
        found = data.find(wanted, cursor, cursor + len(wanted) + ALIGN_SLACK_BYTES) if wanted else -1
        start_n[index] = found if found >= 0 else cursor
        if found >= 0:
            cursor = found + len(wanted)
    return start_n, False


def _table(
    parts: list[dict[str, np.ndarray]], infos: list[DocumentInfo], context: int, report: ReadReport
) -> WindowTable:
    columns = {
        name: np.ascontiguousarray(np.concatenate([part[name] for part in parts]), dtype)
        for name, dtype in COLUMN_DTYPES.items()
    }
    digest = hashlib.sha256(f"{context}\n".encode())
    for info in infos:
        digest.update(f"{info.name}\0{info.bytes}\0{info.sha256}\n".encode())
    for name, column in columns.items():
        digest.update(name.encode())
        digest.update(column.data)
        column.flags.writeable = False
    starts = np.append(np.flatnonzero(columns["pos"] == 0), len(columns["pos"])).astype(np.int64)
    return WindowTable(
        **{f"{name}_N": column for name, column in columns.items()},
        window_starts=starts,
        documents=tuple(infos),
        context_tokens=context,
        corpus_hash=digest.hexdigest(),
        report=report,
    )
