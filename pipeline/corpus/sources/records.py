"""Records one after another, in an order the seed decides, without holding them.

Where any record can be read alone its number is permuted (4 bytes a record, and what the kind needs to
find it). Where it cannot (compressed and remote files, Parquet, `datasets`), the files or row groups are
permuted, and then the records within blocks of at most 1024 records or 64 MiB.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..conditions import Condition, require
from ..documents import Document, Record, UnusableError

BLOCK_RECORDS = 1024
BLOCK_BYTES = 64 << 20

Keep = Callable[[str], bool]  # whether the document of this name is wanted


class Records(ABC):
    """Records in order. `state()` says in JSON where the iteration stands; a new one restored to it goes on there."""

    @abstractmethod
    def __iter__(self) -> Iterator[Record]: ...

    @abstractmethod
    def state(self) -> Any: ...

    @abstractmethod
    def restore(self, state: Any) -> bool:
        """Before the iteration; False where the corpus is not what it was, so that there is nothing to go on with."""


class IndexedRecords(Records):
    """`count` records that can be read in any order; `seed` below 0 keeps theirs."""

    def __init__(
        self, count: int, name: Callable[[int], str], record: Callable[[int], Record], *, keep: Keep, seed: int
    ) -> None:
        self.record, self.at = record, 0
        dtype = np.uint32 if count < 1 << 32 else np.int64
        self.order = np.fromiter((index for index in range(count) if keep(name(index))), dtype)
        if seed >= 0:
            np.random.default_rng(seed).shuffle(self.order)

    def __iter__(self) -> Iterator[Record]:
        while self.at < len(self.order):
            self.at += 1
            yield self.record(int(self.order[self.at - 1]))

    def state(self) -> Any:
        return {"at": self.at, "of": len(self.order)}

    def restore(self, state: Any) -> bool:
        self.at = state["at"]
        return state["of"] == len(self.order)


class StreamedRecords(Records):
    """Records of units (files, row groups) that are read from their beginning; `seed` permutes the units."""

    def __init__(self, units: Sequence[Callable[[], Iterator[Record]]], *, keep: Keep, seed: int) -> None:
        self.units, self.keep = units, keep
        self.order = np.random.default_rng(seed).permutation(len(units)) if seed >= 0 else range(len(units))
        self.unit = self.at = 0

    def __iter__(self) -> Iterator[Record]:
        while self.unit < len(self.units):
            for record in islice(self.units[self.order[self.unit]](), self.at, None):
                self.at += 1
                if self.keep(record.name):
                    yield record
            self.unit, self.at = self.unit + 1, 0

    def state(self) -> Any:
        return {"unit": self.unit, "at": self.at, "of": len(self.units)}

    def restore(self, state: Any) -> bool:
        self.unit, self.at = state["unit"], state["at"]
        return state["of"] == len(self.units)


class ShuffledBlocks(Records):
    """The records of another, permuted within blocks. A restored one reads its block again."""

    def __init__(self, records: Records, seed: int) -> None:
        self.records, self.seed = records, seed
        self.block = self.done = 0
        self.start = records.state()

    def __iter__(self) -> Iterator[Record]:
        records = iter(self.records)
        while True:
            self.start = self.records.state()
            block, size_bytes = [], 0
            for record in records:
                block.append(record)
                size_bytes += record.size_bytes
                if len(block) == BLOCK_RECORDS or size_bytes >= BLOCK_BYTES:
                    break
            if not block:
                return
            order = np.random.default_rng([self.seed, self.block]).permutation(len(block))
            while self.done < len(block):
                self.done += 1
                yield block[order[self.done - 1]]
            self.block, self.done = self.block + 1, 0

    def state(self) -> Any:
        return {"start": self.start, "block": self.block, "done": self.done}

    def restore(self, state: Any) -> bool:
        self.start, self.block, self.done = state["start"], state["block"], state["done"]
        return self.records.restore(self.start)


def shuffled(records: Records, seed: int) -> Records:
    return ShuffledBlocks(records, seed) if seed >= 0 else records


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordForm:
    """How a record with fields becomes a document: which field, under which conditions."""

    text_key: str
    messages_key: str
    conditions: tuple[Condition, ...]

    @property
    def fields(self) -> list[str]:
        """The fields that are read; the conditions' first path elements."""
        return list(dict.fromkeys([self.messages_key or self.text_key, *(c.path[0] for c in self.conditions)]))

    def document(self, name: str, record: Any) -> Document:
        """Raises UnusableError with the reason, NotMatchedError where a condition does not hold."""
        if not isinstance(record, Mapping):
            raise UnusableError(f"a JSON {type(record).__name__}, not an object")
        require(self.conditions, record)
        key = self.messages_key or self.text_key
        if key not in record:
            keys = ", ".join(map(str, list(record)[:8]))
            setting = "messages_key" if self.messages_key else "text_key"
            raise UnusableError(f"no field {key!r} (corpus.{setting}); it has {keys or 'none'}")
        if self.messages_key:
            return Document(name=name, messages=_messages(key, record[key]))
        text = record[key]
        if not isinstance(text, str):
            raise UnusableError(f"field {key!r} is {_kind(text)}, not a string")
        return Document(name=name, text=encodable(text))


def encodable(text: str) -> str:
    """The text; UnusableError for a lone surrogate, which JSON can spell and no UTF-8 text holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableError("not UTF-8 (a lone surrogate)") from None
    return text


def broken(name: str, reason: str) -> Record:
    """A record that only says why it cannot be used."""

    def load() -> Document:
        raise UnusableError(reason)

    return Record(name, load, 0)


def _messages(key: str, found: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(found, list | tuple):
        raise UnusableError(f"field {key!r} is {_kind(found)}, not a list of messages")
    if not found:
        raise UnusableError("empty")
    messages = []
    for message in found:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UnusableError(f"field {key!r} has a message without the strings role and content")
        messages.append({k: encodable(message[k]) for k in ("role", "content")})
    return tuple(messages)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
