"""stdout and stderr that outlast who reads them: a closed pipe or a full disk behind them ends no run."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Lasting(io.FileIO):
    """The end of a standard stream. After an error all that is written to it goes nowhere; one of the type `dropped` is not raised."""

    def __init__(self, number: int, dropped: type[OSError]) -> None:
        super().__init__(number, "w", closefd=False)
        self.dropped = dropped

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            to_nowhere(self.fileno())
            if not isinstance(error, self.dropped):
                error.filename = "standard output"
                raise
            return memoryview(data).nbytes


def to_nowhere(number: int) -> None:
    """Let what is written to this file descriptor go nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def lasting(stream: TextIO | None, number: int, dropped: type[OSError]) -> TextIO:
    """A standard stream as a `Lasting` one. One that was closed goes nowhere, one that a test put there stays."""
    if stream is None:
        to_nowhere(number)
        return io.TextIOWrapper(io.BufferedWriter(Lasting(number, dropped)), encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(Lasting(number, dropped)), encoding=stream.encoding, errors=stream.errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


@contextmanager
def lasting_streams(*, results_elsewhere: bool) -> Iterator[None]:
    """While it is entered, stdout and stderr are `lasting`.

    stdout outlasts any error where the results lie elsewhere too, else only a reader that went away.

    Raises:
        OSError: at the end, what was printed could not be written.
    """
    before = sys.stdout, sys.stderr
    out = lasting(sys.stdout, 1, OSError if results_elsewhere else BrokenPipeError)
    ours = sys.stdout, sys.stderr = out, lasting(sys.stderr, 2, OSError)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in ours:
            stream.flush()
