"""The plan of a capture: which windows share a llama_decode, which rows lie in which shard.

Fixed before the first decode and a pure function of the window table and the settings, so that a run
that was killed recomputes exactly the batches it still needs. Letters: N rows, S rows per shard.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import ExtractConfig, StoreConfig
from sae.errors import ConfigError

from .table import COLUMN_DTYPES, WindowTable

MAX_SEQUENCES = 64  # of one llama_decode
KV_CELLS_PER_TOKEN = 2  # every sequence has KV cells for a whole window; short windows may leave half of them unused
SHARDS_WANTED = 16  # a kill loses at most one shard of work: small corpora get several
MIN_CHUNK_ROWS = 16
DTYPES = {"auto": 2, "float16": 2, "bfloat16": 2, "float32": 4}  # bytes of a stored value
COLUMN_BYTES = sum(np.dtype(dtype).itemsize for dtype in COLUMN_DTYPES.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Rows, batches and shards of a capture.

    Batch b holds windows `batch_windows[b] : batch_windows[b + 1]`, which are rows
    `batch_rows[b] : batch_rows[b + 1]`. Shard k holds rows k S to (k + 1) S of every array; the last
    one is padded. A batch across a shard border is computed for both when they are done apart.
    """

    rows: int
    shard_rows: int
    chunk_rows: int  # divides shard_rows
    batch_windows: np.ndarray  # int64 (batches + 1)
    batch_rows: np.ndarray
    hooks: dict[str, int]  # hook point -> width
    itemsize: int
    corpus_hash: str
    config_hash: str

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def n_batches(self) -> int:
        return len(self.batch_rows) - 1

    @property
    def padded_rows(self) -> int:
        return self.n_shards * self.shard_rows

    @property
    def max_batch_rows(self) -> int:
        return int(np.diff(self.batch_rows).max())

    @property
    def max_batch_windows(self) -> int:
        return int(np.diff(self.batch_windows).max())

    @property
    def shard_bytes(self) -> int:
        """Size of one shard of all hooks and columns, index blocks left aside."""
        return self.shard_rows * (sum(self.hooks.values()) * self.itemsize + COLUMN_BYTES)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and past-the-last valid row of a shard."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def batches_of(self, row_start: int, row_stop: int) -> range:
        """The batches that hold any of the rows `row_start : row_stop`."""
        first = int(np.searchsorted(self.batch_rows, row_start, side="right")) - 1
        last = int(np.searchsorted(self.batch_rows, row_stop, side="left"))
        return range(first, last)

    def as_dict(self) -> dict[str, Any]:
        """What a store records of its plan."""
        return {
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "n_shards": self.n_shards,
            "n_batches": self.n_batches,
            "corpus_hash": self.corpus_hash,
            "config_hash": self.config_hash,
        }


def make_plan(table: WindowTable, *, hooks: dict[str, int], extract: ExtractConfig, store: StoreConfig) -> Plan:
    """Whole windows greedily into batches of at most `extract.batch_tokens` rows, rows into shards.

    `hooks`: hook point to width. S is such that two shard buffers of all hooks fit `store.buffer_bytes`,
    at most a sixteenth of the rows, and a multiple of the chunk rows (a power of two whose widest chunk
    fits `store.chunk_bytes`). A given `store.shard_rows` is rounded up to such a multiple.

    Raises ConfigError when a window does not fit a batch, a row not the buffer, or the dtype is unknown.
    """
    if not hooks:
        raise ConfigError("hook.points is empty; name at least one, such as blocks.3.hook_resid_post")
    if extract.dtype not in DTYPES:
        raise ConfigError(f"extract.dtype={extract.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    itemsize = DTYPES[extract.dtype]
    chunk_rows, shard_rows = _layout(table.rows, hooks, itemsize, store)
    window_starts = np.asarray(table.window_starts)  # 8 bytes a window, the only thing held of a table on disk
    batch_windows = _batches(window_starts, extract.batch_tokens, table.context_tokens)
    layout = {"hooks": hooks, "shard_rows": shard_rows, "chunk_rows": chunk_rows, "dtype": extract.dtype}
    batches = hashlib.sha256(batch_windows.tobytes()).hexdigest()
    described = json.dumps({**layout, "batches": batches}, sort_keys=True)
    return Plan(
        rows=table.rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        batch_windows=batch_windows,
        batch_rows=window_starts[batch_windows],
        hooks=dict(hooks),
        itemsize=itemsize,
        corpus_hash=table.corpus_hash,
        config_hash=hashlib.sha256(described.encode()).hexdigest(),
    )


def _layout(rows: int, hooks: dict[str, int], itemsize: int, store: StoreConfig) -> tuple[int, int]:
    """`(chunk_rows, shard_rows)`."""
    row_bytes = sum(hooks.values()) * itemsize
    most = store.buffer_bytes // (2 * row_bytes)
    if most < 1:
        raise ConfigError(
            f"store.buffer_bytes={store.buffer_bytes} does not hold two rows of {row_bytes} bytes; give more"
        )
    wanted = store.shard_rows if store.shard_rows > 0 else min(most, max(MIN_CHUNK_ROWS, -(-rows // SHARDS_WANTED)))
    chunk_limit = max(1, min(store.chunk_bytes // (max(hooks.values()) * itemsize), wanted))
    chunk_rows = 1 << (chunk_limit.bit_length() - 1)
    rounded_up = -(-wanted // chunk_rows) * chunk_rows
    if rounded_up > most and store.shard_rows <= 0:
        return chunk_rows, max(chunk_rows, most // chunk_rows * chunk_rows)
    return chunk_rows, rounded_up


def _batches(window_starts: np.ndarray, batch_tokens: int, context_tokens: int) -> np.ndarray:
    """Greedy borders: each batch takes windows in order while they fit."""
    most = min(MAX_SEQUENCES, max(1, KV_CELLS_PER_TOKEN * batch_tokens // context_tokens))
    longest = int(np.diff(window_starts).max())
    if longest > batch_tokens:
        raise ConfigError(
            f"extract.batch_tokens={batch_tokens} is less than a window of {longest} tokens; "
            f"give at least corpus.context_tokens"
        )
    n_windows = len(window_starts) - 1
    borders = [0]
    while borders[-1] < n_windows:
        start = borders[-1]
        fits = int(np.searchsorted(window_starts, window_starts[start] + batch_tokens, side="right")) - 1
        borders.append(min(fits, start + most, n_windows))
    return np.array(borders, np.int64)
