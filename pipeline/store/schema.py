"""What a store is made of: names, metadata, number formats. numpy and the standard library only.

Layout of a store, S rows per shard, D the width of a hook, N padded to a multiple of S:

    meta.json                     StoreMeta; written last when a store is made, so a store without it is none
    docs.jsonl                    one {"name", "bytes", "sha256", "exact_offsets"} per document
    zarr.json                     zarr v3 group
    hooks/<hook>/acts             (N, D) float16, float32, or uint16 that is bfloat16; sharded, not compressed
    columns/<name>                (N,) doc window pos token byte_offset flags
    _commits/00000000.json        shard 0 is whole: the only truth about what was captured
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from sae.errors import StoreError

SCHEMA_VERSION = 1
META_FILE = "meta.json"
DOCS_FILE = "docs.jsonl"
COMMITS_FOLDER = "_commits"
LOCK_FILE = ".lock"

FLOAT16_MAX = 65504.0
STORED_DTYPES = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}  # logical -> on disk


@dataclass(frozen=True, kw_only=True, slots=True)
class HookInfo:
    """One hook point of a store."""

    name: str
    width: int
    dtype: str  # logical: float16 | bfloat16 | float32
    outlier_threshold: float  # rows whose norm exceeds it carry FLAG_OUTLIER

    @property
    def array_path(self) -> str:
        return f"hooks/{quote(self.name, safe='')}/acts"  # raw ggml names may hold any character


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMeta:
    """Everything that decides the bytes of a store; a run may go on only with an equal one."""

    rows: int
    shard_rows: int
    chunk_rows: int
    hooks: tuple[HookInfo, ...]
    columns: dict[str, str]  # name -> dtype
    corpus_hash: str
    config_hash: str
    model: dict[str, Any]  # ModelId.as_dict()
    config: dict[str, Any] = field(default_factory=dict)  # result-relevant settings
    schema_version: int = SCHEMA_VERSION

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def padded_rows(self) -> int:
        return self.n_shards * self.shard_rows

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard of all arrays, the index of the sharded ones included."""
        index_bytes = index_size(self.shard_rows // self.chunk_rows)
        hooks = sum(
            h.width * np.dtype(STORED_DTYPES[h.dtype]).itemsize * self.shard_rows + index_bytes for h in self.hooks
        )
        return hooks + self.shard_rows * sum(np.dtype(dtype).itemsize for dtype in self.columns.values())

    def hook(self, name: str) -> HookInfo:
        """Raises StoreError, naming the hooks there are."""
        for info in self.hooks:
            if info.name == name:
                return info
        raise StoreError(f"the store has no hook {name!r}; it has {', '.join(h.name for h in self.hooks)}")

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and past-the-last valid row of a shard."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hooks": [asdict(hook) for hook in self.hooks]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StoreMeta:
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(f"the store has schema version {version}, this ggscope reads {SCHEMA_VERSION}")
        return cls(**{**data, "hooks": tuple(HookInfo(**hook) for hook in data["hooks"])})

    def differences(self, other: StoreMeta) -> list[str]:
        """`key: mine, not theirs` for every leaf that differs."""
        mine, theirs = flatten(self.as_dict()), flatten(other.as_dict())
        keys = sorted((mine.keys() | theirs.keys()) - {"model.name"})  # the file's hash decides, not its name
        absent = "absent"
        return [
            f"{key}: {mine.get(key, absent)}, not {theirs.get(key, absent)}"
            for key in keys
            if mine.get(key, absent) != theirs.get(key, absent)
        ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted keys."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat.update(flatten(child, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def index_size(n_chunks: int) -> int:
    """Bytes of a zarr shard's index: offset and length of each chunk, and a crc32c."""
    return 16 * n_chunks + 4


def read_meta(path: Path) -> StoreMeta:
    """The metadata of the store at `path`. Raises StoreError when there is none or it is not readable."""
    try:
        data = json.loads((path / META_FILE).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"no activation store at {path} ({META_FILE} is missing); run extract, or set store.path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path / META_FILE} is damaged ({error}); extract into a new store") from None
    try:
        return StoreMeta.from_dict(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path / META_FILE} is not an activation store's ({error})") from None


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename, fsync the folder: after a crash the file is whole or absent."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_json(value: Any) -> bytes:
    """Deterministic JSON: same value, same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def to_stored(x_ND: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the array on disk, rounding to nearest even. Overflow becomes inf: check before."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x_ND, np.float32).view(np.uint32)
        return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return x_ND.astype(STORED_DTYPES[dtype])


def to_float32(stored_ND: np.ndarray, dtype: str) -> np.ndarray:
    """The array on disk as a new float32 array."""
    if dtype == "bfloat16":
        return (stored_ND.astype(np.uint32) << 16).view(np.float32)
    return stored_ND.astype(np.float32)
