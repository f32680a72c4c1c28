"""What people call a latent: `{latent: text}`, and the side file that holds it. No numpy, no torch."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from .errors import ConfigError, FormatError

FORMAT = "ggscope-labels"
VERSION = 1
MAX_BYTES = 1024  # of one label
MAX_FILE_BYTES = 64 << 20
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # could move a terminal's cursor, hide text or end a line
_JOINERS = "\u200c\u200d"  # of this kind, but part of how some scripts and emoji are spelled


def checked_labels(pairs: Iterable[tuple[Any, Any]], num_latents: int) -> dict[int, str]:
    """`{latent: text}` of (latent, text) pairs, in the order of the latents.

    ConfigError for a latent outside 0..num_latents-1 or named twice, and for a text that is empty, longer than MAX_BYTES
    or holds characters that are not shown.
    """
    found: dict[int, str] = {}
    for latent, text in pairs:
        digits = isinstance(latent, str) and latent.isascii() and latent.isdigit() and latent == str(int(latent[:10]))
        if not digits and type(latent) is not int:
            raise ConfigError(f"a label's latent must be a number, got {str(latent)[:40]!r}")
        number = int(str(latent))
        if not 0 <= number < num_latents:
            raise ConfigError(f"label of latent {number}: this SAE has latents 0..{num_latents - 1}")
        if number in found:
            raise ConfigError(f"latent {number} has two labels")
        if not isinstance(text, str) or not text.strip() or len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise ConfigError(f"label of latent {number}: expected a text of 1 to {MAX_BYTES} bytes")
        if any(unicodedata.category(c) in _HIDDEN and c not in _JOINERS for c in text):
            raise ConfigError(f"label of latent {number} holds characters that are not shown; expected one plain line")
        found[number] = text
    return dict(sorted(found.items()))


def read_labels(path: str | Path, *, num_latents: int, sae_ids: Collection[str] = ()) -> dict[int, str]:
    """The labels of a side file: `{"format", "version", "sae_id", "labels": {"123": "text"}}`, or the inner object alone.

    FormatError in one line for any other file, and for one that names another SAE than one of `sae_ids`.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); give a JSON file of labels") from None
    if size > MAX_FILE_BYTES:
        raise FormatError(f"{path}: {size} bytes are too many for labels (at most {MAX_FILE_BYTES})")
    try:
        pairs = json.loads(data, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise FormatError(f'{path}: is no JSON; expected labels like {{"123": "what latent 123 is"}}') from None
    try:
        return checked_labels(_labels_of(pairs, sae_ids), num_latents)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with every pair it has: a dict would hide a latent that is named twice."""


def _labels_of(value: Any, sae_ids: Collection[str]) -> _Pairs:
    if not isinstance(value, _Pairs):
        raise ConfigError('expected an object of labels like {"123": "what latent 123 is"}')
    fields = dict(value)
    if "format" not in fields:
        return value
    if fields["format"] != FORMAT or fields.get("version") != VERSION:
        raise ConfigError(f"expected format {FORMAT} version {VERSION}")
    if fields.get("sae_id") and fields["sae_id"] not in sae_ids:
        this = f"is {' or '.join(sorted(sae_ids))}" if sae_ids else "has no id"
        raise ConfigError(f"the labels are of SAE {str(fields['sae_id'])[:40]!r}, this one {this}")
    if not isinstance(fields.get("labels"), _Pairs):
        raise ConfigError("expected an object 'labels'")
    return fields["labels"]
