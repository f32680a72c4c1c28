"""A line of docs.jsonl, checked."""

from __future__ import annotations

from typing import Any

from .checks import MAX_ROWS, of_kind, only_keys, parse_object, whole_number


def document_of(line: bytes) -> dict[str, Any]:
    """Fields of a DocumentInfo. Raises ValueError for another line."""
    found = parse_object(line)
    only_keys(found, {"name", "bytes", "sha256", "exact_offsets", "form"}, "document")
    for key, kind in {"name": str, "sha256": str, "exact_offsets": bool, "form": str}.items():
        of_kind(found[key], kind, key)
    whole_number(found["bytes"], "bytes", most=MAX_ROWS)
    return found
