"""Where a store lies: a folder, or a prefix of an object store. Bytes by key, written whole or not at all.

Keys are relative paths with `/`. A `put` is atomic and durable: after a crash the object is the old one,
the new one or absent. Nothing here knows zarr or what the bytes mean.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypeAlias, TypeVar, final

from sae.errors import StoreError

if TYPE_CHECKING:
    from zarr.abc.store import Store

Location: TypeAlias = str | Path
Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")
R = TypeVar("R")

LOCK_FILE = ".lock"
PARTIAL = ".partial"  # ends the name of a file that is being written
OWN_PARTIAL = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(PARTIAL)}$")
CHUNK_BYTES = 8 << 20  # of a read of something long
S3_SCHEME = "s3://"


class Lock(ABC):
    """A store held for one writer, until `close` or the end of the `with` block."""

    @abstractmethod
    def check(self) -> None:
        """Raises StoreError when the store is not held any more."""

    @abstractmethod
    def close(self) -> None:
        """Give the store back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """Bytes by key. `location`: as people write it. `local_path`: the folder, where it is one."""

    location: Location
    local_path: Path | None = None
    at_once: int = 4  # requests that `each` has under way

    @abstractmethod
    def get(self, key: str) -> bytes:
        """All bytes of an object. Raises FileNotFoundError."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`. Raises FileNotFoundError; StoreError where there are fewer."""

    @abstractmethod
    def put(self, key: str, data: Buffer | Iterable[Buffer]) -> None:
        """Write an object, given whole or in pieces; it is there, whole and durable, when this returns."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin with the folder `prefix` (empty, or ending with `/`), sorted; unfinished writes left out."""

    @abstractmethod
    def entries(self) -> set[str]:
        """First components of all keys, those of our unfinished writes left out."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Take an object away; one that is not there is no error."""

    @abstractmethod
    def lock(self) -> Lock:
        """Hold the store. Raises StoreError when another run does."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room that is left; None where nothing says so."""

    @abstractmethod
    def open_zarr_store(self) -> Store:
        """zarr's own view of it, for reading."""

    def remove_partial(self) -> None:  # noqa: B027  object stores keep none
        """Remove what writers that were killed left behind. Only under the lock."""

    def each(self, call: Callable[[T], R], items: Sequence[T]) -> Sequence[R]:
        """`call` of every item, in order of the items, several at a time: a disk and a network answer many as soon as one."""
        if len(items) < 2:
            return [call(item) for item in items]
        with ThreadPoolExecutor(min(self.at_once, len(items))) as pool:
            return list(pool.map(call, items))

    @contextmanager
    def descriptor(self, key: str) -> Iterator[int | None]:
        """An open file of an object; None where objects are no files. Raises FileNotFoundError."""
        yield None

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of an object, in pieces of bounded size."""
        for start in range(0, size, CHUNK_BYTES):
            yield self.get_range(key, start, min(CHUNK_BYTES, size - start))


@final
class LocalBackend(Backend):
    """A folder. Reads are `pread`s: mapped pages would count as the process's memory."""

    def __init__(self, folder: Path) -> None:
        self.location = self.local_path = self.folder = folder

    def get(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    @contextmanager
    def descriptor(self, key: str) -> Iterator[int | None]:
        descriptor = os.open(self.folder / key, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self.descriptor(key) as descriptor:
            assert descriptor is not None
            data = os.pread(descriptor, length, start)
            if len(data) < length:  # one call reads at most 2 GiB
                parts = [data]
                while parts[-1] and sum(map(len, parts)) < length:
                    done = sum(map(len, parts))
                    parts.append(os.pread(descriptor, length - done, start + done))
                data = b"".join(parts)
        return whole(data, length, f"{self.folder / key}")

    def put(self, key: str, data: Buffer | Iterable[Buffer]) -> None:
        path = self.folder / key
        make_folders(path.parent)
        # A name of its own: two workers may write the same shard at once.
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            with temporary.open("wb", buffering=0) as file:
                for piece in pieces(data):
                    write_all(file, piece)
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)

    def size(self, key: str) -> int | None:
        try:
            return (self.folder / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> list[str]:
        found = (self.folder / prefix).rglob("*")
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in found
            if not path.name.endswith(PARTIAL) and path.is_file()
        )

    def entries(self) -> set[str]:
        names = {entry.name for entry in self.folder.iterdir()} if self.folder.is_dir() else set()
        return {name for name in names if not OWN_PARTIAL.search(name)}

    def delete(self, key: str) -> None:
        path = self.folder / key
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            fsync_folder(path.parent)

    def lock(self) -> Lock:
        return _FileLock(self.folder)

    def free_bytes(self) -> int | None:
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        return shutil.disk_usage(there).free

    def open_zarr_store(self) -> Store:
        from zarr.storage import LocalStore

        return LocalStore(self.folder, read_only=True)

    def remove_partial(self) -> None:
        for stray in self.folder.rglob(f"*{PARTIAL}"):
            stray.unlink(missing_ok=True)  # a worker that still runs takes its own away


class _FileLock(Lock):
    """flock of a file in the folder: the system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        make_folders(folder)
        self._file: IO[bytes] = (folder / LOCK_FILE).open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise StoreError(f"another run is writing into {folder}; wait for it or give another store.path") from None
        except OSError as error:
            self._file.close()
            raise StoreError(f"cannot lock {folder} ({error.strerror}); put the store on a local disk") from None

    def check(self) -> None:
        return

    def close(self) -> None:
        self._file.close()


def as_location(text: Location) -> Location:
    """`s3://...` as text, a folder as a Path; a URL that went through Path (`s3:/bucket`) is mended.

    Raises StoreError for a URL of another kind.
    """
    named = str(text)
    if named.startswith("s3:/"):
        return S3_SCHEME + named.removeprefix("s3:").strip("/")
    if "://" in named:
        raise StoreError(f"expected a folder or s3://bucket/prefix, got {named}")
    return Path(text).expanduser()


def absolute(text: Location) -> Location:
    """`as_location`, a folder from the root: it means the same in every process and working folder."""
    place = as_location(text)
    return place if isinstance(place, str) else place.resolve()


def open_backend(location: Location | Backend) -> Backend:
    """The backend of a folder or `s3://bucket/prefix`. Raises StoreError for a URL of another kind."""
    if isinstance(location, Backend):
        return location
    place = as_location(location)
    if isinstance(place, str):
        from .object_store import ObjectBackend

        return ObjectBackend(place)
    return LocalBackend(place)


def pieces(data: Buffer | Iterable[Buffer]) -> Iterator[memoryview]:
    """The bytes of `data` in views of at most CHUNK_BYTES."""
    for part in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
        view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def whole(data: bytes, length: int, name: str) -> bytes:
    """Raises StoreError when fewer than `length` bytes came."""
    if len(data) != length:
        raise StoreError(f"{name} is cut short: expected {length} more bytes, got {len(data)}")
    return data


def write_all(file: Any, view: memoryview) -> None:
    """An unbuffered file may take less than all of it at once."""
    while len(view):
        view = view[file.write(view) :]


def make_folders(folder: Path) -> None:
    """mkdir -p, each new folder's name durable."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
