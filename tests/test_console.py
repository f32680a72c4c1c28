"""What commands speak through."""

from __future__ import annotations

import io

from pipeline.console import PlainConsole


def test_a_line_of_a_log_is_one_line_a_terminal_wraps():
    text = "warning: " + "word " * 60
    for terminal in (False, True):
        log = io.StringIO()
        PlainConsole(file=log, width=80, force_terminal=terminal, color_system=None).print(text, style="yellow")
        assert (len(log.getvalue().splitlines()) == 1) is not terminal
