"""SAE GGUF: one file with the arrays and the facts a reader needs to run the SAE. Specified in docs/formats.md."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sae.checkpoint import needs_version_2
from sae.errors import ConfigError, FormatError, SAEError
from sae.weights import NORM_MODES, VARIANTS, SAEWeights

from . import keys
from .gguf_file import GGUFFile, encode_matrix, read_gguf, write_atomically
from .stored_rows import StoredRows

_MAX_ENTRIES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEFileInfo:
    """What the header of an SAE GGUF says about one entry."""

    version: int
    count: int
    hook: str
    d_in: int
    num_latents: int
    k: int
    encoder_type: str
    decoder_type: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMatrix:
    """A matrix as a file has it: GGUF's name of the type, numpy shape, bytes (uint8, a view of the file)."""

    dtype: str
    shape: tuple[int, int]
    raw: np.ndarray


def write_sae_gguf(
    path: str | Path,
    weights: SAEWeights,
    *,
    encoder_type: str = "F16",
    decoder_type: str = "F16",
    probe: np.ndarray | None = None,
) -> Path:
    """Writes an SAE GGUF atomically. With `probe` (N, D) the file is verified before it gets its name.

    Raises ConfigError on an unknown type, FormatError where the type cannot hold the matrix (Q8_0 needs D % 32 == 0),
    CheckFailedError when the verification fails.
    """
    for role, name in (("encoder_type", encoder_type), ("decoder_type", decoder_type)):
        if name not in keys.MATRIX_TYPES:
            raise ConfigError(f"{role}: expected one of {', '.join(keys.MATRIX_TYPES)}, got {name!r}")

    def fill(writer: gguf.GGUFWriter) -> None:
        _add_keys(writer, weights)
        _add_tensors(writer, weights, encoder_type, decoder_type)

    def check(partial: Path) -> None:
        from .verify import verify  # verify reads files with this module

        assert probe is not None
        verify(weights, partial, probe)

    return write_atomically(path, keys.ARCHITECTURE, fill, check if probe is not None else None)


def _add_keys(writer: gguf.GGUFWriter, weights: SAEWeights) -> None:
    n_latents, d_in = weights.W_enc_FD.shape
    writer.add_string("general.type", "sae")
    writer.add_uint32(keys.SAE_VERSION, keys.VERSION if needs_version_2(weights) else 1)
    writer.add_uint32(keys.SAE_COUNT, 1)
    writer.add_string(keys.entry(0, "hook.point"), weights.hook)
    writer.add_string(keys.entry(0, "hook.tensor"), keys.hook_tensor(weights.hook))
    block = keys.hook_block(weights.hook)
    if block is not None:
        writer.add_uint32(keys.entry(0, "hook.block"), block)
    writer.add_string(keys.entry(0, "variant"), weights.variant)
    writer.add_uint32(keys.entry(0, "d_in"), d_in)
    writer.add_uint32(keys.entry(0, "num_latents"), n_latents)
    writer.add_uint32(keys.entry(0, "k"), weights.k)
    writer.add_string(keys.entry(0, "norm.mode"), weights.norm_mode)
    writer.add_float64(keys.entry(0, "norm.eps"), weights.norm_eps)
    if needs_version_2(weights):
        writer.add_uint32(keys.entry(0, "norm.correction"), weights.norm_correction)
        writer.add_uint32(keys.entry(0, "d_out"), weights.d_out)
        if weights.hook_out:
            writer.add_string(keys.entry(0, "hook.out"), weights.hook_out)
        writer.add_string(keys.entry(0, "ports"), json.dumps(weights.ports))
    writer.add_bool(keys.entry(0, "b_dec_subtracted"), weights.b_dec_subtracted)
    writer.add_bool(keys.entry(0, "bos_excluded"), True)
    writer.add_float64(keys.entry(0, "variance"), float(weights.variance))
    writer.add_string(keys.entry(0, "training"), json.dumps(_plain(weights.training), sort_keys=True))
    for name, key in keys.HOST_KEYS.items():
        value = weights.host.get(name)
        if isinstance(value, str):
            writer.add_string(keys.entry(0, key), value)
        elif value is not None:
            writer.add_uint32(keys.entry(0, key), int(value))
    if weights.host.get("name"):
        writer.add_uint32(keys.BASE_MODEL_COUNT, 1)
        writer.add_string(keys.BASE_MODEL_NAME, str(weights.host["name"]))


def _plain(value: Any) -> Any:
    """`value` with numpy scalars and non-finite numbers turned into what standard JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _add_tensors(writer: gguf.GGUFWriter, weights: SAEWeights, encoder_type: str, decoder_type: str) -> None:
    vectors = {
        "enc.bias": weights.b_enc_F,
        "dec.bias": weights.b_dec_D,
        "mean": weights.mean_D,
        "dec.norm": np.linalg.norm(weights.W_dec_FD, axis=1),
        "threshold": weights.threshold_F,
        "freq": weights.freq_F,
    }
    for name, values, dtype in (
        ("enc.weight", weights.W_enc_FD, encoder_type),
        ("dec.weight", weights.W_dec_FD, decoder_type),
    ):
        _require_finite(name, values)
        data, kind = encode_matrix(name, values, dtype)
        writer.add_tensor(keys.entry(0, name), data, raw_dtype=kind)
    if weights.W_skip_OD is not None:
        _require_finite("skip.weight", weights.W_skip_OD)
        writer.add_tensor(keys.entry(0, "skip.weight"), weights.W_skip_OD)
    for name, values in vectors.items():
        if values is not None:
            _require_finite(name, values)
            writer.add_tensor(keys.entry(0, name), np.ascontiguousarray(values, dtype=np.float32))


def _require_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise FormatError(
            f"tensor {name} holds values that are not finite; the SAE is damaged or its training diverged"
        )


def read_sae_gguf(path: str | Path, *, stored: bool = False) -> SAEWeights:
    """Reads entry 0 of an SAE GGUF as float32 arrays; W_enc and W_dec as `StoredRows` with `stored`.

    Raises FormatError in one line on anything but a whole, consistent SAE GGUF file of version 1 or 2.
    """
    file = read_gguf(path)
    header = _Header(file)
    header.check_file()
    n_latents, d_in = header.integer("num_latents", 1), header.integer("d_in", 1)
    k = header.integer("k", 1)
    if k > n_latents:
        raise header.fail(f"k={k} is more than num_latents={n_latents}")
    variant = header.one_of("variant", VARIANTS)
    further = header.further(d_in)
    d_out = further.pop("d_out")
    hook = header.text("hook.point")
    block = keys.hook_block(hook)
    if block is not None and block != header.integer("hook.block", 0):
        raise header.fail(f"hook.block does not fit hook.point {hook!r}")
    try:
        return SAEWeights(
            W_enc_FD=header.matrix("enc.weight", (n_latents, d_in), stored),
            b_enc_F=header.require("enc.bias", (n_latents,)),
            W_dec_FD=header.matrix("dec.weight", (n_latents, d_out), stored),
            b_dec_D=header.require("dec.bias", (d_out,)),
            mean_D=header.require("mean", (d_out,)),
            variance=header.number("variance"),
            k=k,
            variant=variant,
            b_dec_subtracted=header.boolean("b_dec_subtracted"),
            threshold_F=header.threshold(n_latents),
            freq_F=header.optional("freq", (n_latents,)),
            hook=hook,
            host=header.host(),
            training=header.training(),
            **further,
        )
    except FormatError:
        raise
    except SAEError as error:  # what SAEWeights itself refuses
        raise header.fail(str(error)) from None


def read_stored_encoder(path: str | Path) -> StoredMatrix:
    """W_enc of entry 0 in the type it is stored in. Raises FormatError like `read_sae_gguf`."""
    file = read_gguf(path)
    header = _Header(file)
    header.check_file()
    shape = header.integer("num_latents", 1), header.integer("d_in", 1)
    return StoredMatrix(
        dtype=header.entry_of("enc.weight", shape).dtype, shape=shape, raw=file.raw(keys.entry(0, "enc.weight"))
    )


def sae_file_info(path: str | Path) -> SAEFileInfo:
    """Header facts of entry 0 without reading the arrays. Raises FormatError like `read_sae_gguf`."""
    file = read_gguf(path)
    header = _Header(file)
    header.check_file()
    n_latents, d_in = header.integer("num_latents", 1), header.integer("d_in", 1)
    return SAEFileInfo(
        version=file.fields[keys.SAE_VERSION],
        count=file.fields[keys.SAE_COUNT],
        hook=header.text("hook.point"),
        d_in=d_in,
        num_latents=n_latents,
        k=header.integer("k", 1),
        encoder_type=header.entry_of("enc.weight", (n_latents, d_in)).dtype,
        decoder_type=header.entry_of("dec.weight", (n_latents, header.d_out(d_in))).dtype,
        n_bytes=len(file.buffer),
    )


class _Header:
    """Typed access to the keys and tensors of entry 0; every miss is a FormatError that names the file and the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.file.path}: not a usable SAE GGUF: {what}")

    def check_file(self) -> None:
        fields = self.file.fields
        if fields.get("general.architecture") != keys.ARCHITECTURE:
            found = fields.get("general.architecture")
            raise self.fail(f"general.architecture is {str(found)[:80]!r}, expected 'sae'; is it a model?")
        version, count = fields.get(keys.SAE_VERSION), fields.get(keys.SAE_COUNT)
        if type(version) is not int or not 1 <= version <= keys.VERSION:
            raise self.fail(f"sae.version is {str(version)[:40]}, this program reads 1 to {keys.VERSION}")
        if type(count) is not int or not 1 <= count <= _MAX_ENTRIES:
            raise self.fail(f"sae.count is {str(count)[:40]}, expected 1 to {_MAX_ENTRIES}")

    def _get(self, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
        key = keys.entry(0, name)
        if key not in self.file.fields:
            raise self.fail(f"key {key} is missing")
        value = self.file.fields[key]
        if type(value) not in kinds:  # exact: bool is an int to isinstance
            raise self.fail(f"key {key} should be {wanted}, got {str(value)[:80]!r}")
        return value

    def integer(self, name: str, least: int) -> int:
        value = self._get(name, (int,), "an integer")
        if not least <= value < 2**31:
            raise self.fail(f"key {keys.entry(0, name)} is {value}, expected {least} to {2**31 - 1}")
        return value

    def number(self, name: str) -> float:
        value = float(self._get(name, (float, int), "a number"))
        if not math.isfinite(value) or value < 0:
            raise self.fail(f"key {keys.entry(0, name)} is {value}, expected a finite number of at least 0")
        return value

    def text(self, name: str) -> str:
        return self._get(name, (str,), "a string")

    def boolean(self, name: str) -> bool:
        return self._get(name, (bool,), "a bool")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise self.fail(f"{keys.entry(0, name)} is {value[:80]!r}, this program knows {', '.join(allowed)}")
        return value

    def entry_of(self, name: str, shape: tuple[int, ...]) -> Any:
        key = keys.entry(0, name)
        if key not in self.file.tensors:
            raise self.fail(f"tensor {key} is missing")
        entry = self.file.tensors[key]
        if entry.shape != shape:
            raise self.fail(f"tensor {key} has ne={list(reversed(entry.shape))}, expected {list(reversed(shape))}")
        if len(shape) == 1 and entry.dtype != "F32":
            raise self.fail(f"tensor {key} is {entry.dtype}, expected F32")
        return entry

    def require(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self.entry_of(name, shape)
        values = self.file.tensor(keys.entry(0, name))
        if not np.isfinite(values).all():
            raise self.fail(f"tensor {keys.entry(0, name)} holds values that are not finite")
        return values

    def matrix(self, name: str, shape: tuple[int, int], stored: bool) -> Any:
        if not stored:
            return self.require(name, shape)
        entry, key = self.entry_of(name, shape), keys.entry(0, name)
        rows = StoredRows(self.file.path, entry.start, self.file.raw(key), entry.dtype, shape)
        if not rows.is_finite():
            raise self.fail(f"tensor {key} holds values that are not finite")
        return rows

    def optional(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return self.require(name, shape) if keys.entry(0, name) in self.file.tensors else None

    def threshold(self, n_latents: int) -> np.ndarray | None:
        if keys.entry(0, "threshold") in self.file.fields and keys.entry(0, "threshold") not in self.file.tensors:
            return np.full(n_latents, self.number("threshold"), dtype=np.float32)
        return self.optional("threshold", (n_latents,))

    def d_out(self, d_in: int) -> int:
        return d_in if self.file.fields[keys.SAE_VERSION] == 1 else self.integer("d_out", 1)

    def further(self, d_in: int) -> dict[str, Any]:
        """What version 2 adds; in version 1 the one norm mode there is."""
        if self.file.fields[keys.SAE_VERSION] == 1:
            self.one_of("norm.mode", NORM_MODES[:1])
            return {"d_out": d_in}
        d_out = self.d_out(d_in)
        hook_out = self.text("hook.out") if keys.entry(0, "hook.out") in self.file.fields else ""
        if hook_out:
            keys.hook_block(hook_out)  # refuses what is no hook point
        return {
            "d_out": d_out,
            "norm_mode": self.one_of("norm.mode", NORM_MODES),
            "norm_eps": self.number("norm.eps"),
            "norm_correction": self.integer("norm.correction", 0),
            "hook_out": hook_out,
            "ports": self.ports(),
            "W_skip_OD": self.optional("skip.weight", (d_out, d_in)),
        }

    def ports(self) -> tuple[tuple[str, int], ...]:
        try:
            found = json.loads(self.text("ports"))
            pairs = tuple((name, width) for name, width in found)
        except (ValueError, TypeError, RecursionError):
            pairs = None
        if pairs is None or not all(
            isinstance(name, str) and type(width) is int and width > 0 for name, width in pairs
        ):
            raise self.fail(f"key {keys.entry(0, 'ports')} is no JSON list of hook points and widths")
        for name, _ in pairs:
            keys.hook_block(name)
        return pairs

    def host(self) -> dict[str, Any]:
        fields = self.file.fields
        found = {name: fields.get(keys.entry(0, key)) for name, key in keys.HOST_KEYS.items()}
        found["name"] = fields.get(keys.BASE_MODEL_NAME)
        for name, value in found.items():
            if value is not None and type(value) not in (int, str):
                raise self.fail(f"the host model's {name} is neither a string nor an integer")
        return {name: value for name, value in found.items() if value is not None}

    def training(self) -> dict[str, Any]:
        raw = self.file.fields.get(keys.entry(0, "training"), "{}")
        try:
            value = json.loads(raw) if isinstance(raw, str) else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.fail(f"key {keys.entry(0, 'training')} is not a JSON object")
        return value
