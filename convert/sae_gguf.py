"""SAE GGUF: one file with the arrays and the facts a reader needs to run the SAE. Specified in docs/formats.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sae.checkpoint import needs_version_2
from sae.errors import ConfigError, FormatError, SAEError
from sae.weights import VARIANTS, SAEWeights

from . import keys
from .gguf_file import encode_matrix, read_gguf, rounded, stored_bytes, write_atomically
from .sae_header import Header, bos_excluded


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
    weights: SAEWeights | Sequence[SAEWeights],
    *,
    encoder_type: str = "F16",
    decoder_type: str = "F16",
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes an SAE, or several at hook points of one model, atomically. `check` gets the file before it has its name; where
    it raises, what was at `path` stays.

    Raises ConfigError on an unknown type and on SAEs of different models, FormatError where the type cannot hold a
    matrix (a quantised one needs D % 32 == 0).
    """
    entries = [weights] if isinstance(weights, SAEWeights) else list(weights)
    for role, name in (("encoder_type", encoder_type), ("decoder_type", decoder_type)):
        if name not in keys.MATRIX_TYPES:
            raise ConfigError(f"{role}: expected one of {', '.join(keys.MATRIX_TYPES)}, got {name!r}")
    _check_together(entries)

    def fill(writer: gguf.GGUFWriter) -> None:
        _add_file_keys(writer, entries)
        for index, one in enumerate(entries):
            _add_keys(writer, one, index, version_2=any(map(needs_version_2, entries)))
            _add_tensors(writer, one, index, encoder_type, decoder_type)

    return write_atomically(path, keys.ARCHITECTURE, fill, check)


def _check_together(entries: Sequence[SAEWeights]) -> None:
    if not 1 <= len(entries) <= keys.MAX_ENTRIES:
        raise ConfigError(f"a file holds 1 to {keys.MAX_ENTRIES} SAEs, got {len(entries)}")
    for fact in ("name", "architecture", "n_embd", "n_layer", "vocab_sha256"):
        found = {one.host.get(fact) for one in entries} - {None}
        if len(found) > 1:
            raise ConfigError(
                f"the SAEs of one file are of one model; their hosts' {fact} are {sorted(map(str, found))}"
            )


def stored_as(weights: SAEWeights, encoder_type: str, decoder_type: str) -> SAEWeights:
    """The SAE as a file of these types gives it back."""
    return replace(
        weights,
        W_enc_FD=rounded("enc.weight", weights.W_enc_FD, encoder_type),
        W_dec_FD=rounded("dec.weight", weights.W_dec_FD, decoder_type),
    )


def stored_matrix(name: str, W_FD: np.ndarray, dtype: str) -> StoredMatrix:
    """A matrix as a file of this type holds it. FormatError where the type cannot hold it."""
    data, _ = encode_matrix(name, W_FD, dtype)
    return StoredMatrix(dtype=dtype, shape=W_FD.shape, raw=np.ascontiguousarray(data).view(np.uint8).reshape(-1))


def matrix_bytes(weights: SAEWeights, encoder_type: str, decoder_type: str) -> int:
    """What both matrices take in a file of these types."""
    return stored_bytes(weights.W_enc_FD.shape, encoder_type) + stored_bytes(weights.W_dec_FD.shape, decoder_type)


def _add_file_keys(writer: gguf.GGUFWriter, entries: Sequence[SAEWeights]) -> None:
    writer.add_string("general.type", "sae")
    writer.add_uint32(keys.SAE_VERSION, keys.VERSION if any(map(needs_version_2, entries)) else 1)
    writer.add_uint32(keys.SAE_COUNT, len(entries))
    name = next((str(one.host["name"]) for one in entries if one.host.get("name")), "")
    if name:
        writer.add_uint32(keys.BASE_MODEL_COUNT, 1)
        writer.add_string(keys.BASE_MODEL_NAME, name)


def _add_keys(writer: gguf.GGUFWriter, weights: SAEWeights, index: int, *, version_2: bool) -> None:
    def key(name: str) -> str:
        return keys.entry(index, name)

    block = keys.hook_block(weights.hook)
    writer.add_string(key("hook.point"), weights.hook)
    if hint := keys.hook_tensor(weights.hook):
        writer.add_string(key("hook.tensor"), hint)
    if block is not None:
        writer.add_uint32(key("hook.block"), block)
    writer.add_string(key("variant"), weights.variant)
    writer.add_uint32(key("d_in"), weights.d_in)
    writer.add_uint32(key("num_latents"), weights.num_latents)
    writer.add_uint32(key("k"), weights.k)
    writer.add_string(key("norm.mode"), weights.norm_mode)
    writer.add_float64(key("norm.eps"), weights.norm_eps)
    if version_2:
        writer.add_uint32(key("norm.correction"), weights.norm_correction)
        writer.add_uint32(key("d_out"), weights.d_out)
        if weights.hook_out:
            keys.hook_block(weights.hook_out)  # refuses what is no hook point
            writer.add_string(key("hook.out"), weights.hook_out)
        writer.add_string(key("ports"), json.dumps(weights.ports))
    writer.add_bool(key("b_dec_subtracted"), weights.b_dec_subtracted)
    left_out = bos_excluded(weights.training)
    if left_out is not None:
        writer.add_bool(key("bos_excluded"), left_out)
    writer.add_float64(key("variance"), float(weights.variance))
    writer.add_string(key("training"), json.dumps(_plain(weights.training), sort_keys=True))
    if weights.labels:
        writer.add_array(key(keys.LABELS), [weights.labels.get(latent, "") for latent in range(weights.num_latents)])
    for name, below in keys.HOST_KEYS.items():
        value = weights.host.get(name)
        if isinstance(value, str):
            writer.add_string(key(below), value)
        elif value is not None:
            writer.add_uint32(key(below), int(value))


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


def _add_tensors(
    writer: gguf.GGUFWriter, weights: SAEWeights, index: int, encoder_type: str, decoder_type: str
) -> None:
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
        writer.add_tensor(keys.entry(index, name), data, raw_dtype=kind)
    if weights.W_skip_OD is not None:
        _require_finite("skip.weight", weights.W_skip_OD)
        writer.add_tensor(keys.entry(index, "skip.weight"), weights.W_skip_OD)
    for name, values in vectors.items():
        if values is not None:
            _require_finite(name, values)
            writer.add_tensor(keys.entry(index, name), np.ascontiguousarray(values, dtype=np.float32))


def _require_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise FormatError(
            f"tensor {name} holds values that are not finite; the SAE is damaged or its training diverged"
        )


def read_sae_gguf(path: str | Path, entry: int = 0, *, stored: bool = False) -> SAEWeights:
    """Reads one SAE of an SAE GGUF as float32 arrays; W_enc and W_dec as `StoredRows` with `stored`.

    Raises FormatError in one line on anything but a whole, consistent SAE GGUF file of version 1 or 2.
    """
    header = Header(read_gguf(path), entry)
    n_latents, d_in = header.integer("num_latents", 1), header.integer("d_in", 1)
    k = header.integer("k", 1)
    if k > n_latents:
        raise header.fail(f"k={k} is more than num_latents={n_latents}")
    variant = header.one_of("variant", VARIANTS)
    further = header.further(d_in)
    d_out = further.pop("d_out")
    hook = header.hook()
    header.optional("dec.norm", (n_latents,))  # whoever reads it finds it whole
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
            labels=header.labels(n_latents),
            **further,
        )
    except FormatError:
        raise
    except SAEError as error:  # what SAEWeights itself refuses
        raise header.fail(str(error)) from None


def read_stored_encoder(path: str | Path, entry: int = 0) -> StoredMatrix:
    """W_enc in the type it is stored in. Raises FormatError like `read_sae_gguf`."""
    file = read_gguf(path)
    header = Header(file, entry)
    shape = header.integer("num_latents", 1), header.integer("d_in", 1)
    return StoredMatrix(
        dtype=header.entry_of("enc.weight", shape).dtype, shape=shape, raw=file.raw(header.key("enc.weight"))
    )


def read_decoder_norms(path: str | Path, entry: int = 0) -> np.ndarray | None:
    """||W_dec[i]|| as the file says them (F,), None where it does not. Raises FormatError like `read_sae_gguf`."""
    header = Header(read_gguf(path), entry)
    return header.optional("dec.norm", (header.integer("num_latents", 1),))


def entry_hooks(path: str | Path) -> list[str]:
    """The hook point of each SAE of the file. Raises FormatError like `read_sae_gguf`."""
    file = read_gguf(path)
    count = Header(file).file.fields[keys.SAE_COUNT]
    hooks = [Header(file, entry).text("hook.point") for entry in range(count)]
    for hook in hooks:
        keys.hook_block(hook)  # refuses what is no hook point: these are shown
    return hooks


def sae_file_info(path: str | Path, entry: int = 0) -> SAEFileInfo:
    """Header facts of one SAE without reading the arrays. Raises FormatError like `read_sae_gguf`."""
    file = read_gguf(path)
    header = Header(file, entry)
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
