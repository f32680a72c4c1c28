"""llama.cpp's log lines: kept, not printed; the error goes into the exception's message."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

from .symbols import lc

_WARN, _ERROR, _CONTINUED = 3, 4, 5
_KEPT_LINES = 400


class LogTail:
    """The newest lines llama.cpp wrote, with their level."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=_KEPT_LINES)
        self._callback = lc.llama_log_callback(self._keep)  # must live as long as llama.cpp may log

    def install(self) -> None:
        """Send llama.cpp's output here from now on; every model load calls it, others may have changed it."""
        lc.llama_log_set(self._callback, ctypes.c_void_p(0))

    def clear(self) -> None:
        self.lines.clear()

    def reason(self, fallback: str) -> str:
        """The first error line since `clear` (or warning, when there is no error), without the C function's name.

        The first one is the cause; those after it say that the caller failed too.
        """
        for wanted in (_ERROR, _WARN):
            for level, text in self.lines:
                if level == wanted:
                    head, colon, rest = text.partition(": ")
                    return rest if colon and " " not in head else text
        return fallback

    def _keep(self, level: int, text: bytes, _user_data: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == _CONTINUED and self.lines:
            level, start = self.lines.pop()
            line = f"{start} {line}".strip()
        if line:
            self.lines.append((level, line))


log_tail = LogTail()
log_tail.install()
