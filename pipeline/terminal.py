"""Text from files on a terminal: nothing in it moves the cursor or hides. Without rich: the command line starts with it."""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"  # the last two are part of how some scripts and emoji are spelled


def shown(text: str) -> str:
    r"""The text with control and formatting characters spelled out: `\x1b` for ESC."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode() for c in text
    )
