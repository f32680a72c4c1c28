"""Training checkpoints: `step_00000500.pt`, whole or absent, read without running any code from the file."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from .checkpoint import write_atomic
from .errors import DiskError, FormatError

FORMAT = "ggscope-training"
VERSION = 1
NAME = re.compile(r"step_(\d{8,})\.pt")
DIRECTORY = 0x10  # in the attributes of a part of a zip file
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError,
)  # fmt: skip


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"step_{step:08d}.pt"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending."""
    return sorted(int(match[1]) for path in folder.glob("step_*.pt") if (match := NAME.fullmatch(path.name)))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return [checkpoint_path(folder, step) for step in checkpoint_steps(folder)]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`.

    Raises:
        DiskError: it could not be written; the checkpoints that were there still are.
    """
    path = checkpoint_path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"could not make {folder}: {error.strerror or error}") from error
    buffer = io.BytesIO()  # torch.save on a real file turns a full disk into an internal error of its zip writer
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))
    return path


def prune(folder: Path, *, keep_last: int, step: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to that of `step`, which was just written."""
    for old in [s for s in checkpoint_steps(folder) if s <= step][:-keep_last]:
        checkpoint_path(folder, old).unlink(missing_ok=True)


def check_sums(path: Path) -> None:
    """Read the whole file and compare the checksums of its parts, which torch writes but does not look at.

    Raises:
        zipfile.BadZipFile: a part is not what was written. Others of UNREADABLE where its headers are damaged.
    """
    with zipfile.ZipFile(path) as parts:
        if (damaged := parts.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        if any(part.external_attr & DIRECTORY for part in parts.infolist()):  # of which torch would read nothing
            raise zipfile.BadZipFile("it holds a directory")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        FormatError: damaged, foreign, or of another version.
    """
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = "it holds other things than tensors and text" if isinstance(error, pickle.UnpicklingError) else first
        raise FormatError(f"{path} cannot be read ({why}); delete it to resume from the one before") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FormatError(f"{path} is not a {FORMAT} file")
    if state.get("version") != VERSION:
        raise FormatError(f"{path} has version {state.get('version')!r}, this program reads version {VERSION}")
    return state
