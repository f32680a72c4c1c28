"""The files of a corpus: local paths and globs with the standard library, anything else through fsspec.

A document is named by a relative POSIX path, never by a machine's absolute one, because the name
decides (`is_held_out`) on which side of the split it lies.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import importlib.util
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO, cast

from sae.errors import ConfigError

from .documents import UnusableError

COMPRESSED = (".gz", ".zst")
OBJECT_STORES = {"s3", "gs", "abfs"}  # obstore reads them where fsspec's own packages are not installed


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """`path` on this machine, or in the fsspec file system `remote`."""

    name: str
    path: str
    remote: Any = None

    @property
    def seekable(self) -> bool:
        """Whether any record can be read without those before it."""
        return self.remote is None and not self.path.endswith(COMPRESSED)

    def _opened(self) -> BinaryIO:
        return Path(self.path).open("rb") if self.remote is None else self.remote.open(self.path, "rb")

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """The bytes, decompressed where the name says so. What goes wrong inside comes out as UnusableError."""
        broken = (OSError, EOFError, zlib.error, *_failures_of(self.remote))
        with ExitStack() as stack:
            try:
                raw = self._opened()
                file = stack.enter_context(raw)
                if self.path.endswith(".gz"):
                    file = stack.enter_context(gzip.GzipFile(fileobj=raw))
                elif self.path.endswith(".zst"):
                    zstandard = optional("zstandard")
                    broken = (*broken, zstandard.ZstdError)
                    decompressor = zstandard.ZstdDecompressor()
                    file = stack.enter_context(
                        io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True), 1 << 17)
                    )
                yield cast(BinaryIO, file)
            except broken as error:
                raise UnusableError(f"unreadable ({reason(error)})") from None


def reason(error: Exception) -> str:
    """What an error of reading says, in one line."""
    said = str(error).partition("Debug source:")[0]  # obstore adds the error's structure
    return getattr(error, "strerror", None) or " ".join(said.split()).rstrip(": ") or type(error).__name__


def optional(package: str) -> ModuleType:
    """Import a package of the extra `data`; ConfigError where it is missing."""
    top = package.split(".")[0]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if (error.name or top).split(".")[0] != top:
            raise
        raise ConfigError(f"this corpus needs the package {top}; install it with pip install 'ggscope[data]'") from None


def is_url(pattern: str) -> bool:
    return "://" in pattern or "::" in pattern


def expand(paths: Sequence[str], kind: str) -> list[CorpusFile]:
    """The file(s) of every path, glob and URL, sorted by name, each file once.

    A name is the path below the part of the pattern before its first wildcard, so that it does not
    change with the folder the corpus lies in. Files whose names would collide keep the whole path.

    Raises ConfigError for no path at all and for one that matches no file.
    """
    if not paths:
        raise ConfigError(f"corpus.paths is empty; corpus.kind={kind} needs files or globs, as corpus.paths=[a.txt]")
    found: dict[str, CorpusFile] = {}
    whole: dict[str, str] = {}
    for pattern in paths:
        for key, long_name, file in _remote(pattern) if is_url(pattern) else _local(pattern):
            found.setdefault(key, file)
            whole.setdefault(key, long_name)
    uses = Counter(file.name for file in found.values())
    named = [
        file if uses[file.name] == 1 else CorpusFile(name=whole[key], path=file.path, remote=file.remote)
        for key, file in found.items()
    ]
    return sorted(named, key=lambda file: file.name)


def _local(pattern: str) -> list[tuple[str, str, CorpusFile]]:
    """`(what tells it from others, long name, file)`."""
    root = _static_prefix(pattern)
    files = [path for path in map(Path, glob.glob(pattern, recursive=True)) if not path.is_dir()]
    if not files:
        hint = f"; it is a folder, use '{pattern.rstrip('/')}/**/*.txt'" if Path(pattern).is_dir() else ""
        raise ConfigError(f"corpus.paths: {pattern!r} matches no file{hint}")
    return [
        (str(path.absolute()), path.as_posix(), CorpusFile(name=path.relative_to(root).as_posix(), path=str(path)))
        for path in files
    ]


def _static_prefix(pattern: str) -> Path:
    """The folder of a plain path, or the longest leading folder of a glob without a wildcard."""
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:wild])


def _remote(pattern: str) -> list[tuple[str, str, CorpusFile]]:
    remote, path, why = None, "", ""
    try:
        remote, path = _file_system(pattern)
        found = remote.glob(path, detail=True) if glob.has_magic(path) else {path: remote.info(path)}
        files = [file for file, about in found.items() if about["type"] != "directory"]
    except FileNotFoundError as error:
        said = reason(cast(Exception, error.__cause__ or error))
        files, why = [], "" if said.strip("/") in pattern else f" ({said})"
    except (OSError, ValueError, ImportError, NotImplementedError, *_failures_of(remote)) as error:
        raise ConfigError(f"corpus.paths: {pattern!r} cannot be opened ({reason(error)})") from None
    if not files:
        raise ConfigError(f"corpus.paths: {pattern!r} matches no file{why}")
    root = PurePosixPath(_static_prefix(path).as_posix())
    return [
        (
            f"{pattern.partition('://')[0]}://{file}",
            str(file),
            CorpusFile(name=_below(file, root), path=file, remote=remote),
        )
        for file in files
    ]


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fsspec = optional("fsspec")
    protocols = {part.partition("://")[0] for part in url.split("::")}
    options: dict[str, Any] = {}
    for protocol in protocols & OBJECT_STORES:
        through_obstore = _object_store(fsspec, protocol)
        if through_obstore and protocol == "s3" and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options[protocol] = {"client_options": {"allow_http": True}}
    return fsspec.core.url_to_fs(url, **options)


def _object_store(fsspec: Any, protocol: str) -> bool:
    """Make sure that something reads `protocol`; whether obstore does. ConfigError where neither package is there."""
    try:
        return fsspec.get_filesystem_class(protocol).__module__.startswith("obstore")
    except ImportError:
        if importlib.util.find_spec("obstore") is None:
            raise ConfigError(
                f"a corpus on {protocol}:// needs the package obstore; install it with pip install 'ggscope[s3]'"
            ) from None
    importlib.import_module("obstore.fsspec").register(protocol)
    return True


def _failures_of(remote: Any) -> tuple[type[Exception], ...]:
    """What a file system raises besides OSError."""
    if type(remote).__module__.startswith("obstore"):
        return (importlib.import_module("obstore.exceptions").BaseError,)
    return ()


def _below(file: str, root: PurePosixPath) -> str:
    """The path of a file below `root`; the file systems of fsspec do not agree on a leading slash."""
    inside = PurePosixPath(str(file).lstrip("/"))
    try:
        return inside.relative_to(str(root).lstrip("/") or ".").as_posix()
    except ValueError:
        return inside.name
