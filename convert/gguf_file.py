"""The GGUF container: a strict bounded reader for files nobody vouches for, and an atomic writer.

Layout (little endian): magic `GGUF`, u32 version, u64 tensor count, u64 key count, the keys, the tensor table, padding
to `general.alignment`, tensor data. Source: llama.cpp's gguf.h.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sae.errors import ConfigError, FormatError

from .keys import MATRIX_TYPES

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY = 4, 8, 9
_KINDS = {name: gguf.GGMLQuantizationType[name] for name in MATRIX_TYPES}
_NAMES = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}  # of every type ggml has
_BLOCK = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}  # (elements, bytes) of a block
# The largest magnitude that can be written. A block's scale is an F16: the largest value / 127 in Q8_0, / 8 in Q4_0;
# Q5_1 and Q4_1 keep the least value itself as F16. Values just above the largest BF16 would round to infinity.
_LARGEST = {
    "F16": 65504.0, "BF16": 3.3895313892515355e38, "Q8_0": 127 * 65504.0,
    "Q5_1": 65504.0, "Q4_1": 65504.0, "Q4_0": 8 * 65504.0,
}  # fmt: skip
_MAX_NAME, _MAX_DIMS, _MAX_ALIGNMENT = 63, 4, 1 << 20
_MAX_KEYS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One line of the tensor table; `shape` is numpy order (slowest first), `start` is from the start of the file.

    `dtype`: ggml's name, or `type N` for a number that is none of ggml's, whose `n_bytes` is 0 for unknown.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFFile:
    """Parsed keys and tensor table of one file, and its mapped bytes."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorEntry]
    buffer: memoryview

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as they are stored, uint8, a view of the file. FormatError for a type that is not read."""
        found = self.tensors[name]
        if found.dtype not in MATRIX_TYPES:
            known = ", ".join(f"{known} ({int(kind)})" for known, kind in _KINDS.items())
            raise FormatError(f"{self.path}: tensor {name!r} is of type {found.dtype}; read are {known}")
        return np.frombuffer(self.buffer[found.start : found.start + found.n_bytes], dtype=np.uint8)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as float32 in numpy order, copied out of the file."""
        found = self.tensors[name]
        return decode_matrix(self.raw(name), found.shape, found.dtype)


class _Cursor:
    """Reads fixed-size values and refuses to go past the end."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path, self.buffer, self.at = path, buffer, 0

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: not a usable GGUF file: {what} (at byte {self.at} of {len(self.buffer)})")

    def need(self, n_bytes: int) -> None:
        if n_bytes > len(self.buffer) - self.at:
            raise self.fail(f"it ends early, {n_bytes} more bytes were expected")

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.need(size)
        raw = bytes(self.buffer[self.at : self.at + size])
        self.at += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"value type {kind} is none of GGUF's 13")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            self.need(8 * count)  # before the loop: a hostile count must not run
            return [self.text() for _ in range(count)]
        if item not in _SCALARS:
            raise self.fail(f"array of type {item}; only strings and numbers are supported")
        self.need(count * struct.calcsize("<" + _SCALARS[item]))
        return [self.scalar(_SCALARS[item]) for _ in range(count)]


def read_gguf(path: str | Path) -> GGUFFile:
    """Maps and parses a GGUF file (version 2 or 3, little endian), every offset and count checked against its size.

    Raises FormatError in one line for anything that is not a whole, well-formed file. Of which type a tensor is matters
    to those who read it: the file may hold others.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise FormatError(f"{path}: is empty; expected a GGUF file")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error}); give an existing .gguf file") from None
    return _parse(path, mapped.data)


def _parse(path: Path, buffer: memoryview) -> GGUFFile:
    cursor = _Cursor(path, buffer)
    if bytes(buffer[:4]) != b"GGUF":
        raise cursor.fail(f"it starts with {bytes(buffer[:4])!r}, expected b'GGUF'")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise cursor.fail(f"version {version}; 2 and 3 in little endian are supported")
    n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
    if n_keys > _MAX_KEYS or n_tensors > _MAX_KEYS:
        raise cursor.fail(f"{n_keys} keys and {n_tensors} tensors; at most {_MAX_KEYS} of each")
    fields: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text()
        if key in fields:
            raise cursor.fail(f"key {key[:80]!r} twice")
        at = cursor.at
        fields[key] = cursor.value()
        if key == "general.alignment" and buffer[at : at + 4] != _U32.to_bytes(4, "little"):
            raise cursor.fail("general.alignment is no u32")
    alignment = fields.get("general.alignment", 32)
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail("general.alignment is no power of two")
    table = dict(_table_row(cursor, alignment) for _ in range(n_tensors))
    if len(table) != n_tensors:
        raise cursor.fail("a tensor name twice")
    tensors = _place(cursor, table, -(-cursor.at // alignment) * alignment)
    _check_order(cursor, table, alignment)
    return GGUFFile(path=path, fields=fields, tensors=tensors, buffer=buffer)


def _table_row(cursor: _Cursor, alignment: int) -> tuple[str, TensorEntry]:
    name = cursor.text()
    if not 0 < len(name.encode()) <= _MAX_NAME:
        raise cursor.fail(f"tensor name {name[:80]!r} is not 1 to {_MAX_NAME} bytes")
    n_dims = cursor.scalar("I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions")
    ne = [cursor.scalar("Q") for _ in range(n_dims)]
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    dtype = _NAMES.get(kind, f"type {kind}")
    if not all(ne) or ne[0] % _BLOCK.get(dtype, (1, 0))[0]:
        raise cursor.fail(f"tensor {name!r} of type {dtype} cannot have ne={ne}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name!r} is not aligned to {alignment} bytes")
    n_bytes = stored_bytes(tuple(ne), dtype)
    return name, TensorEntry(shape=tuple(reversed(ne)), dtype=dtype, start=offset, n_bytes=n_bytes)


def _check_order(cursor: _Cursor, table: dict[str, TensorEntry], alignment: int) -> None:
    """As llama.cpp reads: each tensor follows the one before it. After a type that is not ggml's nobody knows where."""
    expected: int | None = 0
    for name, row in table.items():
        if expected is not None and row.start != expected:
            raise cursor.fail(
                f"tensor {name!r} is at {row.start} of the data, expected {expected}, behind the one before"
            )
        known = row.dtype in _BLOCK
        expected = row.start + -(-row.n_bytes // alignment) * alignment if known else None


def _place(cursor: _Cursor, table: dict[str, TensorEntry], data_start: int) -> dict[str, TensorEntry]:
    placed = {}
    for name, row in table.items():
        start = data_start + row.start
        if start + row.n_bytes > len(cursor.buffer):
            raise cursor.fail(f"tensor {name!r} ends at byte {start + row.n_bytes}; the file was cut or is damaged")
        placed[name] = TensorEntry(shape=row.shape, dtype=row.dtype, start=start, n_bytes=row.n_bytes)
    return placed


def encode_matrix(name: str, values: np.ndarray, dtype: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Bytes of a float32 matrix in one of MATRIX_TYPES, rows contiguous. FormatError where the type cannot hold it."""
    kind, block = _KINDS[dtype], _BLOCK[dtype][0]
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "F32":
        return values, kind
    if float(np.abs(values).max(initial=0.0)) > _LARGEST[dtype]:
        raise FormatError(f"{name} holds values beyond {_LARGEST[dtype]:g}, the range of {dtype}; use F32 for it")
    if values.shape[-1] % block:
        raise FormatError(
            f"{name}: {dtype} needs a width divisible by {block}, got {values.shape[-1]}; use F16, BF16 or F32"
        )
    if dtype == "F16":
        return values.astype(np.float16), kind
    return gguf.quants.quantize(values, kind), kind


def decode_matrix(raw: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """`raw` (uint8) as float32 of `shape`, a copy. What a hostile scale turns into (NaN, infinity) is the caller's."""
    rows = raw.reshape(*shape[:-1], -1)
    if dtype == "F32":
        return rows.view("<f4").astype(np.float32, copy=True)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, _KINDS[dtype]).astype(np.float32, copy=False)


def rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """A matrix as a file of this type gives it back. FormatError where the type cannot hold it."""
    data, _ = encode_matrix(name, values, dtype)
    return decode_matrix(data.view(np.uint8).reshape(-1), values.shape, dtype)


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a matrix in a file, 0 where the type is none of ggml's."""
    items, size = _BLOCK.get(dtype, (1, 0))
    return math.prod(shape) // items * size


def write_atomically(
    path: str | Path,
    architecture: str,
    fill: Callable[[gguf.GGUFWriter], None],
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a GGUF beside `path`, syncs it, runs `check(temporary path)`, renames: never half a file at `path`.

    ConfigError where `path` is a folder or a device: the renaming would put a file in its place.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is there and is no file; name another one to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _sync(partial)
        if check is not None:
            check(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        with contextlib.suppress(OSError):  # of what it still holds for a full disk
            writer.close()
        partial.unlink(missing_ok=True)
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
