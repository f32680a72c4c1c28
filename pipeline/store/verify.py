"""Whether a store is what its metadata, commits and checksums say: files, zarr's metadata, documents, statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.corpus.windows import FLAGS_ALL
from sae.errors import StoreError

from .backends import Backend
from .checks import parse_object
from .checksums import Checksums, read_checksums
from .commits import Commit, commit_key, read_shard_stats
from .encode import array_documents, shard_key
from .schema import CHECKSUMS_FILE, DOCS_FILE, META_FILE, STATS_FILE
from .summary import ranges, statistics_documents

if TYPE_CHECKING:
    from .reader import ActivationStore

ARRAY_FACTS = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something in a store that is not what it should be. `shard` -1: it is about the store."""

    shard: int = -1
    file: str
    what: str

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.file} {self.what}" if self.shard >= 0 else f"{self.file} {self.what}"


def verify_store(store: ActivationStore, *, progress: Callable[[int, int], None]) -> Iterator[Problem]:
    """Every problem there is, as it is found. `progress` gets bytes read and bytes in all.

    zarr's metadata, documents, commits, each file's size and sha256, flags, statistics, missing shards.
    """
    yield from sorted(store.damaged, key=lambda problem: problem.shard)  # object storage answers in any order
    noted: Checksums = {}
    try:
        noted = read_checksums(store.backend)
    except (OSError, ValueError) as error:
        yield Problem(file=CHECKSUMS_FILE, what=f"cannot be read ({error})")
    yield from _wrong_noted(store, META_FILE, noted)
    yield from _wrong_metadata(store)
    wrong_documents = [*_wrong_documents(store)] or [*_wrong_noted(store, DOCS_FILE, noted)]
    yield from wrong_documents
    total = sum(file["bytes"] for commit in store.commits for file in commit.files.values())
    done, commits_fit, named = 0, not store.damaged, -1
    for commit in store.commits:
        problems = [*_wrong_commit(store, commit)]
        changed = [*_wrong_noted(store, commit_key(commit.shard), noted, commit.shard)]
        commits_fit = commits_fit and not problems and not changed
        for key, expected in commit.files.items():
            what = wrong_file(store.backend, key, expected, True)
            if what:
                problems.append(Problem(shard=commit.shard, file=key, what=what))
            done += expected["bytes"]
            progress(done, total)
        problems = problems or [*_wrong_flags(store, commit)]
        if not problems:
            named = max(named, _last_document(store, commit))
        yield from problems or changed
    if not wrong_documents and named >= (count := sum(1 for _ in store.iter_documents())):
        yield Problem(file=DOCS_FILE, what=f"names {count} documents, there are rows of {named + 1}")
    if commits_fit:
        yield from _wrong_statistics(store)
    there = {commit.shard for commit in store.commits}
    missing = [shard for shard in range(store.meta.n_shards) if shard not in there]
    if missing:
        named = f"{len(missing)} of {store.meta.n_shards} shards ({ranges(missing)})"
        yield Problem(
            file=META_FILE, what=f"plans {named} that are not committed; `ggscope extract resume=RUN` captures them"
        )


def unchecked(store: ActivationStore) -> list[str]:
    """Files that no checksum is noted of: of an older store, or of a run that was killed."""
    try:
        noted = read_checksums(store.backend)
    except (OSError, ValueError):
        return []  # a problem
    return [key for key in (META_FILE, DOCS_FILE, *(commit_key(c.shard) for c in store.commits)) if key not in noted]


def wrong_file(backend: Backend, key: str, expected: dict[str, Any], checksums: bool, says: str = "its commit") -> str:
    """What is wrong with a file of this size and sha256; empty when nothing is."""
    size = backend.size(key)
    if size is None:
        return "is missing"
    if size != expected["bytes"]:
        return f"has {size} bytes, not {expected['bytes']}"
    try:
        if checksums and _sha256(backend, key, size) != expected["sha256"]:
            return f"has another sha256 than {says}"
    except (OSError, StoreError) as error:
        return f"cannot be read ({error})"
    return ""


def _sha256(backend: Backend, key: str, size: int) -> str:
    digest = hashlib.sha256()
    for chunk in backend.chunks(key, size):
        digest.update(chunk)
    return digest.hexdigest()


def _wrong_noted(store: ActivationStore, key: str, noted: Checksums, shard: int = -1) -> Iterator[Problem]:
    if key in noted and (what := wrong_file(store.backend, key, noted[key], True, CHECKSUMS_FILE)):
        yield Problem(shard=shard, file=key, what=what)


def _wrong_metadata(store: ActivationStore) -> Iterator[Problem]:
    for key, document in array_documents(store.meta).items():
        try:
            found = parse_object(store.backend.get(key))
        except (OSError, ValueError) as error:
            yield Problem(file=key, what=f"cannot be read ({error})")
            continue
        expected = json.loads(document)
        changed = [fact for fact in ARRAY_FACTS if found.get(fact) != expected.get(fact)]
        if changed:
            yield Problem(file=key, what=f"is not as the store was made: {', '.join(changed)} changed")


def _wrong_documents(store: ActivationStore) -> Iterator[Problem]:
    try:
        for _ in store.iter_documents():
            pass
    except StoreError as error:
        yield Problem(file=DOCS_FILE, what=f"cannot be used: {error}")


def _wrong_commit(store: ActivationStore, commit: Commit) -> Iterator[Problem]:
    """A commit against the metadata: its rows, its hooks, its files."""
    meta = store.meta

    def problem(what: str) -> Problem:
        return Problem(shard=commit.shard, file="commit", what=what)

    if commit.shard >= meta.n_shards:
        yield problem(f"is of a shard the store does not have: it has {meta.n_shards}")
        return
    start, stop = meta.shard_range(commit.shard)
    if commit.valid_rows != stop - start:
        yield problem(f"says {commit.valid_rows} valid rows, not {stop - start}")
    expected = {shard_key(hook.array_path, commit.shard, 2) for hook in meta.hooks}
    expected |= {shard_key(f"columns/{name}", commit.shard, 1) for name in meta.columns}
    if commit.files.keys() != expected:
        yield problem(f"names other files than the store's arrays: {', '.join(sorted(commit.files.keys() ^ expected))}")
    try:
        found = read_shard_stats(store.backend, commit.shard, {hook.name: hook.width for hook in meta.hooks})
    except StoreError as error:
        yield problem(f"has not the statistics of the store's hooks and widths: {error}")
        return
    for name, stats in found.items():
        if stats.count != commit.valid_rows - commit.flagged_rows:
            yield problem(f"counts {stats.count} rows at {name}, not {commit.valid_rows - commit.flagged_rows}")


def _wrong_flags(store: ActivationStore, commit: Commit) -> Iterator[Problem]:
    try:
        flags = store.shard_column("flags", commit)
    except StoreError as error:
        yield Problem(shard=commit.shard, file="flags", what=f"cannot be used: {error}")
        return
    flagged = int(np.count_nonzero(flags & FLAGS_ALL))
    if flagged != commit.flagged_rows:
        yield Problem(shard=commit.shard, file="commit", what=f"says {commit.flagged_rows} flagged rows, {flagged} are")


def _last_document(store: ActivationStore, commit: Commit) -> int:
    """The greatest number of a document that a row is of; -1 where the column cannot be read, which its zarr.json is told for."""
    try:
        return int(store.shard_column("doc", commit).max(initial=-1))
    except StoreError:
        return -1


def _wrong_statistics(store: ActivationStore) -> Iterator[Problem]:
    """Only of a finished store: while shards are missing the statistics are those of an earlier moment."""
    if not store.complete or store.backend.size(STATS_FILE) is None:
        return
    for key, document in statistics_documents(store).items():
        try:
            same = store.backend.get(key) == document
        except OSError:
            same = False
        if not same:
            yield Problem(
                file=key, what="is not the statistics of the commits; write it again with `ggscope extract resume=RUN`"
            )
