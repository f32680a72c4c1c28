"""A store in S3-compatible object storage, through obstore; and the lease that keeps two writers apart.

Endpoint, region and keys come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ENDPOINT_URL. An endpoint that says http:// is used as such.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from sae.errors import StoreError

from .backends import CHUNK_BYTES, LOCK_FILE, S3_SCHEME, Backend, Buffer, Lock, pieces, whole

if TYPE_CHECKING:
    from zarr.abc.store import Store

RETRIES = 4
RETRY_SECONDS = 60
LEASE_SECONDS = 60.0
RENEWALS_PER_LEASE = 3
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
T = TypeVar("T")
R = TypeVar("R")


@final
class ObjectBackend(Backend):
    """Objects below `s3://bucket/prefix`. An object is whole or absent; the storage keeps it durable.

    Not to be carried across a fork: obstore runs threads of its own. Open it anew in the child.
    """

    at_once = 8

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix(S3_SCHEME).partition("/")
        if not bucket:
            raise StoreError(f"expected s3://bucket/prefix, got {url}")
        self.location = url
        self._obstore, self._errors = _import_obstore()
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        with self._answers():
            self._store = self._obstore.store.S3Store(
                bucket,
                prefix=prefix.strip("/") or None,
                client_options={"allow_http": endpoint.startswith("http://")},
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            )

    def get(self, key: str) -> bytes:
        return self.get_versioned(key)[0]

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """All bytes of an object, and the e_tag that names this version of it."""
        with self._answers():
            answer = self._obstore.get(self._store, key)
            return bytes(answer.bytes()), answer.meta["e_tag"]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if not length:
            return b""
        starts = range(start, start + length, CHUNK_BYTES)
        parts = self.each(lambda at: self._range(key, at, min(CHUNK_BYTES, start + length - at)), starts)
        return whole(parts[0] if len(parts) == 1 else b"".join(parts), length, f"{self.location}/{key}")

    def put(self, key: str, data: Buffer | Iterable[Buffer]) -> None:
        if isinstance(data, bytes | bytearray | memoryview | Sequence):
            self._put(key, data if isinstance(data, bytes) else pieces(data))
            return
        # Lazy data may come out of object storage themselves, and obstore cannot be called while it takes what it puts.
        with tempfile.SpooledTemporaryFile(max_size=CHUNK_BYTES) as spool:
            for piece in pieces(data):
                spool.write(piece)
            spool.seek(0)
            self._put(key, iter(lambda: spool.read(CHUNK_BYTES), b""))

    def put_if(self, key: str, data: bytes, e_tag: str | None) -> str | None:
        """Write where the object is absent (`e_tag` None) or still that version; returns the new e_tag.

        None: someone else was quicker.
        """
        mode: Any = "create" if e_tag is None else {"e_tag": e_tag}
        try:
            with self._answers():
                return self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)["e_tag"]
        except (_TakenError, FileNotFoundError):
            return None

    def size(self, key: str) -> int | None:
        try:
            with self._answers():
                return self._obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        with self._answers():
            return sorted(item["path"] for batch in self._obstore.list(self._store, prefix or None) for item in batch)

    def entries(self) -> set[str]:
        with self._answers():
            found = self._obstore.list_with_delimiter(self._store)
        return {item["path"] for item in found["objects"]} | {name.strip("/") for name in found["common_prefixes"]}

    def delete(self, key: str) -> None:
        try:
            with self._answers():
                self._obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def lock(self) -> Lock:
        return Lease(self)

    def free_bytes(self) -> int | None:
        return None

    def open_zarr_store(self) -> Store:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=True)

    def _put(self, key: str, data: bytes | Iterator[Buffer]) -> None:
        with self._answers():
            self._obstore.put(self._store, key, data)

    def _range(self, key: str, start: int, length: int) -> bytes:
        with self._answers():
            return bytes(self._obstore.get_range(self._store, key, start=start, length=length))

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """What the storage refuses or cannot do becomes one line; an object that is not there FileNotFoundError."""
        errors = self._errors
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" not in str(error):
                raise FileNotFoundError(_first_line(error)) from None
            raise StoreError(
                f"{self.location}: the bucket does not exist; make it or give another store.path"
            ) from None
        except (errors.AlreadyExistsError, errors.PreconditionError):
            raise _TakenError from None
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise StoreError(
                f"{self.location}: no access ({_first_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except (errors.BaseError, ValueError) as error:
            reason = "the bucket does not exist" if "NoSuchBucket" in str(error) else _first_line(error)
            raise StoreError(
                f"{self.location} cannot be used: {reason}; AWS_ENDPOINT_URL, AWS_REGION and the keys decide where it is"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease, and until when (seconds since 1970, the holder's clock; 0: given back).

    `machine`: where `pid` means a process (`machine_id`); empty where nothing says so.
    """

    host: str
    pid: int
    id: str
    expires: float
    machine: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """A lease that cannot be read holds nothing."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls(host="", pid=0, id="", expires=0.0)

    def holds(self, now: float) -> bool:
        """Not expired, and not of a process that would be seen here and is gone. A host's name says too little:
        two containers may share one."""
        seen_here = bool(self.machine) and self.machine == machine_id()
        return self.expires > now and not (seen_here and not _alive(self.pid))


class Lease(Lock):
    """An object that says who writes into the store; made and renewed by conditional puts only.

    A thread renews it. A holder that cannot (no network, its machine asleep) loses it when it expires:
    from then on `check` raises. Clocks of writers on several machines must agree to some seconds.
    """

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend = backend
        self._holder = Holder(
            host=socket.gethostname(), pid=os.getpid(), id=secrets.token_hex(8), expires=0.0, machine=machine_id()
        )
        self._lost = False
        self._stop = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="store lease")
        self._thread.start()

    def check(self) -> None:
        if self._lost or self._holder.expires <= time.time():
            raise StoreError(
                f"the lease of {self._backend.location} was lost, another run may be writing into it; "
                f"committed shards are safe, resume when that one has ended"
            )

    def close(self) -> None:
        """A lease given back is written, not deleted: a delete could meet that of the next holder."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._write(0.0)

    def _take(self) -> None:
        backend, e_tag, there = self._backend, None, None
        try:
            data, e_tag = backend.get_versioned(LOCK_FILE)
            there = Holder.parse(data)
        except FileNotFoundError:
            pass
        if there is not None and there.holds(time.time()):
            until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(there.expires))
            raise StoreError(
                f"another run is writing into {backend.location} (host {there.host}, process {there.pid}, "
                f"lease until {until}); wait for it or give another store.path"
            )
        self._e_tag = e_tag
        if not self._write(time.time() + LEASE_SECONDS):
            raise StoreError(f"another run is writing into {backend.location}; wait for it or give another store.path")

    def _write(self, expires: float) -> bool:
        """Put the lease with a new expiry; False where it is not ours any more."""
        holder = replace(self._holder, expires=expires)
        data = json.dumps(asdict(holder), sort_keys=True).encode()
        e_tag = self._backend.put_if(LOCK_FILE, data, self._e_tag)
        if e_tag is None and (current := self._own_version()):  # an answer got lost and the put came twice
            e_tag = self._backend.put_if(LOCK_FILE, data, current)
        if e_tag is None:
            return False
        self._holder, self._e_tag = holder, e_tag
        return True

    def _own_version(self) -> str | None:
        """The e_tag of the lease if it is ours."""
        try:
            data, e_tag = self._backend.get_versioned(LOCK_FILE)
        except FileNotFoundError:
            return None
        return e_tag if Holder.parse(data).id == self._holder.id else None

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / RENEWALS_PER_LEASE):
            try:
                self._lost = not self._write(time.time() + LEASE_SECONDS)
            except StoreError:
                continue  # not reachable: the next try comes before the lease expires, or `check` says so
            if self._lost:
                return


class _TakenError(Exception):
    """A conditional put met another object than it expected."""


def machine_id() -> str:
    """This boot of this machine and this namespace of process numbers; empty where the system does not tell."""
    try:
        return f"{BOOT_ID.read_text().strip()}/{PID_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(": <?xml")[0].strip().rstrip(":")


def _import_obstore() -> tuple[Any, Any]:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StoreError("a store on s3:// needs obstore: pip install 'ggscope[s3]'") from None
    return obstore, obstore.exceptions
