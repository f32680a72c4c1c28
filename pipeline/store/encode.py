"""The arrays of a store as zarr keeps them, made in memory: metadata documents and shard files.

A shard of ours is its rows, row after row, then (hooks) the shard's index. Where an array's metadata says
so, these bytes are put together here; any other codec chain goes through zarr. A test holds both equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from .backends import Buffer
from .checks import parse_object
from .schema import STORED_DTYPES, StoreMeta, index_size

# Without it zarr leaves out chunks that are all zero, later chunks move up, and the shard file is no
# longer the row-major bytes the readers take it for.
ARRAY_CONFIG: Any = {"write_empty_chunks": True}
ARRAY_METADATA = "zarr.json"
LITTLE_ENDIAN = [{"name": "bytes", "configuration": {"endian": "little"}}]
SINGLE_BYTES = [{"name": "bytes"}]  # of a one-byte dtype: no order


def shard_key(array_path: str, shard: int, ndim: int) -> str:
    """Where zarr keeps shard `shard` of an array, relative to the store."""
    return f"{array_path}/c/{shard}" + "/0" * (ndim - 1)


def array_documents(meta: StoreMeta) -> dict[str, bytes]:
    """Key -> bytes of every zarr metadata document of a new store."""
    documents: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(documents), mode="a", zarr_format=3)
    group.attrs.update({"format": "ggscope activation store", "schema_version": meta.schema_version})
    for hook in meta.hooks:
        group.create_array(
            hook.array_path,
            shape=(meta.padded_rows, hook.width),
            dtype=STORED_DTYPES[hook.dtype],
            chunks=(meta.chunk_rows, hook.width),
            shards=(meta.shard_rows, hook.width),
            attributes={"logical_dtype": hook.dtype, "hook": hook.name},
            compressors=None,
            filters=None,
            fill_value=0,
            config=ARRAY_CONFIG,
        )
    for name, dtype in meta.columns.items():
        group.create_array(
            f"columns/{name}",
            shape=(meta.padded_rows,),
            dtype=dtype,
            chunks=(meta.shard_rows,),
            compressors=None,
            filters=None,
            fill_value=0,
            config=ARRAY_CONFIG,
        )
    return {key: document.to_bytes() for key, document in documents.items()}


def is_plain(metadata: bytes, shard_rows: int, chunk_rows: int) -> bool:
    """Whether a shard of an array is whole rows one after another, little-endian, with nothing else applied.

    `metadata`: its zarr.json. A column is one chunk a shard; a hook is sharded, its index at the end.
    """
    try:
        document = parse_object(metadata)
        shape, codecs = document["shape"], document["codecs"]
        if document["chunk_grid"]["configuration"]["chunk_shape"] != [shard_rows, *shape[1:]]:
            return False
        if len(shape) == 1:
            return codecs in (LITTLE_ENDIAN, SINGLE_BYTES)
        inner = codecs[0]["configuration"]
        return (
            len(codecs) == 1
            and codecs[0]["name"] == "sharding_indexed"
            and inner["chunk_shape"] == [chunk_rows, *shape[1:]]
            and inner["codecs"] == LITTLE_ENDIAN
            and inner["index_location"] == "end"
            and inner["index_codecs"] == [*LITTLE_ENDIAN, {"name": "crc32c"}]
        )
    except (ValueError, LookupError, TypeError):
        return False


def encode_plain(stored: np.ndarray, shard_rows: int, chunk_rows: int) -> list[Buffer]:
    """A shard of a plain array in pieces: the rows as they are in memory, zeros up to `shard_rows`, the index."""
    stored = np.ascontiguousarray(stored, stored.dtype.newbyteorder("<"))
    row_bytes = stored.nbytes // len(stored)
    parts: list[Buffer] = [stored.data.cast("B"), bytes((shard_rows - len(stored)) * row_bytes)]
    if stored.ndim > 1:
        parts.append(plain_index(shard_rows // chunk_rows, chunk_rows * row_bytes))
    return parts


def encode_with_zarr(metadata: bytes, shard_rows: int, stored: np.ndarray) -> bytes:
    """The same by zarr itself, for any codec chain: one region write into an array of this metadata."""
    from zarr.buffer.cpu import Buffer as ZarrBuffer

    objects: dict[str, Any] = {ARRAY_METADATA: ZarrBuffer.from_bytes(metadata)}
    padded = np.zeros((shard_rows, *stored.shape[1:]), stored.dtype)
    padded[: len(stored)] = stored
    # ORDER: with_config after opening; open_array drops a config given to it (zarr 3.1.6).
    array = zarr.open_array(MemoryStore(objects), mode="r+").with_config(ARRAY_CONFIG)
    array[:shard_rows] = padded
    return objects[shard_key("", 0, stored.ndim).lstrip("/")].to_bytes()


def plain_index(n_chunks: int, chunk_bytes: int) -> bytes:
    """zarr's shard index of chunks that lie one after another: offset and length of each, and a crc32c."""
    entries = np.empty((n_chunks, 2), "<u8")
    entries[:, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    entries[:, 1] = chunk_bytes
    data = entries.tobytes()
    index = data + crc32c(data).to_bytes(4, "little")
    assert len(index) == index_size(n_chunks)
    return index


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum (RFC 3720, appendix B.4), byte by byte: an index is short."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()
