"""Where `ggscope` begins. Until a command has something to end in order, Ctrl-C simply ends the process: an exception in
the middle of imports comes out as a traceback, or as another error."""

from __future__ import annotations

import signal


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    return main()


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
