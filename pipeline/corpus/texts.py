"""The text of rows and documents, from their columns alone. Letter: N rows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .table import FLAG_BOS, FLAG_GENERATED, DocumentInfo

Piece = Callable[[int], bytes]


def row_texts(
    columns: Mapping[str, Any], documents: Sequence[DocumentInfo], start: int, stop: int, piece: Piece
) -> list[bytes]:
    """The bytes of its document that each of the rows `start : stop` stands for.

    `columns` as a table or a store has them. BOS rows and separators stand for none, generated rows for the
    bytes the model said. Joined over all rows of a document they are its text (and what was generated after
    it), also where the tokenizer puts a space before it. Where offsets are not exact they are the pieces.
    """
    after = min(stop + 2, len(columns["doc"]))  # the next row with text, a BOS row before it or not
    doc_N, token_N, offset_N, flags_N = (
        columns[name][start:after].tolist() for name in ("doc", "token", "byte_offset", "flags")
    )
    texts = []
    for at in range(stop - start):
        if flags_N[at] & FLAG_BOS:
            texts.append(b"")
            continue
        whole, info = piece(token_N[at]), documents[doc_N[at]]
        following = next((i for i in range(at + 1, len(doc_N)) if not flags_N[i] & FLAG_BOS), None)
        end = offset_N[following] if following is not None and doc_N[following] == doc_N[at] else info.bytes
        texts.append(_text(whole, info, offset_N[at], end, bool(flags_N[at] & FLAG_GENERATED)))
    return texts


def _text(piece: bytes, info: DocumentInfo, offset: int, end: int, generated: bool) -> bytes:
    if generated:
        return piece
    if offset >= info.bytes:
        return b""
    length = min(end, info.bytes) - offset
    return piece[len(piece) - length :] if info.exact_offsets and 0 <= length < len(piece) else piece


def rows_of(columns: Mapping[str, Any], document: int) -> tuple[int, int]:
    """First and past-the-last row of a document."""
    return bisect_left(columns["doc"], document), bisect_right(columns["doc"], document)


def document_text(columns: Mapping[str, Any], documents: Sequence[DocumentInfo], document: int, piece: Piece) -> bytes:
    """The text of the rows of a document, see `row_texts`."""
    start, stop = rows_of(columns, document)
    return b"".join(row_texts(columns, documents, start, stop, piece))
