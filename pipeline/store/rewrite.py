"""Stores made of stores: several into one (merge), one packed anew (compact). Streamed, a shard at a time.

The new store is written by the ordinary writer, so a run that was killed goes on where it was, and until
the last shard is committed the new store says that shards are missing.

Thresholds of `outlier` are measured per store. In a merged store those of the first one hold: rows of a
store with other thresholds get the flag anew, from the norms of the stored values.
Letters: N rows, S rows per shard, D width of a hook.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.corpus.windows import FLAG_OUTLIER, DocumentInfo
from sae.errors import CheckFailedError, StoreError

from .backends import Backend, Location, absolute
from .reader import ActivationStore
from .schema import StoreMeta, flatten, meta_sha256, to_float32
from .summary import write_stats
from .writer import StoreWriter

# Settings that decide what a row is: rows of different ones do not belong in one store.
SAME_SETTINGS = ("context_tokens", "kv_type", "flash_attn")
BLOCK_ROWS = 4096
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A store that goes into another: its rows begin there at `first_row`, its ids at `first_doc`, `first_window`."""

    store: ActivationStore
    first_row: int
    first_doc: int
    first_window: int
    reflag: bool  # its outlier thresholds are not those of the new store


class Concatenation:
    """Rows of several stores one after another, as the rows of one store of `hooks`' thresholds."""

    def __init__(self, stores: Sequence[ActivationStore], *, renumber: bool) -> None:
        self.hooks = stores[0].meta.hooks
        self.sources: list[Source] = []
        row = doc = window = 0
        for store in stores:
            reflag = store.meta.hooks != self.hooks
            self.sources.append(Source(store=store, first_row=row, first_doc=doc, first_window=window, reflag=reflag))
            row += store.n_rows
            if renumber:
                doc += sum(1 for _ in store.iter_documents())
                window += _windows(store)
        self.n_rows = row

    def documents(self) -> Iterator[DocumentInfo]:
        for source in self.sources:
            yield from (DocumentInfo(**document) for document in source.store.iter_documents())

    def stored_rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        return np.concatenate([store.stored_rows(hook, low, high) for store, low, high in self._stores(start, stop)])

    def columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        parts = [_columns(source, low, high, self.hooks) for source, low, high in self._spans(start, stop)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _stores(self, start: int, stop: int) -> Iterator[tuple[ActivationStore, int, int]]:
        return ((source.store, low, high) for source, low, high in self._spans(start, stop))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        for source in self.sources:
            low, high = max(start - source.first_row, 0), min(stop - source.first_row, source.store.n_rows)
            if low < high:
                yield source, low, high


def merge(
    inputs: Sequence[Location], out: Location | Backend, *, shard_rows: int = 0, progress: Progress
) -> ActivationStore:
    """The committed rows of `inputs`, in that order, as a new store at `out`; every row is read back and compared.

    `shard_rows` 0: as in the first. `doc` and `window` count on from store to store. `progress` gets rows
    done and rows in all, twice over: written, then compared.

    Raises StoreError for stores that do not belong together (which names the difference) or hold the same
    corpus, CheckFailedError
    when a row comes back as another.
    """
    stores = [ActivationStore(place) for place in inputs]
    if len(stores) < 2:
        raise StoreError("merge takes two stores or more; give `ggscope store merge A B store.path=OUT`")
    _refuse_inputs(inputs, out)
    for store in stores[1:]:
        _refuse_strangers(stores[0], store)
    _refuse_repeats(stores)
    rows = Concatenation(stores, renumber=True)
    first = stores[0].meta
    origins = [_origin(store) for store in stores]
    common = {key: value for key, value in first.config.items() if all(s.meta.config.get(key) == value for s in stores)}
    meta = replace(
        first,
        rows=rows.n_rows,
        shard_rows=_shard_rows(first, shard_rows),
        corpus_hash=_hash(*(store.meta.corpus_hash for store in stores)),
        config_hash=_hash(*(origin["meta_sha256"] for origin in origins)),
        config={**common, "merged": origins},
    )
    return _write(rows, meta, out, progress)


def compact(place: Location, out: Location | Backend, *, shard_rows: int = 0, progress: Progress) -> ActivationStore:
    """The committed rows of a store, without holes and at `shard_rows` (0: as they were), as a new store at `out`.

    Documents and ids stay as they are. Raises like `merge`.
    """
    store = ActivationStore(place)
    _refuse_inputs([place], out)
    if not store.n_rows:
        raise StoreError(f"{store.path} has no committed row; run extract with resume")
    origin = {"meta_sha256": meta_sha256(store.backend), "rows": store.n_rows}
    meta = replace(
        store.meta,
        rows=store.n_rows,
        shard_rows=_shard_rows(store.meta, shard_rows),
        config_hash=_hash(origin["meta_sha256"], str(store.n_rows)),
        config={**store.meta.config, "compacted": origin},
    )
    return _write(Concatenation([store], renumber=False), meta, out, progress)


def _write(rows: Concatenation, meta: StoreMeta, out: Location | Backend, progress: Progress) -> ActivationStore:
    total = 2 * meta.rows
    with StoreWriter(out, meta, rows.documents()) as writer:
        for shard in writer.missing():
            start, stop = meta.shard_range(shard)
            acts = {hook.name: rows.stored_rows(hook.name, start, stop) for hook in meta.hooks}
            writer.commit_shard(shard, acts, rows.columns(start, stop))
            progress(stop, total)
        made = ActivationStore(writer.backend)
        for start in range(0, meta.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, meta.rows)
            _compare(rows, made, start, stop)
            progress(meta.rows + stop, total)
        writer.check_lock()
        write_stats(writer.backend)
    return made


def _compare(rows: Concatenation, made: ActivationStore, start: int, stop: int) -> None:
    pairs = {hook: (rows.stored_rows(hook, start, stop), made.stored_rows(hook, start, stop)) for hook in made.hooks}
    columns = rows.columns(start, stop)
    pairs |= {name: (columns[name], made.column_rows(name, start, stop)) for name in columns}
    for name, (expected, found) in pairs.items():
        if expected.tobytes() != found.tobytes():
            raise CheckFailedError(
                f"{made.path}: rows {start}:{stop} of {name} are not those of the stores they came from; "
                f"delete it and run again"
            )


def _columns(source: Source, start: int, stop: int, hooks: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Columns of rows of one store, ids counted on and flags as the new store's thresholds want them."""
    store = source.store
    found = {name: store.column_rows(name, start, stop) for name in store.meta.columns}
    found["doc"] = found["doc"] + found["doc"].dtype.type(source.first_doc)
    found["window"] = found["window"] + found["window"].dtype.type(source.first_window)
    if source.reflag:
        outlier_N = np.zeros(stop - start, bool)
        for hook in hooks:
            for low in range(start, stop, BLOCK_ROWS):
                high = min(low + BLOCK_ROWS, stop)
                x = to_float32(store.stored_rows(hook.name, low, high), hook.dtype)
                norm_N = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
                outlier_N[low - start : high - start] |= norm_N > hook.outlier_threshold
        found["flags"] = np.where(outlier_N, FLAG_OUTLIER, 0).astype(np.uint8) | (
            found["flags"] & ~np.uint8(FLAG_OUTLIER)
        )
    return found


def _windows(store: ActivationStore) -> int:
    """One more than the largest window number; windows are in the order of the rows."""
    return int(store.column_rows("window", store.n_rows - 1, store.n_rows)[0]) + 1 if store.n_rows else 0


def _shard_rows(meta: StoreMeta, wanted: int) -> int:
    """Rounded up to whole chunks."""
    return -(-(wanted or meta.shard_rows) // meta.chunk_rows) * meta.chunk_rows


def _refuse_inputs(inputs: Sequence[Location], out: Location | Backend) -> None:
    if not str(out):
        raise StoreError("expected store.path=OUT, where the new store goes, got nothing")
    places = [_place(place) for place in inputs]
    if _place(out) in places or len(set(places)) < len(places):
        raise StoreError("expected stores that are all different, got one twice; give a new store.path")


def _place(place: Location | Backend) -> str:
    return str(absolute(place.location if isinstance(place, Backend) else place))


def _refuse_strangers(first: ActivationStore, other: ActivationStore) -> None:
    """Raises StoreError naming what differs in model, hooks, number formats, columns or what a row is."""
    a, b = _identity(first.meta), _identity(other.meta)
    keys = sorted(a.keys() | b.keys())
    differences = [
        f"{key}: {a.get(key, 'absent')}, not {b.get(key, 'absent')}" for key in keys if a.get(key) != b.get(key)
    ]
    if differences:
        raise StoreError(
            f"{first.path} and {other.path} do not belong together ({'; '.join(differences[:4])}); "
            f"merge stores of one model with the same hooks, dtypes and settings"
        )


def _refuse_repeats(stores: Sequence[ActivationStore]) -> None:
    """Raises StoreError for two stores with rows of one corpus: merged, every row would count twice."""
    owners: dict[str, ActivationStore] = {}
    for store in stores:
        for corpus_hash in _corpora(store.meta):
            if corpus_hash in owners:
                raise StoreError(
                    f"{owners[corpus_hash].path} and {store.path} both hold rows of the corpus {corpus_hash[:12]}; "
                    f"merge stores of different corpora"
                )
        owners |= dict.fromkeys(_corpora(store.meta), store)


def _origin(store: ActivationStore) -> dict[str, Any]:
    """What a merged store says of one of its sources; `corpora` of a merged source, so that none is forgotten."""
    corpora = sorted(_corpora(store.meta))
    origin = {"meta_sha256": meta_sha256(store.backend), "corpus_hash": store.meta.corpus_hash, "rows": store.n_rows}
    return {**origin, "corpora": corpora} if len(corpora) > 1 else origin


def _corpora(meta: StoreMeta) -> set[str]:
    """Hashes of the corpora whose rows a store holds: its own and those of the stores merged into it."""
    origins = meta.config.get("merged")
    merged = [origin for origin in origins if isinstance(origin, dict)] if isinstance(origins, list) else []
    found = {meta.corpus_hash, *(str(origin.get("corpus_hash")) for origin in merged)}
    for origin in merged:
        found.update(map(str, corpora if isinstance(corpora := origin.get("corpora"), list) else ()))
    return found


def _identity(meta: StoreMeta) -> dict[str, Any]:
    model = {key: value for key, value in meta.model.items() if key != "name"}
    hooks = {hook.name: f"width {hook.width} {hook.dtype}" for hook in meta.hooks}
    settings = {key: meta.config.get(key) for key in SAME_SETTINGS}
    order = {"hooks": ", ".join(hook.name for hook in meta.hooks)}
    return {**flatten({"model": model, "columns": meta.columns, "config": settings}), **hooks, **order}


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
