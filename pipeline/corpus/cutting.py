"""Tokens cut into windows, document after document: the one way to a table, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError

from .documents import Document, ReadReport, UnusableError
from .encoding import Continuation, Encoded, Encoder, Tokenizer, bos_of
from .table import COLUMN_DTYPES, FLAG_BOS, FLAG_FIRST, FLAG_SPECIAL, DocumentInfo

PACKINGS = ("documents", "concat")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The rows of one document. `settled`: every document taken so far has given its rows."""

    columns: dict[str, np.ndarray]
    info: DocumentInfo
    settled: bool


class Packer:
    """Puts tokens into windows of `context_tokens` rows, each starting with `bos` where there is one.

    `documents`: every document starts a window, its last window is shorter. `concat`: documents follow each
    other, only the last window of all is shorter. `max_tokens` > 0 limits the rows; a window of nothing but
    BOS is no window.
    """

    def __init__(self, *, context_tokens: int, bos: int | None, packing: str, max_tokens: int) -> None:
        if packing not in PACKINGS:
            raise ConfigError(f"corpus.packing={packing!r} is unknown; use one of {', '.join(PACKINGS)}")
        self.n_bos = int(bos is not None)
        if context_tokens < 1 + self.n_bos:
            raise ConfigError(f"corpus.context_tokens={context_tokens} is too short; give at least {1 + self.n_bos}")
        self.context_tokens, self.bos, self.max_tokens = context_tokens, bos, max_tokens
        self.joins = packing == "concat"
        self.rows = self.windows = self.documents = 0
        self.filled = 0  # rows of the window that is still open

    @property
    def full(self) -> bool:
        """No room for another token."""
        needed = 1 + (self.n_bos if not (self.joins and self.filled) else 0)
        return 0 < self.max_tokens < self.rows + needed

    def add(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """The columns of the next document."""
        count, body = len(encoded.token_T), self.context_tokens - self.n_bos
        before = max(self.filled - self.n_bos, 0) if self.joins else 0  # text tokens in the open window
        slot_T = before + np.arange(count)
        starts_T = slot_T % body == 0
        row_T = np.arange(count) + self.n_bos * np.cumsum(starts_T)
        n_rows = count + self.n_bos * int(starts_T.sum())
        source_N = np.zeros(n_rows, np.int64)  # the token of each row; a BOS row stands before its window's first
        source_N[row_T] = np.arange(count)
        bos_n = row_T[starts_T] - 1 if self.n_bos else np.zeros(0, np.int64)
        source_N[bos_n] = np.flatnonzero(starts_T)[: len(bos_n)]
        columns = {
            "doc": np.full(n_rows, self.documents),
            "window": (self.windows - (before > 0) + slot_T // body)[source_N],
            "pos": (self.n_bos + slot_T % body)[source_N],
            "token": encoded.token_T[source_N],
            "byte_offset": encoded.byte_offset_T[source_N],
            "flags": encoded.flags_T[source_N],
        }
        columns["pos"][bos_n] = 0
        columns["flags"][bos_n] = FLAG_BOS | FLAG_SPECIAL
        columns["flags"][columns["pos"] == 0] |= FLAG_FIRST
        if self.bos is not None:
            columns["token"][bos_n] = self.bos
        return self._counted({name: columns[name].astype(dtype) for name, dtype in COLUMN_DTYPES.items()})

    def _counted(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        n_rows = len(columns["pos"])
        if self.max_tokens > 0 and n_rows > self.max_tokens - self.rows:
            n_rows = self.max_tokens - self.rows
            n_rows -= int(n_rows > 0 and bool(columns["flags"][n_rows - 1] & FLAG_BOS))
            columns = {name: column[:n_rows] for name, column in columns.items()}
        if n_rows:
            self.rows += n_rows
            self.documents += 1
            self.windows = int(columns["window"][-1]) + 1
            self.filled = (int(columns["pos"][-1]) + 1) % self.context_tokens
        return columns

    def state(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("rows", "windows", "documents", "filled")}

    def restore(self, state: dict[str, Any]) -> None:
        for key in self.state():
            setattr(self, key, state[key])


class Cutter:
    """Documents to `Part`s.

    A document is tokenised once, as a whole, with special parsing off. `packing=concat` puts the model's EOS
    after each, where it has one. With `generate` a document is a prompt: cut to the end of it that leaves room
    in one window, and followed by what the model says. `report` is the one given to `read_documents`.

    Raises ConfigError for a window too short to hold a token, and an unknown packing or BOS policy.
    """

    def __init__(
        self,
        model: Tokenizer,
        *,
        context_tokens: int,
        max_tokens: int = 0,
        packing: str = "documents",
        bos: str = "auto",
        generate: Continuation | None = None,
        report: ReadReport | None = None,
    ) -> None:
        first = bos_of(model, bos)
        self.packer = Packer(context_tokens=context_tokens, bos=first, packing=packing, max_tokens=max_tokens)
        self.generate, self.report = generate, report
        self.encoder = Encoder(
            model, bos=first, separator=model.eos if self.packer.joins else None, add_assistant=generate is not None
        )
        self.prompt_tokens = 0
        if generate is not None:
            self.prompt_tokens = context_tokens - self.packer.n_bos - generate.max_tokens
            if packing != "documents":
                raise ConfigError(
                    "corpus.generate_tokens needs corpus.packing=documents: each prompt is its own window"
                )
            if self.prompt_tokens < 1:
                raise ConfigError(
                    f"corpus.generate_tokens={generate.max_tokens} leaves no room for a prompt in a window of "
                    f"corpus.context_tokens={context_tokens}; give a longer window"
                )

    def parts(self, documents: Iterable[Document]) -> Iterator[Part]:
        """The rows, document after document, until `max_tokens` is reached; no document is read past that."""
        for encoded, settled in self._encoded(documents):
            columns = self.packer.add(encoded)
            if len(columns["token"]):
                yield Part(columns=columns, info=encoded.info, settled=settled)
            if self.packer.full:
                return

    def _encoded(self, documents: Iterable[Document]) -> Iterator[tuple[Encoded, bool]]:
        usable = self._usable(documents)
        if self.generate is None:
            yield from ((encoded, True) for encoded in usable)
            return
        for prompts in _batches(usable, self.generate.n_parallel):
            cut = [prompt.tail(self.prompt_tokens) for prompt in prompts]
            found = self.encoder.continued(cut, self.generate, self.packer.documents)
            yield from ((encoded, index + 1 == len(found)) for index, encoded in enumerate(found))

    def _usable(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        if self.packer.full:
            return
        for document in documents:
            try:
                encoded = self.encoder.encode(document)
            except UnusableError as reason:
                if self.report is not None:
                    self.report.skip(document.name, str(reason))
                continue
            yield encoded


def _batches(items: Iterable[Encoded], size: int) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
