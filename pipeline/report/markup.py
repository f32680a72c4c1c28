"""Text of the corpus and the model as HTML: escaped, with white space and control characters made visible."""

from __future__ import annotations

import html
import math

# A space is a middle dot, a line end a return arrow, a tab an arrow; <i> keeps them faint.
VISIBLE = {" ": "<i>·</i>", "\n": "<i>↵</i>", "\t": "<i>⇥</i>", "\r": "<i>␍</i>"}


def escape(text: object) -> str:
    """`text` for an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def piece_text(data: bytes) -> str:
    """A token's bytes as text; bytes that are not UTF-8 on their own become \\xNN."""
    return data.decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    """`text` escaped, with white space shown and unprintable characters (controls, bidi marks) as escapes."""
    return "".join(VISIBLE.get(c) or (html.escape(c) if c.isprintable() else escape(ascii(c)[1:-1])) for c in text)


def plain_visible(text: str) -> str:
    """The same for a title attribute, where no elements are allowed: unprintable characters as escapes."""
    return escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %".replace("-", "−")


def count(value: float) -> str:
    """Thousands set apart by a thin space."""
    return f"{round(value):,}".replace(",", "\u2009")


def tokens_line(pieces: list[str], values: list[float], top: float, peak: int = -1) -> str:
    """Tokens behind each other; where the latent fires, coloured by value / top, with the value as tooltip."""
    out: list[str] = []
    for i, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        if value > 0:
            strength = min(1.0, value / top) if top > 0 else 1.0
            mark = ' class="p"' if i == peak else ""
            out.append(f'<b{mark} style="--a:{strength:.2f}" title="{value:.2f}">{visible(piece)}</b>')
        else:
            out.append(visible(piece))
    return "".join(out)
