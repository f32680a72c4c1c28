"""What the readers hand on: documents, and the account of those that could not be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

SKIPPED_NAMES = 256  # named in a report; the rest is counted
REASONS = 64  # counted apart; further ones are counted together
NAMED_IN_MESSAGES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document and the name it is known by: a text, or chat messages, or token ids."""

    name: str
    text: str = ""
    messages: tuple[dict[str, str], ...] | None = None  # {"role": ..., "content": ...}
    token_T: np.ndarray | None = None


@dataclass(kw_only=True, slots=True)
class ReadReport:
    """What a pass over the corpus kept and what it left out, and why. Its size does not grow with the corpus."""

    kept: int = 0
    filtered: int = 0  # did not meet corpus.filter
    skipped: list[tuple[str, str]] = field(default_factory=list)  # the first (document name, reason)
    reasons: dict[str, int] = field(default_factory=dict)  # reason without its particulars -> documents

    @property
    def n_skipped(self) -> int:
        return sum(self.reasons.values())

    def skip(self, name: str, reason: str) -> None:
        """Count a document that cannot be used."""
        if len(self.skipped) < SKIPPED_NAMES:
            self.skipped.append((name, reason))
        kind = reason.split(" (")[0].split(";")[0]
        if kind not in self.reasons and len(self.reasons) >= REASONS:
            kind = "other reasons"
        self.reasons[kind] = self.reasons.get(kind, 0) + 1

    def describe_skipped(self) -> str:
        """One phrase such as `2 skipped (a.py: not UTF-8, b.py: empty)`; empty if nothing was."""
        if not self.reasons:
            return ""
        named = ", ".join(f"{name}: {reason}" for name, reason in self.skipped[:NAMED_IN_MESSAGES])
        more = self.n_skipped - NAMED_IN_MESSAGES
        return f"{self.n_skipped} skipped ({named}{f', and {more} more' if more > 0 else ''})"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Take over what `as_dict` gave."""
        self.kept, self.filtered = values["kept"], values["filtered"]
        self.skipped[:] = [(name, reason) for name, reason in values["skipped"]]
        self.reasons.clear()
        self.reasons.update(values["reasons"])


class UnusableError(Exception):
    """A single document that cannot be used; its message is the reason."""


class NotMatchedError(Exception):
    """A record that does not meet corpus.filter."""


class Record(NamedTuple):
    """A document not read yet. `load` raises UnusableError or NotMatchedError; `size_bytes` is what it holds in memory."""

    name: str
    load: Callable[[], Document]
    size_bytes: int


class Vocabulary(Protocol):
    """What reading token ids needs of a model."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def n_vocab(self) -> int: ...
