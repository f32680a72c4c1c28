"""Documents of the three corpus kinds: the standard library, text files, JSON lines.

A document is named by a relative POSIX path, never by a machine's absolute one, because the name
decides (`is_held_out`) on which side of the split it lies.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import CorpusConfig
from sae.errors import ConfigError

from .stdlib import is_held_out, stdlib_files

KINDS = ("stdlib", "text", "jsonl")
SPLITS = ("train", "held_out", "all")
NAMED_IN_MESSAGES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and the name it is known by."""

    name: str
    text: str


@dataclass(kw_only=True, slots=True)
class ReadReport:
    """What a pass over the corpus kept and what it left out, and why."""

    kept: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (document name, reason)

    def describe_skipped(self) -> str:
        """One phrase such as `2 skipped (a.py: not UTF-8, b.py: empty)`; empty if nothing was."""
        if not self.skipped:
            return ""
        named = ", ".join(f"{name}: {reason}" for name, reason in self.skipped[:NAMED_IN_MESSAGES])
        more = len(self.skipped) - NAMED_IN_MESSAGES
        return f"{len(self.skipped)} skipped ({named}{f', and {more} more' if more > 0 else ''})"


class _UnusableError(Exception):
    """A single document that cannot be used; its message is the reason."""


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    load: Callable[[], str]


def read_documents(config: CorpusConfig, report: ReadReport | None = None) -> Iterator[Document]:
    """The documents of `config`, in the order its seed gives (below 0: sorted by name).

    Documents that are empty, unreadable or not UTF-8 are noted in `report` and left out; the rest
    is kept. `max_documents` counts kept ones. Tokens are limited where windows are cut.

    Raises ConfigError for an unknown kind or split, a path or glob that matches no file, and for a
    corpus without a single usable document.
    """
    report = ReadReport() if report is None else report
    if config.split not in SPLITS:
        raise ConfigError(f"corpus.split={config.split!r} is unknown; use one of {', '.join(SPLITS)}")
    sources = [
        s for s in _sources(config) if config.split == "all" or is_held_out(s.name) == (config.split == "held_out")
    ]
    order = range(len(sources))
    if config.seed >= 0:
        order = np.random.default_rng(config.seed).permutation(len(sources))
    for index in order:
        source = sources[index]
        try:
            text = source.load()
            if not text.strip():
                raise _UnusableError("empty")
        except _UnusableError as reason:
            report.skipped.append((source.name, str(reason)))
            continue
        report.kept += 1
        yield Document(name=source.name, text=text)
        if report.kept == config.max_documents:
            return
    if report.kept == 0:
        found = f"{len(sources)} documents in split {config.split!r}"
        raise ConfigError(
            f"empty corpus: kind={config.kind} has {found}, none usable"
            + (f"; {report.describe_skipped()}" if report.skipped else "; give other paths or corpus.split=all")
        )


def _sources(config: CorpusConfig) -> list[_Source]:
    if config.kind == "stdlib":
        return [_Source(name, partial(_load_text, path)) for name, path in stdlib_files()]
    if config.kind == "text":
        return [_Source(name, partial(_load_text, path)) for name, path in _expand(config)]
    if config.kind == "jsonl":
        return [s for name, path in _expand(config) for s in _jsonl_sources(name, path, config.text_key)]
    raise ConfigError(f"corpus.kind={config.kind!r} is unknown; use one of {', '.join(KINDS)}")


def _expand(config: CorpusConfig) -> list[tuple[str, Path]]:
    """`(name, file)` of every path and glob, sorted by name, each file once.

    A name is the path below the part of the pattern before its first wildcard, so that it does not
    change with the folder the corpus lies in. Files whose names would collide keep the whole path.
    """
    if not config.paths:
        raise ConfigError(
            f"corpus.paths is empty; corpus.kind={config.kind} needs files or globs, as corpus.paths=[a.txt]"
        )
    found: dict[Path, tuple[str, str]] = {}
    for pattern in config.paths:
        root = _static_prefix(pattern)
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        files = [match for match in matches if not match.is_dir()]
        if not files:
            hint = f"; it is a folder, use '{pattern.rstrip('/')}/**/*.txt'" if Path(pattern).is_dir() else ""
            raise ConfigError(f"corpus.paths: {pattern!r} matches no file{hint}")
        for path in files:
            found.setdefault(path.absolute(), (path.relative_to(root).as_posix(), path.as_posix()))
    uses = Counter(short for short, _ in found.values())
    return sorted((short if uses[short] == 1 else whole, path) for path, (short, whole) in found.items())


def _static_prefix(pattern: str) -> Path:
    """The folder of a plain path, or the longest leading folder of a glob without a wildcard."""
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:wild])


def _load_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # bytes: newlines stay as they are
    except UnicodeDecodeError:
        raise _UnusableError("not UTF-8") from None
    except OSError as error:
        raise _UnusableError(f"unreadable ({error.strerror})") from None


def _jsonl_sources(name: str, path: Path, text_key: str) -> list[_Source]:
    """One source per non-blank line, named `file:line`; only offsets are kept in memory."""
    sources = []
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    load = partial(_load_record, path, offset, len(line), text_key)
                    sources.append(_Source(f"{name}:{number}", load))
                offset += len(line)
    except OSError:
        return [_Source(name, partial(_load_text, path))]  # loading it names the reason
    return sources


def _load_record(path: Path, offset: int, length: int, text_key: str) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            record = json.loads(file.read(length).decode("utf-8"))
    except UnicodeDecodeError:
        raise _UnusableError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _UnusableError(f"not JSON ({error.msg})") from None
    except OSError as error:
        raise _UnusableError(f"unreadable ({error.strerror})") from None
    if not isinstance(record, dict):
        raise _UnusableError(f"a JSON {type(record).__name__}, not an object")
    if text_key not in record:
        keys = ", ".join(list(record)[:8])
        raise _UnusableError(f"no field {text_key!r} (corpus.text_key); it has {keys or 'none'}")
    text = record[text_key]
    if not isinstance(text, str):
        raise _UnusableError(f"field {text_key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")  # JSON can spell a lone surrogate, which no UTF-8 text holds
    except UnicodeEncodeError:
        raise _UnusableError("not UTF-8 (a lone surrogate)") from None
    return text
