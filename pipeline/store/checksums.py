"""checksums.json: bytes and sha256 of the files that no commit names: meta.json, docs.jsonl and the commits themselves.

The first two are noted when the store is made, the commits when a run ends. Older stores have no such file until then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from .backends import Backend
from .checks import inside, of_kind, only_keys, parse_object, whole_number
from .commits import MAX_BYTES, commit_key
from .schema import CHECKSUMS_FILE, DOCS_FILE, META_FILE, dump_json

Checksums = dict[str, dict[str, Any]]  # key of a file -> {"bytes", "sha256"}


class Counted:
    """Pieces of a file on their way to it; `checksum` once all have passed."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._bytes, self._digest = pieces, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._bytes += len(piece)
            self._digest.update(piece)
            yield piece

    @property
    def checksum(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def checksum_at(backend: Backend, key: str) -> dict[str, Any]:
    """Of the file as it is. Raises FileNotFoundError."""
    size = backend.size(key)
    if size is None:
        raise FileNotFoundError(f"{backend.location}/{key}")
    counted = Counted(backend.chunks(key, size))
    for _ in counted:
        pass
    return counted.checksum


def read_checksums(backend: Backend) -> Checksums:
    """What is noted; empty for a store without. Raises ValueError for a file that notes no checksums, OSError."""
    try:
        found = parse_object(backend.get(CHECKSUMS_FILE))
    except FileNotFoundError:
        return {}
    for key, file in found.items():
        only_keys(of_kind(file, dict, inside(key, "keys")), {"bytes", "sha256"}, key)
        whole_number(file["bytes"], f"bytes of {key}", most=MAX_BYTES)
        of_kind(file["sha256"], str, f"sha256 of {key}")
    return found


def write_checksums(backend: Backend, found: Checksums) -> None:
    backend.put(CHECKSUMS_FILE, dump_json(found))


def note_checksums(backend: Backend, shards: Iterable[int]) -> None:
    """Note what is not noted yet, as it is. What is stays: a file that changed since is damaged."""
    noted = _usable(backend)
    keys = [key for key in (META_FILE, DOCS_FILE, *map(commit_key, shards)) if key not in noted]
    found = backend.each(lambda key: checksum_at(backend, key), keys)
    write_checksums(backend, noted | dict(zip(keys, found, strict=True)))


def forget_commits(backend: Backend, there: Iterable[int]) -> None:
    """Forget the commits that are not `there` any more: their shards will be captured again."""
    noted, kept = _usable(backend), {META_FILE, DOCS_FILE, *map(commit_key, there)}
    if noted.keys() - kept:
        write_checksums(backend, {key: file for key, file in noted.items() if key in kept})


def _usable(backend: Backend) -> Checksums:
    """What is noted; nothing where the file is damaged, which verify says until a run writes it anew."""
    try:
        return read_checksums(backend)
    except ValueError:
        return {}
