"""Documents to tokens that know which bytes they are of. Letter: T tokens of one document."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sae.errors import ConfigError

from ..chat import MessagesRefusedError
from .documents import Document, UnusableError
from .table import FLAG_GENERATED, FLAG_SPECIAL, DocumentInfo

BOS_POLICIES = ("auto", "always", "never")
ALIGN_SLACK_BYTES = 64


class Tokenizer(Protocol):
    """What cutting windows needs of a model (`pipeline.llama.model.Model` has it)."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    def tokenize(self, data: bytes, *, parse_special: bool = False) -> np.ndarray: ...
    def piece(self, token: int) -> bytes: ...
    def is_special(self, token: int) -> bool: ...
    def chat(self, messages: list[dict[str, str]], *, add_assistant: bool = True) -> str: ...


class Continuation(Protocol):
    """The model's own text after prompts (`pipeline.continuation.BatchGenerator`)."""

    @property
    def n_parallel(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...

    def __call__(self, prompts: Sequence[np.ndarray], first: int) -> list[np.ndarray]:
        """At most `max_tokens` ids after each of at most `n_parallel` prompts; `first`: number of the first of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A document's tokens (T) int32, the byte of its text each starts at (T) int64, and flags (T) uint8."""

    info: DocumentInfo
    token_T: np.ndarray
    byte_offset_T: np.ndarray
    flags_T: np.ndarray

    def tail(self, tokens: int) -> Encoded:
        """The last `tokens` tokens."""
        kept = slice(max(len(self.token_T) - tokens, 0), None)
        return Encoded(
            info=self.info,
            token_T=self.token_T[kept],
            byte_offset_T=self.byte_offset_T[kept],
            flags_T=self.flags_T[kept],
        )


def bos_of(model: Tokenizer, policy: str) -> int | None:
    """The token every window starts with, or None. Raises ConfigError."""
    if policy not in BOS_POLICIES:
        raise ConfigError(f"corpus.bos={policy!r} is unknown; use one of {', '.join(BOS_POLICIES)}")
    if policy == "always" and model.bos is None:
        raise ConfigError("corpus.bos=always, but the model has no BOS token; use corpus.bos=auto or never")
    return model.bos if policy == "always" or (policy == "auto" and model.add_bos) else None


class Encoder:
    """Tokenises documents. Pieces and special marks are kept: asking llama.cpp for each row would be slow."""

    def __init__(self, model: Tokenizer, *, bos: int | None, separator: int | None, add_assistant: bool) -> None:
        self.model, self.bos, self.separator, self.add_assistant = model, bos, separator, add_assistant
        self.pieces: dict[int, bytes] = {}
        self.special: set[int] = set()

    def encode(self, document: Document) -> Encoded:
        """The document as a whole. Raises UnusableError for one that has no tokens or spells a chat marker."""
        if document.token_T is not None:
            token_T, form = document.token_T, "tokens"
            if len(token_T) and token_T[0] == self.bos:  # every window gets its own
                token_T = token_T[1:]
            self._learn(token_T)
            data = b"".join(self.pieces[token] for token in token_T.tolist())
        elif document.messages is not None:
            data, form = self._rendered(document.messages), "chat"
            token_T = self._tokens(data, parse_special=True)
        else:
            data, form = document.text.encode("utf-8"), "text"
            token_T = self._tokens(data, parse_special=False)
        if not len(token_T):
            raise UnusableError("no tokens")
        offset_T, exact = byte_offsets(data, [self.pieces[token] for token in token_T.tolist()])
        info = DocumentInfo(
            name=document.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), exact_offsets=exact, form=form
        )
        encoded = Encoded(info=info, token_T=token_T, byte_offset_T=offset_T, flags_T=self._flags(token_T))
        return encoded if self.separator is None else self.extend(encoded, np.array([self.separator]))

    def extend(self, encoded: Encoded, token_T: np.ndarray, flag: int = 0) -> Encoded:
        """`encoded` and tokens that are not of its text: their byte offsets go on past its end."""
        token_T = np.asarray(token_T, np.int32)
        self._learn(token_T)
        lengths = np.array([len(self.pieces[token]) for token in token_T.tolist()], np.int64)
        offset_T = encoded.info.bytes + np.cumsum(lengths) - lengths
        return Encoded(
            info=encoded.info,
            token_T=np.concatenate([encoded.token_T, token_T]),
            byte_offset_T=np.concatenate([encoded.byte_offset_T, offset_T]),
            flags_T=np.concatenate([encoded.flags_T, self._flags(token_T) | np.uint8(flag)]),
        )

    def continued(self, prompts: list[Encoded], generate: Continuation, first: int) -> list[Encoded]:
        """Each prompt and what the model says after it."""
        start = [] if self.bos is None else [self.bos]
        found = generate([np.array([*start, *prompt.token_T.tolist()], np.int32) for prompt in prompts], first)
        return [self.extend(p, token_T, FLAG_GENERATED) for p, token_T in zip(prompts, found, strict=True)]

    def _rendered(self, messages: tuple[dict[str, str], ...]) -> bytes:
        """The messages in the model's own template, without a BOS where every window gets its own.

        The template's markers are parsed as special tokens, so a message must not spell one.
        """
        for message in messages:
            for text in message.values():
                token_T = self._tokens(text.encode("utf-8"), parse_special=True)
                spelled = [token for token in token_T.tolist() if token in self.special]
                if spelled:
                    marker = self.pieces[spelled[0]].decode("utf-8", "replace")
                    raise UnusableError(f"a message spells a special token ({marker})")
                if "\0" in text:
                    raise UnusableError("a message holds a NUL character")
        try:
            rendered = self.model.chat(list(messages), add_assistant=self.add_assistant).encode("utf-8")
        except MessagesRefusedError as error:
            raise UnusableError(str(error)) from None
        if self.bos is not None:
            self._learn(np.array([self.bos]))
            rendered = rendered.removeprefix(self.pieces[self.bos])
        return rendered

    def _tokens(self, data: bytes, *, parse_special: bool) -> np.ndarray:
        token_T = np.asarray(self.model.tokenize(data, parse_special=parse_special), np.int32)
        self._learn(token_T)
        return token_T

    def _learn(self, token_T: np.ndarray) -> None:
        for token in np.unique(token_T).tolist():
            if token not in self.pieces:
                self.pieces[token] = self.model.piece(token)
                if self.model.is_special(token):
                    self.special.add(token)

    def _flags(self, token_T: np.ndarray) -> np.ndarray:
        special_T = np.isin(token_T, list(self.special)) if self.special else np.zeros(len(token_T), bool)
        return np.where(special_T, FLAG_SPECIAL, 0).astype(np.uint8)


def byte_offsets(data: bytes, pieces: list[bytes]) -> tuple[np.ndarray, bool]:
    """Where each piece starts in `data`, and whether that is exact.

    Byte-level tokenizers give the text back, SentencePiece ones with one space put before it. Others
    normalise: their pieces are searched for one after another, a piece not found starts where the last
    one ended.
    """
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    start_T = np.cumsum(lengths) - lengths
    joined = b"".join(pieces)
    if joined == data:
        return start_T, True
    if joined == b" " + data:
        return np.maximum(start_T - 1, 0), True
    cursor = 0
    for index, piece in enumerate(pieces):
        wanted = piece.lstrip() or piece
        found = data.find(wanted, cursor, cursor + len(wanted) + ALIGN_SLACK_BYTES) if wanted else -1
        start_T[index] = found if found >= 0 else cursor
        if found >= 0:
            cursor = found + len(wanted)
    return start_T, False
