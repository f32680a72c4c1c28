"""What the packages log as a warning, on the command line: a line on stderr as other warnings are."""

from __future__ import annotations

import logging
import sys
import warnings

from .terminal import shown

PACKAGES = ("sae", "pipeline", "convert")


class WarningLines(logging.Handler):
    """Prints each message once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = shown(" ".join(record.getMessage().split()))
        if line not in self.said:
            self.said.add(line)
            sys.stderr.write(f"warning: {line}\n")


def show_warnings() -> None:
    """Print the warnings of our packages; of others only errors are. Nor those about letters that a picture's font lacks."""
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    logging.getLogger().setLevel(logging.ERROR)
    lines = WarningLines()
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers = [h for h in logger.handlers if not isinstance(h, WarningLines)] + [lines]
