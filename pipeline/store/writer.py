"""Writing a store: made once at full size, filled shard by shard, each shard committed when it is on disk.

A killed run leaves whole commits and perhaps files of a shard without one; those are written again.
`StoreWriter` holds the store for one run; `ShardWriter` writes shards, in any process, under a run that does.
Letters: N rows of a shard, S rows per shard, D width of a hook.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.corpus.windows import FLAGS_ALL, DocumentInfo
from sae.errors import ShapeError, StoreError

from .backends import CHUNK_BYTES, LOCK_FILE, Backend, Buffer, Location, Lock, as_location, open_backend
from .checksums import Counted, forget_commits, write_checksums
from .commits import Commit, commit_key, committed_shards, write_commit
from .encode import ARRAY_METADATA, array_documents, encode_plain, encode_with_zarr, is_plain, shard_key
from .schema import (
    CHECKSUMS_FILE,
    COMMITS_FOLDER,
    DOCS_FILE,
    META_FILE,
    STATS_ARRAYS_FILE,
    STATS_FILE,
    STORED_DTYPES,
    HookInfo,
    StoreMeta,
    dump_json,
    is_store,
    read_meta,
)
from .statistics import shard_stats

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DIFFERENCES_NAMED = 4
# What a run that was killed while it made a store may have left: nothing in it is committed.
OWN_ENTRIES = {
    LOCK_FILE, ARRAY_METADATA, "hooks", "columns", COMMITS_FOLDER, DOCS_FILE, CHECKSUMS_FILE, STATS_FILE, STATS_ARRAYS_FILE,
}  # fmt: skip


class ShardWriter:
    """Writes and commits shards of a store that is there. Holds no lock; goes to another process by its location."""

    def __init__(self, location: Location | Backend) -> None:
        self._backend = open_backend(location)

    def __reduce__(self) -> tuple[type[ShardWriter], tuple[Location]]:
        return ShardWriter, (self._backend.location,)

    @cached_property
    def meta(self) -> StoreMeta:
        return read_meta(self._backend)

    @property
    def location(self) -> Location:
        return self._backend.location

    def committed(self, shard: int) -> bool:
        """Whether a shard is whole."""
        return self._backend.size(commit_key(shard)) is not None

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        done = set(committed_shards(self._backend))
        return [shard for shard in range(self.meta.n_shards) if shard not in done]

    def commit_shard(self, shard: int, acts: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Commit:
        """Write the rows of a shard, durably, then its commit.

        `acts`: hook -> (N, D) in the format on disk (`to_stored`); `columns`: name -> (N,), flags final.
        N must be the shard's valid rows; the tail is padded with zeros. Raises ShapeError for other arrays.
        """
        meta = self.meta
        start, stop = meta.shard_range(shard)
        arrays = {hook.array_path: acts[hook.name] for hook in meta.hooks}
        arrays |= {f"columns/{name}": columns[name] for name in meta.columns}
        for path, stored in arrays.items():
            _check_shape(meta, shard, path, stored)
        with no_room(self._backend, meta.shard_bytes):
            files = {}
            for path, stored in arrays.items():
                files.update(self._write(path, shard, stored))
            unflagged = (columns["flags"] & FLAGS_ALL) == 0
            commit = Commit(
                shard=shard,
                valid_rows=stop - start,
                flagged_rows=int((~unflagged).sum()),
                files=files,
            )
            stats = {
                hook.name: shard_stats(acts[hook.name], hook.dtype, unflagged, columns["pos"]) for hook in meta.hooks
            }
            write_commit(self._backend, commit, stats)
        return commit

    @cached_property
    def _metadata(self) -> dict[str, bytes]:
        """zarr.json of every array, by its path."""
        paths = [*(hook.array_path for hook in self.meta.hooks), *(f"columns/{name}" for name in self.meta.columns)]
        return {path: self._backend.get(f"{path}/{ARRAY_METADATA}") for path in paths}

    def _write(self, array_path: str, shard: int, stored: np.ndarray) -> dict[str, dict[str, Any]]:
        """One shard of one array: encoded in memory, measured there, put as a whole."""
        rows, chunk_rows = self.meta.shard_rows, self.meta.chunk_rows
        metadata = self._metadata[array_path]
        parts: list[Buffer] = (
            encode_plain(stored, rows, chunk_rows)
            if is_plain(metadata, rows, chunk_rows)
            else [encode_with_zarr(metadata, rows, stored)]
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        key = shard_key(array_path, shard, stored.ndim)
        self._backend.put(key, parts)
        return {key: {"bytes": sum(len(part) for part in parts), "sha256": digest.hexdigest()}}


class StoreWriter:
    """One writer of one store, as a context manager; it holds the store's lock.

    A new store is made; one that is there goes on if its metadata equal `meta`. `documents` may be lazy:
    they are read once, and only for a new store.
    Raises StoreError when the store is locked, made with other settings, or the disk is too full.
    """

    def __init__(self, location: Location | Backend, meta: StoreMeta, documents: Iterable[DocumentInfo]) -> None:
        self.backend = open_backend(location)
        self.meta = meta
        self.shards = ShardWriter(self.backend)
        with no_room(self.backend, meta.shard_bytes * meta.n_shards):
            self._lock = self.backend.lock()
        try:
            with no_room(self.backend, meta.shard_bytes * meta.n_shards):
                self._open(documents)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def location(self) -> Location:
        return self.backend.location

    def close(self) -> None:
        """Give the lock back. Committed shards are on disk already."""
        self._lock.close()

    def check_lock(self) -> None:
        """Raises StoreError when the store is not held any more: a lease that could not be renewed."""
        self._lock.check()

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        return self.shards.missing()

    @property
    def committed(self) -> list[int]:
        return committed_shards(self.backend)

    def commit_shard(self, shard: int, acts: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Commit:
        """`ShardWriter.commit_shard`, while the store is held."""
        self.check_lock()
        return self.shards.commit_shard(shard, acts, columns)

    def _open(self, documents: Iterable[DocumentInfo]) -> None:
        backend = self.backend
        if is_store(backend):
            refuse_difference(backend.location, read_meta(backend), self.meta)
            backend.remove_partial()
            check_room(backend.location, self.meta.shard_bytes * len(self.missing()), backend.free_bytes())
            forget_commits(backend, self.committed)
            return
        refuse_strangers(backend)
        backend.remove_partial()
        for key in backend.list():
            if key != LOCK_FILE:
                backend.delete(key)
        check_room(backend.location, self.meta.shard_bytes * self.meta.n_shards, backend.free_bytes())
        self._create(documents)

    def _create(self, documents: Iterable[DocumentInfo]) -> None:
        for key, document in array_documents(self.meta).items():
            self.backend.put(key, document)
        lines = Counted(_joined(dump_json(asdict(document)) for document in documents))
        meta = Counted([dump_json(self.meta.as_dict())])
        self.backend.put(DOCS_FILE, lines)
        meta_bytes = b"".join(meta)
        write_checksums(self.backend, {DOCS_FILE: lines.checksum, META_FILE: meta.checksum})
        self.backend.put(META_FILE, meta_bytes)


def check_room(location: object, needed_bytes: int, free_bytes: int | None) -> None:
    """StoreError, with the numbers, where the disk cannot hold so many bytes; `free_bytes` None: not known."""
    if free_bytes is not None and needed_bytes > free_bytes:
        needed, free = math.ceil(needed_bytes / 1e7) / 100, free_bytes // 10**7 / 100  # never as much as is needed
        raise StoreError(
            f"the disk of {location} is too full: {needed:.2f} GB needed, {free:.2f} GB free; free some, set store.path "
            "elsewhere, or lower corpus.max_tokens"
        )


def _check_shape(meta: StoreMeta, shard: int, array_path: str, stored: np.ndarray) -> None:
    start, stop = meta.shard_range(shard)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        f"columns/{name}": (dtype, ()) for name, dtype in meta.columns.items()
    }
    expected |= {hook.array_path: (STORED_DTYPES[hook.dtype], (hook.width,)) for hook in meta.hooks}
    dtype, width = expected[array_path]
    if len(stored) != stop - start:
        raise ShapeError(f"shard {shard} holds {stop - start} rows, {array_path} came with {len(stored)}")
    if stored.shape[1:] != width or stored.dtype != np.dtype(dtype):
        raise ShapeError(
            f"{array_path} holds rows {width} of {dtype}, came with {stored.shape[1:]} of {stored.dtype.name}"
        )


def _joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of some size instead of lines."""
    pending = bytearray()
    for line in lines:
        pending += line
        if len(pending) >= CHUNK_BYTES:
            yield bytes(pending)
            pending.clear()
    yield bytes(pending)


def lock(location: Location | Backend) -> Lock:
    """Hold a store for one writer; the end of the `with` block gives it back.

    Raises StoreError when another process holds it.
    """
    return open_backend(location).lock()


@contextmanager
def no_room(location: Location | Backend, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk into a StoreError that says what is needed and what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        backend = open_backend(location)
        done = len(committed_shards(backend))
        if is_store(backend):
            meta = read_meta(backend)
            needed_bytes = meta.shard_bytes * (meta.n_shards - done)
        raise StoreError(
            f"disk full while writing {backend.location} ({error.strerror}): {needed_bytes / 1e9:.3f} GB more are "
            f"needed; {done} committed shards are safe, make room and resume"
        ) from None


def refuse_strangers(location: Location | Backend) -> None:
    """Raises StoreError when a store can neither be made at `location` nor is there: it holds other files."""
    backend = open_backend(location)
    strangers = set() if is_store(backend) else backend.entries() - OWN_ENTRIES
    if strangers:
        raise StoreError(
            f"{backend.location} holds other files ({', '.join(sorted(strangers)[:3])}); give an empty store.path"
        )


def refuse_difference(location: Location, stored: StoreMeta, wanted: StoreMeta) -> None:
    """Raises StoreError, naming what differs, when a run with `wanted` must not write into a store of `stored`."""
    differences = stored.differences(wanted)
    if differences:
        named = "; ".join(differences[:DIFFERENCES_NAMED])
        more = f"; and {len(differences) - DIFFERENCES_NAMED} more" if len(differences) > DIFFERENCES_NAMED else ""
        raise StoreError(
            f"{location} was made with other settings ({named}{more}); resume with those or give another store.path"
        )


def invalidate(location: Location, shard: int) -> None:
    """Take back the commit of a shard, so that the next extract into the store does it again.

    Raises StoreError when the shard was not committed or the store is being written.
    """
    backend = open_backend(location)
    read_meta(backend)
    with backend.lock():
        if backend.size(commit_key(shard)) is None:
            raise StoreError(
                f"shard {shard} of {as_location(location)} is not committed; committed are {committed_shards(backend)}"
            )
        backend.delete(commit_key(shard))


def make_hook_infos(
    widths: dict[str, int], dtypes: dict[str, str], thresholds: dict[str, float]
) -> tuple[HookInfo, ...]:
    """HookInfo of every hook, in the order of `widths`."""
    return tuple(
        HookInfo(name=name, width=width, dtype=dtypes[name], outlier_threshold=thresholds[name])
        for name, width in widths.items()
    )
