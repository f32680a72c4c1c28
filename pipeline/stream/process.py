"""The trainer's side of a streamed training: the capturing child, and the blocks it was asked for. No llama.cpp here."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sae.errors import LlamaError, SAEError

from ..config import Config
from .messages import Header, NotFinite, Slots, shared_file

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedBlock:
    """The unflagged rows of a block, in a slot of the queue until it is released."""

    block: int
    slot: int
    stored_nD: np.ndarray  # the store's format
    sum_D: np.ndarray
    centred_D: np.ndarray
    not_finite: NotFinite  # rows of the block that are left out


class CaptureProcess:
    """The child that captures: `header` when it is ready, then the blocks of `follow` in that order.

    At most `config.trainer.queue_batches` blocks are captured and not released. `known`: the calibration of the run
    that is resumed. A context manager; start it in the main thread (Linux kills the child when that thread ends).

    Raises what the child raised; LlamaError when the child died.
    """

    def __init__(self, config: Config, folder: Path, known: dict[str, Any] | None = None) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._closed = False
        self._count = config.trainer.queue_batches
        self._free = deque(range(self._count))
        self._asked: deque[tuple[int, int]] = deque()  # (slot, block) that will come, in order
        self._unwanted = 0  # the first of them belong to an order that was given up
        self._coming: Iterator[int] = iter(())
        descriptor = shared_file()
        try:
            self._process = self._start(theirs, descriptor)
            self.header = self._greet(config, folder, known)
            self._slots = Slots(descriptor, self.header, self._count)
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the child at once; it has nothing to save."""
        self._closed = True
        self._process.kill()
        self._process.wait()

    def _start(self, theirs: Connection, descriptor: int) -> subprocess.Popen[bytes]:
        numbers = (theirs.fileno(), descriptor, os.getpid())
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.stream.child", *map(str, numbers)],
                pass_fds=numbers[:2],
                start_new_session=True,  # Ctrl-C on the terminal is for the parent alone
            )

    def _greet(self, config: Config, folder: Path, known: dict[str, Any] | None) -> Header:
        try:
            self._send((config, str(folder), known, self._count))
            return self._receive("header")[0]
        except BaseException:
            self.close()
            raise

    def follow(self, blocks: Iterable[int]) -> None:
        """Capture these blocks, in this order, from the next `take` on; blocks taken before are given up."""
        self._coming, self._unwanted = iter(blocks), len(self._asked)
        self._free = deque(set(range(self._count)) - {slot for slot, _ in self._asked})

    def ready(self) -> bool:
        """Whether `take` would not wait."""
        self._ask()
        while self._unwanted and self._connection.poll(0):
            self._drop()
        return bool(self._asked) and not self._unwanted and self._connection.poll(0)

    def take(self) -> CapturedBlock:
        """The next block; waits for it."""
        self._ask()
        while self._unwanted:
            self._drop()
        return self._next()

    def _drop(self) -> None:
        """Take a block nobody wants any more, and ask for one that is wanted."""
        self._unwanted -= 1
        self.release(self._next())

    def release(self, block: CapturedBlock) -> None:
        """Give the slot back; its arrays must not be used any more."""
        self._free.append(block.slot)
        self._ask()

    def _next(self) -> CapturedBlock:
        assert self._asked, "a block is waited for that nobody asked for: none is left, or no slot is free"
        slot, block, count, not_finite = self._receive("block")
        assert (slot, block) == self._asked.popleft(), "blocks come in the order they were asked for"
        sum_D, centred_D = self._slots.sums(slot)
        return CapturedBlock(
            block=block, slot=slot, stored_nD=self._slots.rows(slot, count), sum_D=sum_D, centred_D=centred_D,
            not_finite=not_finite,
        )  # fmt: skip

    def _ask(self) -> None:
        """Ask for blocks while slots are free."""
        for block in itertools.islice(self._coming, len(self._free)):
            self._asked.append((self._free.popleft(), block))
            self._send(self._asked[-1])

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended; the next `_receive` finds out how

    def _receive(self, kind: str) -> tuple[Any, ...]:
        """The next message, which must be of this kind; raises the child's error."""
        try:
            while not self._connection.poll(POLL_SECONDS):
                if self._closed:
                    raise self._end()
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._end() from None
        if message[0] == "error":
            _, error, trace = message
            if not isinstance(error, SAEError | OSError):
                error.add_note(f"in the capture process:\n{trace}")
            raise error
        assert message[0] == kind, f"expected {kind}, got {message[0]}"
        return message[1:]

    def _end(self) -> LlamaError:
        if self._closed:
            return LlamaError("the capture process was stopped")
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return LlamaError(
            f"the capture process died: {how}{hint}; resume=latest continues from the last checkpoint, if there is one"
        )
