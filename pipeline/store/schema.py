"""What a store is made of: names, metadata, number formats. numpy and the standard library only.

Layout of a store, S rows per shard, D the width of a hook, N padded to a multiple of S:

    meta.json                     StoreMeta; written last when a store is made, so a store without it is none
    docs.jsonl                    one {"name", "bytes", "sha256", "exact_offsets", "form"} per document
    zarr.json                     zarr v3 group
    hooks/<hook>/acts             (N, D) float16, float32, or uint16 that is bfloat16; sharded, not compressed
    columns/<name>                (N,) doc window pos token byte_offset flags
    _commits/00000000.json        shard 0 is whole: the only truth about what was captured
    checksums.json                of meta.json, docs.jsonl and the commits, which no commit names
    stats.json, stats.safetensors statistics of every hook, written when a run ends
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import quote

import numpy as np

from pipeline.corpus.table import COLUMN_DTYPES
from sae.errors import StoreError

from .backends import Backend, Location, open_backend
from .checks import finite, inside, of_kind, only_keys, parse_object, whole_number

SCHEMA_VERSION = 1
MAX_SHARDS = 1 << 20
SHA256_DIGITS = 64
MAX_WIDTH = 1 << 24
META_FILE = "meta.json"
DOCS_FILE = "docs.jsonl"
COMMITS_FOLDER = "_commits"
STATS_FILE = "stats.json"
CHECKSUMS_FILE = "checksums.json"
STATS_ARRAYS_FILE = "stats.safetensors"

FLOAT16_MAX = 65504.0
FLOAT16_INFINITY = 0x7C00  # the bits; what is above is not a number
FLOAT16_BIAS = np.float32(2.0 ** (127 - 15))
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

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HookInfo:
        """Raises ValueError for what is no hook."""
        only_keys(data, {"name", "width", "dtype", "outlier_threshold"}, "hooks")
        if of_kind(data["dtype"], str, "dtype") not in STORED_DTYPES:
            raise ValueError(f"dtype: expected {', '.join(STORED_DTYPES)}, got {data['dtype']!r:.60}")
        hook = cls(
            name=of_kind(data["name"], str, "hook name"),
            width=whole_number(data["width"], "width", 1, MAX_WIDTH),
            dtype=data["dtype"],
            outlier_threshold=finite(data["outlier_threshold"], "outlier_threshold"),
        )
        inside(hook.array_path, "hook name")
        return hook


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
        """Raises StoreError for another version, ValueError for what is no store's."""
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(f"the store has schema version {version!r:.40}, this ggscope reads {SCHEMA_VERSION}")
        only_keys(data, {field.name for field in fields(cls)}, "keys")
        hooks = tuple(
            HookInfo.from_dict(of_kind(hook, dict, "hooks")) for hook in of_kind(data["hooks"], list, "hooks")
        )
        if not hooks:
            raise ValueError("hooks: expected at least one")
        if len({hook.array_path for hook in hooks}) < len(hooks):
            raise ValueError("hooks: one twice")
        if data["columns"] != COLUMN_DTYPES:
            raise ValueError(f"columns: expected {', '.join(COLUMN_DTYPES)} in their number formats")
        for key in ("rows", "shard_rows", "chunk_rows"):
            whole_number(data[key], key, 0 if key == "rows" else 1)
        for key, kind in {"corpus_hash": str, "config_hash": str, "model": dict, "config": dict}.items():
            of_kind(data[key], kind, key)
        meta = cls(**{**data, "hooks": hooks})
        if meta.shard_rows % meta.chunk_rows or meta.n_shards > MAX_SHARDS:
            raise ValueError(
                f"rows {meta.rows}, shard_rows {meta.shard_rows}, chunk_rows {meta.chunk_rows}: "
                f"expected shards of whole chunks, at most {MAX_SHARDS} of them"
            )
        return meta

    def differences(self, other: StoreMeta) -> list[str]:
        """`key: mine, not theirs` for every leaf that differs; of the hash of the rest only where that is all."""
        mine, theirs = flatten(self.as_dict()), flatten(other.as_dict())
        keys = sorted((mine.keys() | theirs.keys()) - {"model.name"})  # the file's hash decides, not its name
        absent = "absent"
        differ = [key for key in keys if mine.get(key, absent) != theirs.get(key, absent)]
        named = [key for key in differ if key != "config_hash"] or differ
        return [f"{key}: {_short(mine.get(key, absent))}, not {_short(theirs.get(key, absent))}" for key in named]


def _short(value: Any) -> str:
    """A hash by its first digits."""
    text = str(value)
    return text[:12] if len(text) == SHA256_DIGITS and set(text) <= set(string.hexdigits) else text


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


def read_meta(location: Location | Backend) -> StoreMeta:
    """The metadata of the store at `location`. Raises StoreError when there is none or it is not readable."""
    backend = open_backend(location)
    name = f"{backend.location}/{META_FILE}"
    try:
        data = parse_object(backend.get(META_FILE))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"no activation store at {backend.location} ({META_FILE} is missing); run extract, or set store.path"
        ) from None
    except (ValueError, OSError) as error:
        raise StoreError(f"{name} is damaged ({error}); extract into a new store") from None
    try:
        return StoreMeta.from_dict(data)
    except ValueError as error:
        raise StoreError(f"{name} is not an activation store's ({error})") from None


def is_store(location: Location | Backend) -> bool:
    """Whether there is a store, finished or not."""
    return open_backend(location).size(META_FILE) is not None


def meta_sha256(location: Location | Backend) -> str:
    """What a store is of: the hash of its meta.json (model, corpus, plan, settings)."""
    backend = open_backend(location)
    read_meta(backend)
    return hashlib.sha256(backend.get(META_FILE)).hexdigest()


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


def to_float32(stored_ND: np.ndarray, dtype: str, *, finite: bool = False) -> np.ndarray:
    """The array on disk as a new float32 array. `finite`: the caller knows that every value is."""
    if dtype == "bfloat16":
        bits = stored_ND.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype == "float16" and (finite or is_finite(stored_ND, dtype)):
        return _finite_float16_to_float32(stored_ND)
    return stored_ND.astype(np.float32)


def is_finite(stored_ND: np.ndarray, dtype: str) -> bool:
    """Whether every float16 value is finite, which makes it cheaper to convert; True for the other formats, where it does not."""
    return dtype != "float16" or bool((magnitude_bits(stored_ND) < FLOAT16_INFINITY).all())


def _finite_float16_to_float32(x_ND: np.ndarray) -> np.ndarray:
    """Exactly `astype`, at a third of its time: the 15 bits moved to float32's places, the exponent's bias by a product."""
    bits = x_ND.view(np.int16).astype(np.int32)  # the sign fills the upper half, bit 31 with it
    bits <<= 13
    bits &= np.int32(-0x70000001)  # 0x8fffffff: the sign, then 5 bits of exponent and 10 of fraction
    x = bits.view(np.float32)
    x *= FLOAT16_BIAS
    return x


def magnitude_bits(stored_ND: np.ndarray) -> np.ndarray:
    """|x| of a stored array as unsigned integers: of one format they are in the order of the numbers."""
    unsigned = np.dtype(f"u{stored_ND.dtype.itemsize}")
    return stored_ND.view(unsigned) & unsigned.type((1 << (8 * unsigned.itemsize - 1)) - 1)
