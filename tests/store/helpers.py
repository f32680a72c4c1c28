"""A small store with known rows, for the store's tests."""

from __future__ import annotations

import errno

import numpy as np

from pipeline.corpus.windows import COLUMN_DTYPES, FLAG_BOS, FLAG_FIRST, FLAG_OUTLIER, DocumentInfo
from pipeline.store.backends import Backend, LocalBackend
from pipeline.store.schema import StoreMeta, to_stored
from pipeline.store.writer import StoreWriter, make_hook_infos

DOCUMENTS = (DocumentInfo(name="a.py", bytes=10, sha256="0" * 64),)


def known_rows(rows, widths, *, seed=0, context=16):
    """Activations of non-zero mean and unequal variances, and columns with some rows flagged."""
    rng = np.random.default_rng(seed)
    acts = {}
    for name, width in widths.items():
        scale_D = np.exp(rng.normal(size=width))
        shift_D = rng.normal(size=width) * 5
        acts[name] = (rng.normal(size=(rows, width)) * scale_D + shift_D).astype(np.float32)
    pos = np.arange(rows) % context
    flags = np.where(pos == 0, FLAG_BOS | FLAG_FIRST, 0)
    flags[rng.random(rows) < 0.03] |= FLAG_OUTLIER
    values = {
        "doc": np.zeros(rows),
        "window": np.arange(rows) // context,
        "pos": pos,
        "token": rng.integers(0, 500, rows),
        "byte_offset": np.arange(rows) * 3,
        "flags": flags,
    }
    return acts, {name: values[name].astype(dtype) for name, dtype in COLUMN_DTYPES.items()}


def make_meta(rows, widths, *, dtype="float32", shard_rows=32, chunk_rows=8, **change):
    infos = make_hook_infos(widths, dict.fromkeys(widths, dtype), dict.fromkeys(widths, 123.456))
    settings = {"corpus_hash": "c", "config_hash": "h", "model": {"sha256": "m"}, "config": {"a": 1}, **change}
    return StoreMeta(
        rows=rows, shard_rows=shard_rows, chunk_rows=chunk_rows, hooks=infos, columns=dict(COLUMN_DTYPES), **settings
    )


def fill(path, meta, acts, columns, shards=None):
    """Write all (or the given) missing shards."""
    with StoreWriter(path, meta, DOCUMENTS) as writer:
        for shard in writer.missing() if shards is None else shards:
            rows = slice(*meta.shard_range(shard))
            stored = {h.name: to_stored(acts[h.name][rows], h.dtype) for h in meta.hooks}
            writer.commit_shard(shard, stored, {name: column[rows] for name, column in columns.items()})


class FailingBackend(Backend):
    """A folder whose `fail_at`-th put fails, before the object is there or after: as if the process were killed."""

    def __init__(self, folder, fail_at, *, after=False):
        self.inner, self.fail_at, self.after, self.puts = LocalBackend(folder), fail_at, after, 0
        self.location = self.local_path = folder

    def put(self, key, data):
        self.puts += 1
        if self.puts == self.fail_at and not self.after:
            raise OSError(errno.EIO, "injected")
        self.inner.put(key, data)
        if self.puts == self.fail_at:
            raise OSError(errno.EIO, "injected")

    def get(self, key):
        return self.inner.get(key)

    def get_range(self, key, start, length):
        return self.inner.get_range(key, start, length)

    def size(self, key):
        return self.inner.size(key)

    def list(self, prefix=""):
        return self.inner.list(prefix)

    def entries(self):
        return self.inner.entries()

    def delete(self, key):
        self.inner.delete(key)

    def lock(self):
        return self.inner.lock()

    def free_bytes(self):
        return self.inner.free_bytes()

    def open_zarr_store(self):
        return self.inner.open_zarr_store()


def files_of(path):
    """Relative path -> bytes of every file below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
