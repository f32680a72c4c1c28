"""What commands speak through."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from .terminal import shown


class PlainConsole(Console):
    """Strings are printed as they are, brackets too, less what a terminal would obey; in a log each on one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **settings})
        self.soft_wrap = self.soft_wrap or not self.is_terminal

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(shown(o) if isinstance(o, str) else o for o in objects), **settings)
