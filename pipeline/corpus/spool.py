"""A window table written to disk while it is tokenised, so that memory does not grow with the corpus.

    spool/
      doc.i4 window.i4 pos.i4 token.i4 byte_offset.i8 flags.u1   the columns, flat, little-endian
      window_starts.i8   first row of every window, then the number of rows
      docs.jsonl         one document a line
      docs.i8            where each of these lines begins
      progress.json      while it is made: how long each file is, and where the reading of the corpus stands
      spool.json         written last; a folder without it is no spool

A killed run cuts every file to the lengths of `progress.json` and goes on from there; the result has the
bytes of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sae.errors import FormatError, SAEError

from ..store.backends import LocalBackend
from ..store.schema import dump_json
from .cutting import Cutter, Part
from .disk import DiskColumn, DiskDocuments
from .documents import Document, ReadReport
from .encoding import Continuation, Tokenizer
from .readers import DocumentStream
from .table import COLUMN_DTYPES, WindowTable, table_hash
from .windows import empty_corpus

SPOOL_FILE = "spool.json"
PROGRESS_FILE = "progress.json"
VERSION = 1
CHECKPOINT_DOCUMENTS = 4096
CHECKPOINT_ROWS = 4 << 20
BUFFER_BYTES = 1 << 18  # of each file

Progress = Callable[[int, int], None]


def file_name(column: str) -> str:
    """`token.i4`."""
    return f"{column}.{np.dtype(COLUMN_DTYPES[column]).str[1:]}"


DATA_FILES = (*map(file_name, COLUMN_DTYPES), "window_starts.i8", "docs.i8", "docs.jsonl")


def spool_table(
    model: Tokenizer,
    documents: Iterable[Document],
    context_tokens: int,
    max_tokens: int = 0,
    *,
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    packing: str = "documents",
    bos: str = "auto",
    generate: Continuation | None = None,
    report: ReadReport | None = None,
    progress: Progress | None = None,
    checkpoint_documents: int = CHECKPOINT_DOCUMENTS,
) -> WindowTable:
    """The table of `windows`, in `folder`. `settings` is what else decides it: the model's id, the corpus settings.

    A finished spool of the same settings is opened and `documents` left alone. An unfinished one is continued
    when `documents` is a `DocumentStream`, else begun anew, as is one of other settings. `progress` gets
    (documents, rows) so far.
    """
    report = ReadReport() if report is None else report
    cutter = Cutter(
        model,
        context_tokens=context_tokens,
        max_tokens=max_tokens,
        packing=packing,
        bos=bos,
        generate=generate,
        report=report,
    )
    own = {"context_tokens": context_tokens, "max_tokens": max_tokens, "packing": packing, "bos": bos}
    own["generate_tokens"] = generate.max_tokens if generate is not None else 0
    identity = {**own, **(settings or {})}
    key = hashlib.sha256(dump_json(identity)).hexdigest()
    done = _read_json(folder / SPOOL_FILE)
    if done is not None and done.get("settings_hash") == key:
        return open_table(folder)
    (folder / SPOOL_FILE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _Writer(folder, cutter, documents, report, key, checkpoint_documents) as writer:
            writer.start()
            for part in cutter.parts(documents):
                writer.add(part)
                if progress is not None:
                    progress(cutter.packer.documents, cutter.packer.rows)
        if not cutter.packer.rows:
            raise empty_corpus()
    except SAEError:  # a corpus without a row: nothing is left of it
        if not cutter.packer.rows:
            _remove(folder)
        raise
    _finish(folder, context_tokens, report, identity, key)
    return open_table(folder)


def open_table(folder: Path) -> WindowTable:
    """The table of a finished spool; its columns stay on disk.

    Raises FormatError for a folder that holds none, or one whose files are damaged.
    """
    facts = _read_json(folder / SPOOL_FILE)
    if facts is None or facts.get("version") != VERSION:
        raise FormatError(
            f"{folder} is no finished spool of version {VERSION} ({SPOOL_FILE}); make it again with extract"
        )
    for name, size in facts["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise FormatError(
                f"{path} is missing or has not its {size} bytes; delete {folder} and make the spool again"
            )
    report = ReadReport()
    report.restore(facts["report"])
    return WindowTable(
        **{f"{name}_N": DiskColumn(folder / file_name(name), dtype) for name, dtype in COLUMN_DTYPES.items()},
        window_starts=DiskColumn(folder / "window_starts.i8", "int64"),
        documents=DiskDocuments(folder / "docs.jsonl", DiskColumn(folder / "docs.i8", "int64")),
        context_tokens=facts["context_tokens"],
        corpus_hash=facts["corpus_hash"],
        report=report,
    )


class _Writer:
    """The growing files of a spool."""

    def __init__(
        self,
        folder: Path,
        cutter: Cutter,
        documents: Iterable[Document],
        report: ReadReport,
        key: str,
        checkpoint_documents: int,
    ) -> None:
        self.folder, self.packer, self.documents = folder, cutter.packer, documents
        self.report, self.key, self.checkpoint_documents = report, key, checkpoint_documents
        self.files: dict[str, BinaryIO] = {}
        self.since = (0, 0)  # documents and rows at the last checkpoint
        self._stack = ExitStack()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.files.clear()

    def start(self) -> None:
        """Open the files, cut to what the last checkpoint knows, or empty."""
        lengths = self._restored()
        for name in DATA_FILES:
            file = self._stack.enter_context(_appending(self.folder / name))
            file.truncate(lengths.get(name, 0))
            file.seek(0, os.SEEK_END)
            self.files[name] = file
        self.since = (self.packer.documents, self.packer.rows)

    def add(self, part: Part) -> None:
        first = self.packer.rows - len(part.columns["pos"])
        for name, column in part.columns.items():
            self.files[file_name(name)].write(np.ascontiguousarray(column).data)
        starts = first + np.flatnonzero(part.columns["pos"] == 0)
        self.files["window_starts.i8"].write(starts.astype("<i8").tobytes())
        lines = self.files["docs.jsonl"]
        self.files["docs.i8"].write(np.int64(lines.tell()).tobytes())
        lines.write(dump_json(asdict(part.info)))
        documents, rows = self.packer.documents - self.since[0], self.packer.rows - self.since[1]
        if part.settled and (documents >= self.checkpoint_documents or rows >= CHECKPOINT_ROWS):
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Everything so far is on disk, and the note says so."""
        if not isinstance(self.documents, DocumentStream):
            return
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        note = {
            "settings_hash": self.key,
            "files": {name: file.tell() for name, file in self.files.items()},
            "packer": self.packer.state(),
            "documents": self.documents.state(),
        }
        LocalBackend(self.folder).put(PROGRESS_FILE, dump_json(note))
        self.since = (self.packer.documents, self.packer.rows)

    def _restored(self) -> dict[str, int]:
        """The lengths of the checkpoint that was restored, or none."""
        note = _read_json(self.folder / PROGRESS_FILE)
        if note is None or note.get("settings_hash") != self.key or not isinstance(self.documents, DocumentStream):
            return {}
        sizes = {name: path.stat().st_size for name in DATA_FILES if (path := self.folder / name).is_file()}
        if any(sizes.get(name, 0) < length for name, length in note["files"].items()):
            return {}
        if not self.documents.restore(note["documents"]):
            return {}
        self.packer.restore(note["packer"])
        return note["files"]


def _remove(folder: Path) -> None:
    for name in (*DATA_FILES, PROGRESS_FILE):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _finish(folder: Path, context_tokens: int, report: ReadReport, identity: Mapping[str, Any], key: str) -> None:
    columns = {name: DiskColumn(folder / file_name(name), dtype) for name, dtype in COLUMN_DTYPES.items()}
    with open(folder / "window_starts.i8", "ab") as file:
        file.write(np.int64(len(columns["pos"])).tobytes())
    documents = DiskDocuments(folder / "docs.jsonl", DiskColumn(folder / "docs.i8", "int64"))
    facts = {
        "version": VERSION,
        "settings": identity,
        "settings_hash": key,
        "context_tokens": context_tokens,
        "rows": len(columns["pos"]),
        "documents": len(documents),
        "corpus_hash": table_hash(context_tokens, documents, columns),
        "report": report.as_dict(),
        "files": {name: (folder / name).stat().st_size for name in DATA_FILES},
    }
    for name in DATA_FILES:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    LocalBackend(folder).put(SPOOL_FILE, dump_json(facts))
    (folder / PROGRESS_FILE).unlink(missing_ok=True)


def _appending(path: Path) -> BinaryIO:
    return path.open("ab", buffering=BUFFER_BYTES)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
