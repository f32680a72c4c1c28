"""Foreign files as float32 arrays and JSON objects. Nothing is unpickled, no path is taken from a file's content.

Every reader refuses what it does not know in one FormatError: truncated files, headers and sizes that do not fit,
dtypes that are no numbers.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sae.errors import FormatError

MAX_JSON = 16 << 20
MAX_YAML = 256 << 10
MAX_HEADER = 64 << 20
MAX_RATIO = 200  # of what a packed array may grow by: weights hardly pack
MAX_SHARED = 4  # tensors of a torch file may share bytes (a tied decoder), not make many of few
MAX_DEPTH = 3  # of dictionaries in a torch file
SAFETENSORS_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "<u1",
}  # fmt: skip
_NPZ_ERRORS = (
    ValueError, OSError, KeyError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, RuntimeError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_TORCH_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OSError,
    struct.error, AssertionError, UnicodeError, ImportError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most MAX_JSON bytes."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FormatError(f"{path} is larger than {MAX_JSON >> 20} MiB; no SAE's settings are")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not valid JSON ({one_line(error)})") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror or error})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path} should hold a JSON object, it holds a {type(found).__name__}")
    return found


def read_yaml(path: Path, keys: Sequence[str]) -> dict[str, str]:
    """The texts that a YAML file of at most MAX_YAML bytes, a mapping, has for these keys; no key for an empty value.

    Only the nodes of the document are made: aliases and merges, which can grow without end, are never followed.
    """
    try:
        if path.stat().st_size > MAX_YAML:
            raise FormatError(f"{path} is larger than {MAX_YAML >> 10} KiB; no SAE's settings are")
        top = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise FormatError(f"{path} is not valid YAML ({one_line(error)})") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror or error})") from None
    if top is None:
        return {}
    if not isinstance(top, yaml.MappingNode):
        raise FormatError(f"{path} should hold a mapping of names to settings")
    found: dict[str, str] = {}
    for key, value in top.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in keys or value.tag.endswith(":null"):
            continue
        if not isinstance(value, yaml.ScalarNode):
            raise FormatError(f"{path}: {key.value} should be a text, it is a {value.id}")
        if key.value in found:
            raise FormatError(f"{path}: {key.value} stands there twice")
        found[key.value] = value.value
    return found


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a .safetensors, .npz, .pt or .pth file by name, and a torch file's plain values.

    Floating-point arrays come as float32, whole numbers as int64. A torch file's nested dictionaries stay nested.
    """
    if not path.is_file():
        raise FormatError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".npz":
        return read_npz(path)
    return read_torch(path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Layout: u64 length of the header, the header (JSON), the bytes of the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FormatError(f"{path} is truncated or no safetensors file: a header of {length} bytes in {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: the safetensors header is no JSON ({one_line(error)})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    mapped = np.memmap(path, np.uint8, "r")[8 + length :]
    spans = {name: _span(path, name, entry, len(mapped)) for name, entry in header.items()}
    if sum(end - start for _, _, start, end in spans.values()) > len(mapped):
        raise FormatError(f"{path}: its tensors overlap: together they are larger than the file")
    return {name: _safetensor(path, name, *span, mapped) for name, span in spans.items()}


def _span(path: Path, name: str, entry: Any, n_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first and last byte of a tensor."""
    damaged = FormatError(f"{path}: tensor {name[:80]!r} has no dtype, shape and data_offsets of whole numbers")
    try:
        kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise damaged
    if kind not in SAFETENSORS_TYPES:
        raise FormatError(f"{path}: tensor {name[:80]!r} is of type {kind[:20]!r}, which is not read")
    dtype = np.dtype(SAFETENSORS_TYPES[kind])
    if end - start != math.prod(shape) * dtype.itemsize or end > n_bytes:
        raise FormatError(f"{path}: tensor {name[:80]!r} does not fit the file; it is truncated or damaged")
    return kind, shape, start, end


def _safetensor(
    path: Path, name: str, kind: str, shape: tuple[int, ...], start: int, end: int, mapped: np.ndarray
) -> np.ndarray:
    raw = np.frombuffer(mapped[start:end].tobytes(), SAFETENSORS_TYPES[kind]).reshape(shape)
    return plain(path, name, _from_bfloat16(raw) if kind == "BF16" else raw)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a zip of .npy files; object arrays, which would be unpickled, are refused by numpy."""
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(member.compress_size for member in packed.infolist()) > path.stat().st_size:
                raise FormatError(f"{path}: its members overlap: together they are larger than the file")
            for member in packed.infolist():
                if member.file_size > MAX_RATIO * max(member.compress_size, 1 << 14):
                    raise FormatError(f"{path}: {member.filename[:80]!r} would unpack to {member.file_size} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: plain(path, name, arrays[name]) for name in arrays.files}
    except FormatError:
        raise
    except _NPZ_ERRORS as error:
        raise FormatError(f"{path} is truncated or no .npz file of plain arrays ({one_line(error)})") from None


def read_torch(path: Path) -> dict[str, Any]:
    """`torch.load` with `weights_only=True`: tensors, numbers, strings, containers, and nothing that runs."""
    try:
        import torch
    except ImportError:
        raise FormatError(f"{path} is a torch file: reading it needs torch (pip install 'ggscope[train]')") from None
    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise FormatError(f"{path}: a torch file with packed records; torch writes none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of foreign files
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except FormatError:
        raise
    except _TORCH_ERRORS as error:
        raise FormatError(
            f"{path} is truncated, or holds more than tensors and plain values ({_reason(error)})"
        ) from None
    if not isinstance(found, dict):
        raise FormatError(f"{path} should hold a dictionary of tensors, it holds a {type(found).__name__}")
    if sum(_sizes(found)) > MAX_SHARED * path.stat().st_size:  # each would be copied
        raise FormatError(f"{path}: its tensors share their bytes: together they are far larger than the file")
    return _from_torch(path, found)


def _sizes(found: dict[Any, Any], depth: int = 0) -> Iterator[int]:
    """Bytes of every plain tensor; of one that is larger than its bytes, which is refused by name, its bytes."""
    import torch

    for value in found.values():
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        elif isinstance(value, dict) and depth < MAX_DEPTH:
            yield from _sizes(value, depth + 1)


def _reason(error: BaseException) -> str:
    """torch's cause without its advice, which is to unpickle whatever the file holds."""
    text = one_line(error, most=4096)
    if named := re.search(r"(?i:unsupported global:? (?:GLOBAL )?)(\S{1,100})", text):
        return f"it names {named[1]}"
    if text.startswith("Weights only load failed"):
        cause = text.partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        return cause.strip()[:160] or "it is none of torch's"
    return text[:160]


def _from_torch(path: Path, found: dict[Any, Any], depth: int = 0) -> dict[str, Any]:
    import torch

    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key)
        if isinstance(value, torch.Tensor):
            values[name] = _tensor(path, name, value)
        elif isinstance(value, dict) and depth < MAX_DEPTH:
            values[name] = _from_torch(path, value, depth + 1)
        else:
            values[name] = value
    return values


def _tensor(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
        raise FormatError(f"{path}: tensor {name[:80]!r} is no plain array of numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # strides of 0 make a huge tensor of a few bytes
        raise FormatError(f"{path}: tensor {name[:80]!r} of shape {tuple(tensor.shape)} is larger than its bytes")
    wanted = torch.float32 if tensor.is_floating_point() else torch.int64
    return plain(path, name, tensor.detach().to(wanted).contiguous().numpy())


def plain(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Float32 or int64; FormatError for strings, objects and complex numbers."""
    if not isinstance(array, np.ndarray):  # numpy hands out what is no .npy file as bytes
        raise FormatError(f"{path}: {name[:80]!r} is no array")
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind in "iub":
        return array.astype(np.int64, copy=False)
    raise FormatError(f"{path}: array {name[:80]!r} is of dtype {array.dtype}, expected numbers")


def one_line(error: BaseException, most: int = 160) -> str:
    text = " ".join(str(error).split())
    return text[:most] or type(error).__name__
