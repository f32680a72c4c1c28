"""Writing a store: made once at full size, filled shard by shard, each shard committed when it is on disk.

A killed run leaves whole commits and perhaps files of a shard without one; those are written again.
Letters: N rows of a shard, S rows per shard, D width of a hook.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import zarr

from pipeline.corpus.windows import FLAGS_ALL, DocumentInfo
from sae.errors import ShapeError, StoreError

from .commits import Commit, commit_path, committed_shards, shard_stats, write_commit
from .schema import (
    COMMITS_FOLDER,
    DOCS_FILE,
    LOCK_FILE,
    META_FILE,
    STORED_DTYPES,
    HookInfo,
    StoreMeta,
    dump_json,
    fsync_folder,
    read_meta,
    write_atomic,
)

# Without it zarr leaves out chunks that are all zero, later chunks move up, and the shard file is no
# longer the row-major bytes the memory-mapped reader needs.
ARRAY_CONFIG: Any = {"write_empty_chunks": True}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DIFFERENCES_NAMED = 4


class StoreWriter:
    """One writer of one store, as a context manager; it holds the store's lock.

    A new store is made; one that is there goes on if its metadata equal `meta`.
    Raises StoreError when the store is locked, made with other settings, or the disk is too full.
    """

    def __init__(self, path: Path, meta: StoreMeta, documents: Sequence[DocumentInfo]) -> None:
        self.path = Path(path)
        self.meta = meta
        with no_room(self.path, meta.shard_bytes * meta.n_shards):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
        try:
            with no_room(self.path, meta.shard_bytes * meta.n_shards):
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

    def close(self) -> None:
        """Give the lock back. Committed shards are on disk already."""
        self._lock.close()

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        done = set(self.committed)
        return [shard for shard in range(self.meta.n_shards) if shard not in done]

    @property
    def committed(self) -> list[int]:
        return committed_shards(self.path)

    def commit_shard(self, shard: int, acts: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Commit:
        """Write the rows of a shard, fsync every file, then its commit.

        `acts`: hook -> (N, D) in the format on disk (`to_stored`); `columns`: name -> (N,), flags final.
        N must be the shard's valid rows; the tail is padded with zeros.
        """
        start, stop = self.meta.shard_range(shard)
        for name, array in {**acts, **columns}.items():
            if len(array) != stop - start:
                raise ShapeError(f"shard {shard} holds {stop - start} rows, {name} came with {len(array)}")
        with no_room(self.path, self.meta.shard_bytes * len(self.missing())):
            files = {}
            for hook in self.meta.hooks:
                files.update(self._write(hook.array_path, shard, acts[hook.name]))
            for name in self.meta.columns:
                files.update(self._write(f"columns/{name}", shard, columns[name]))
            unflagged = (columns["flags"] & FLAGS_ALL) == 0
            commit = Commit(
                shard=shard,
                valid_rows=stop - start,
                flagged_rows=int((~unflagged).sum()),
                stats={
                    hook.name: shard_stats(acts[hook.name], hook.dtype, unflagged, columns["pos"])
                    for hook in self.meta.hooks
                },
                files=files,
            )
            write_commit(self.path, commit)
        return commit

    def _open(self, documents: Sequence[DocumentInfo]) -> None:
        if (self.path / META_FILE).exists():
            refuse_difference(self.path, read_meta(self.path), self.meta)
            for stray in self.path.rglob("*.partial"):
                stray.unlink()
            self._check_room()
            return
        strangers = {entry.name for entry in self.path.iterdir()} - _OWN_ENTRIES
        if strangers:
            raise StoreError(
                f"{self.path} holds other files ({', '.join(sorted(strangers)[:3])}); give an empty store.path"
            )
        for entry in self.path.iterdir():  # left by a run killed while it made the store: nothing is committed
            if entry.name != LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._check_room()
        self._create(documents)

    def _create(self, documents: Sequence[DocumentInfo]) -> None:
        meta = self.meta
        group = zarr.open_group(self.path, mode="a", zarr_format=3)
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
        (self.path / COMMITS_FOLDER).mkdir()
        _fsync_tree(self.path)
        write_atomic(self.path / DOCS_FILE, b"".join(dump_json(asdict(document)) for document in documents))
        write_atomic(self.path / META_FILE, dump_json(meta.as_dict()))

    def _check_room(self) -> None:
        needed = self.meta.shard_bytes * len(self.missing())
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise StoreError(
                f"the disk of {self.path} is too full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
                f"free some, set store.path elsewhere, or lower corpus.max_tokens"
            )

    def _write(self, array_path: str, shard: int, stored: np.ndarray) -> dict[str, dict[str, Any]]:
        """One shard of one array: padded, written as a whole, fsynced, measured."""
        rows = self.meta.shard_rows
        if len(stored) < rows:
            stored = np.concatenate([stored, np.zeros((rows - len(stored), *stored.shape[1:]), stored.dtype)])
        # ORDER: with_config after opening; open_array drops a config given to it (zarr 3.1.6).
        array = zarr.open_array(self.path / array_path, mode="r+").with_config(ARRAY_CONFIG)
        relative = shard_file(array_path, shard, stored.ndim)
        file = self.path / relative
        # ORDER: without the unlink zarr reads a shard that is there to merge into it, and fails on a damaged one.
        file.unlink(missing_ok=True)
        array[shard * rows : (shard + 1) * rows] = stored
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        for folder in (file.parent, file.parent.parent):  # c/<shard>/0: both folders may be new
            fsync_folder(folder)
        return {relative: {"bytes": file.stat().st_size, "sha256": digest}}


_OWN_ENTRIES = {
    LOCK_FILE,
    "zarr.json",
    "hooks",
    "columns",
    COMMITS_FOLDER,
    DOCS_FILE,
    DOCS_FILE + ".partial",
    META_FILE + ".partial",
}


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(folder))


def shard_file(array_path: str, shard: int, ndim: int) -> str:
    """Where zarr keeps shard `shard` of an array, relative to the store."""
    return f"{array_path}/c/{shard}" + "/0" * (ndim - 1)


def lock(path: Path) -> IO[bytes]:
    """Hold the store at `path` for one writer; closing the returned file gives it back.

    Raises StoreError when another process holds it.
    """
    file = (path / LOCK_FILE).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StoreError(f"another run is writing into {path}; wait for it or give another store.path") from None
    except OSError as error:
        file.close()
        raise StoreError(f"cannot lock {path} ({error.strerror}); put the store on a local disk") from None
    return file


@contextmanager
def no_room(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk into a StoreError that says what is needed and what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        done = len(committed_shards(path))
        raise StoreError(
            f"disk full while writing {path} ({error.strerror}): {needed_bytes / 1e9:.3f} GB more are needed; "
            f"{done} committed shards are safe, make room and resume"
        ) from None


def refuse_difference(path: Path, stored: StoreMeta, wanted: StoreMeta) -> None:
    """Raises StoreError, naming what differs, when a run with `wanted` must not write into a store of `stored`."""
    differences = stored.differences(wanted)
    if differences:
        named = "; ".join(differences[:DIFFERENCES_NAMED])
        more = f"; and {len(differences) - DIFFERENCES_NAMED} more" if len(differences) > DIFFERENCES_NAMED else ""
        raise StoreError(
            f"{path} was made with other settings ({named}{more}); resume with those or give another store.path"
        )


def invalidate(path: Path, shard: int) -> None:
    """Take back the commit of a shard, so that the next extract into the store does it again.

    Raises StoreError when the shard was not committed or the store is being written.
    """
    read_meta(path)
    with lock(path):
        file = commit_path(path, shard)
        if not file.exists():
            raise StoreError(f"shard {shard} of {path} is not committed; committed are {committed_shards(path)}")
        file.unlink()
        fsync_folder(file.parent)


def make_hook_infos(
    widths: dict[str, int], dtypes: dict[str, str], thresholds: dict[str, float]
) -> tuple[HookInfo, ...]:
    """HookInfo of every hook, in the order of `widths`."""
    return tuple(
        HookInfo(name=name, width=width, dtype=dtypes[name], outlier_threshold=thresholds[name])
        for name, width in widths.items()
    )
