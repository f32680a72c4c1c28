"""Typed, distrustful access to the keys and tensors of an SAE GGUF."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from sae.errors import FormatError
from sae.weights import NORM_MODES

from . import keys
from .gguf_file import GGUFFile
from .stored_rows import StoredRows


def bos_excluded(training: dict[str, Any]) -> bool | None:
    """Whether rows of BOS and special tokens were left out of a training: as it says itself, and always of ours.

    None where nobody says.
    """
    said = training.get("bos_excluded")
    if isinstance(said, bool):
        return said
    return True if isinstance(training.get("config"), dict) and "imported_from" not in training else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Header:
    """Typed access to the keys and tensors of one entry; every miss is a FormatError that names the file and the key."""

    def __init__(self, file: GGUFFile, entry: int = 0) -> None:
        """FormatError where the file is no SAE GGUF of a version known here, or has no such entry."""
        self.file, self.entry = file, entry
        self._check_file()

    def key(self, name: str) -> str:
        return keys.entry(self.entry, name)

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.file.path}: not a usable SAE GGUF: {what}")

    def _check_file(self) -> None:
        fields = self.file.fields
        if fields.get("general.architecture") != keys.ARCHITECTURE:
            found = fields.get("general.architecture")
            raise self.fail(f"general.architecture is {str(found)[:80]!r}, expected 'sae'; is it a model?")
        if fields.get("general.type") != "sae":
            raise self.fail(f"general.type is {str(fields.get('general.type'))[:80]!r}, expected 'sae'")
        version, count = fields.get(keys.SAE_VERSION), fields.get(keys.SAE_COUNT)
        if type(version) is not int or not 1 <= version <= keys.VERSION:
            raise self.fail(f"sae.version is {str(version)[:40]}, this program reads 1 to {keys.VERSION}")
        if type(count) is not int or not 1 <= count <= keys.MAX_ENTRIES:
            raise self.fail(f"sae.count is {str(count)[:40]}, expected 1 to {keys.MAX_ENTRIES}")
        if not 0 <= self.entry < count:
            raise self.fail(f"it has no SAE {self.entry}, only 0..{count - 1}")

    def _get(self, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
        key = self.key(name)
        if key not in self.file.fields:
            raise self.fail(f"key {key} is missing")
        value = self.file.fields[key]
        if type(value) not in kinds:  # exact: bool is an int to isinstance
            raise self.fail(f"key {key} should be {wanted}, got {str(value)[:80]!r}")
        return value

    def integer(self, name: str, least: int) -> int:
        value = self._get(name, (int,), "an integer")
        if not least <= value < 2**31:
            raise self.fail(f"key {self.key(name)} is {value}, expected {least} to {2**31 - 1}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, (float,), "a floating-point number")
        if not math.isfinite(value) or value < 0:
            raise self.fail(f"key {self.key(name)} is {value}, expected a finite number of at least 0")
        return value

    def text(self, name: str) -> str:
        return self._get(name, (str,), "a string")

    def boolean(self, name: str) -> bool:
        return self._get(name, (bool,), "a bool")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise self.fail(f"{self.key(name)} is {value[:80]!r}, this program knows {', '.join(allowed)}")
        return value

    def entry_of(self, name: str, shape: tuple[int, ...]) -> Any:
        key = self.key(name)
        if key not in self.file.tensors:
            raise self.fail(f"tensor {key} is missing")
        entry = self.file.tensors[key]
        if entry.shape != shape:
            raise self.fail(f"tensor {key} has ne={list(reversed(entry.shape))}, expected {list(reversed(shape))}")
        wanted = keys.MATRIX_TYPES if name in keys.MATRICES else ("F32",)
        if entry.dtype not in wanted:
            raise self.fail(f"tensor {key} is of type {entry.dtype}, expected {' or '.join(wanted)}")
        return entry

    def require(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self.entry_of(name, shape)
        values = self.file.tensor(self.key(name))
        if not np.isfinite(values).all():
            raise self.fail(f"tensor {self.key(name)} holds values that are not finite")
        return values

    def matrix(self, name: str, shape: tuple[int, int], stored: bool) -> Any:
        """The matrix as float32, or as `StoredRows`."""
        if not stored:
            return self.require(name, shape)
        entry, key = self.entry_of(name, shape), self.key(name)
        rows = StoredRows(self.file.path, entry.start, self.file.raw(key), entry.dtype, shape)
        if not rows.is_finite():
            raise self.fail(f"tensor {key} holds values that are not finite")
        return rows

    def optional(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return self.require(name, shape) if self.key(name) in self.file.tensors else None

    def threshold(self, n_latents: int) -> np.ndarray | None:
        if self.key("threshold") in self.file.fields and self.key("threshold") not in self.file.tensors:
            return np.full(n_latents, self.number("threshold"), dtype=np.float32)
        return self.optional("threshold", (n_latents,))

    def d_out(self, d_in: int) -> int:
        return d_in if self.file.fields[keys.SAE_VERSION] == 1 else self.integer("d_out", 1)

    def further(self, d_in: int) -> dict[str, Any]:
        """What version 2 adds; in version 1 the one norm mode there is."""
        if self.file.fields[keys.SAE_VERSION] == 1:
            self.one_of("norm.mode", NORM_MODES[:1])
            if self.key("norm.eps") in self.file.fields:
                self._norm_eps("none")
            return {"d_out": d_in}
        d_out = self.d_out(d_in)
        hook_out = ""
        if self.key("hook.out") in self.file.fields:
            hook_out = self.text("hook.out")
            keys.hook_block(hook_out)  # refuses what is no hook point
        mode = self.one_of("norm.mode", NORM_MODES)
        return {
            "d_out": d_out,
            "norm_mode": mode,
            "norm_eps": self._norm_eps(mode),
            "norm_correction": self.integer("norm.correction", 0),
            "hook_out": hook_out,
            "ports": self.ports(),
            "W_skip_OD": self.optional("skip.weight", (d_out, d_in)),
        }

    def _norm_eps(self, mode: str) -> float:
        eps = self.number("norm.eps")
        if (eps > 0) != (mode == "layer"):
            raise self.fail(f"{self.key('norm.eps')} is {eps}; expected a positive number with layer norm, else 0")
        return eps

    def hook(self) -> str:
        """The hook point, `hook.block` checked against it."""
        hook = self.text("hook.point")
        block = keys.hook_block(hook)
        said = (
            self.integer("hook.block", 0) if block is not None or self.key("hook.block") in self.file.fields else None
        )
        if said != block:
            raise self.fail(f"hook.block does not fit hook.point {hook!r}")
        return hook

    def ports(self) -> tuple[tuple[str, int], ...]:
        try:
            found = json.loads(self.text("ports"))
            pairs = tuple((name, width) for name, width in found) if isinstance(found, list) else None
        except (ValueError, TypeError, RecursionError):
            pairs = None
        if pairs is None or not all(
            isinstance(name, str) and type(width) is int and width > 0 for name, width in pairs
        ):
            raise self.fail(f"key {self.key('ports')} is no JSON list of hook points and widths")
        for name, _ in pairs:
            keys.hook_block(name)
        return pairs

    def host(self) -> dict[str, Any]:
        fields = self.file.fields
        found = {name: fields.get(self.key(key)) for name, key in keys.HOST_KEYS.items()}
        found["name"] = fields.get(keys.BASE_MODEL_NAME)
        for name, value in found.items():
            if value is not None and type(value) not in (int, str):
                raise self.fail(f"the host model's {name} is neither a string nor an integer")
        return {name: value for name, value in found.items() if value is not None}

    def training(self) -> dict[str, Any]:
        raw = self.file.fields.get(self.key("training"), "{}")
        try:
            value = json.loads(raw, parse_constant=_no_number) if isinstance(raw, str) else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.fail(f"key {self.key('training')} is not a JSON object")
        said = self.boolean("bos_excluded") if self.key("bos_excluded") in self.file.fields else None
        if said not in (None, bos_excluded(value)) and not (said and "imported_from" in value):
            value["bos_excluded"] = said  # files of before say true of every import, which nobody knew
        return value

    def labels(self, n_latents: int) -> dict[int, str]:
        """The labels that are not empty; what a label may be is checked by SAEWeights."""
        found = self.file.fields.get(self.key(keys.LABELS), [])
        if found and (not isinstance(found, list) or len(found) != n_latents or type(found[0]) is not str):
            raise self.fail(f"key {self.key(keys.LABELS)} should be an array of {n_latents} strings")
        return {latent: text for latent, text in enumerate(found) if text}
