"""What JSON of a store must be before anything trusts it: a store may be damaged, or made to harm.

Everything here raises ValueError that says what was expected and what came; callers name the file.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypeVar

T = TypeVar("T")

MAX_LEVELS = 32
MAX_ROWS = 1 << 48
MAX_KEY_PART = 255  # a file name
SHOWN = 60


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object of at most MAX_LEVELS levels, all its numbers finite."""
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_LEVELS} levels deep") from None
    if _deeper(found, MAX_LEVELS):
        raise ValueError(f"nested more than {MAX_LEVELS} levels deep")
    return of_kind(found, dict, "the document")


def of_kind(value: Any, kind: type[T], name: str) -> T:
    """`value`, which must be a `kind`; a bool is no int."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected {kind.__name__}, got {_shown(value)}")
    return value


def whole_number(value: Any, name: str, least: int = 0, most: int = MAX_ROWS) -> int:
    number = of_kind(value, int, name)
    if not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {_shown(number)}")
    return number


def finite(value: Any, name: str) -> float:
    """A number of at least 0 that a float64 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {_shown(value)}")
    return float(value)


def inside(key: str, name: str) -> str:
    """A key below the store: relative, plain characters, without `.` and `..`."""
    parts = key.split("/")
    if not (key.isascii() and key.isprintable()) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name}: expected a path inside the store, got {_shown(key)}")
    if max(map(len, parts)) > MAX_KEY_PART:
        raise ValueError(f"{name}: a name of more than {MAX_KEY_PART} characters")
    return key


def only_keys(data: dict[str, Any], known: set[str], name: str) -> None:
    if data.keys() != known:
        odd = sorted(data.keys() ^ known)
        raise ValueError(f"{name}: keys are missing or not known: {_shown(odd)}")


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return not levels or any(_deeper(child, levels - 1) for child in children)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _shown(value: Any) -> str:
    """One short line; an int may have more digits than Python prints."""
    if isinstance(value, int) and abs(value) >> 64:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
