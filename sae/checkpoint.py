"""An SAE as a folder: `sae.safetensors` (arrays, raw model units) and `sae.json` (everything else). numpy only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import DiskError, FormatError, SAEError
from .weights import SAEWeights

FORMAT = "ggscope-sae"
VERSION = 2  # of SAEs that need what version 1 lacks; others are written as version 1
TENSORS = "sae.safetensors"
META = "sae.json"
REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec", "mean")
FIELDS = {
    "W_enc": "W_enc_FD",
    "b_enc": "b_enc_F",
    "W_dec": "W_dec_FD",
    "b_dec": "b_dec_D",
    "mean": "mean_D",
    "threshold": "threshold_F",
    "freq": "freq_F",
    "W_skip": "W_skip_OD",
}
SCALARS: dict[str, type | tuple[type, ...]] = {
    "d_in": int,
    "num_latents": int,
    "k": int,
    "variant": str,
    "b_dec_subtracted": bool,
    "variance": (int, float),
    "hook": str,
    "host": dict,
    "training": dict,
    "tensors": dict,
}
# version 2: layer norm, transcoders, several hook points
SCALARS_2: dict[str, type | tuple[type, ...]] = {
    "d_out": int,
    "norm_mode": str,
    "norm_eps": (int, float),
    "norm_correction": int,
    "hook_out": str,
    "ports": list,
}


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place; on disk when this returns.

    Whatever happens, `path` is either the old file or the whole new one.

    Raises:
        DiskError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DiskError(f"could not write {path}: {error.strerror or error}; free space there, then resume") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(folder: Path | str, weights: SAEWeights) -> None:
    """Write the SAE into `folder` (made if missing); the json comes last, so a folder that has it is whole.

    Raises:
        FormatError: the arrays hold NaN or infinity.
        DiskError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    arrays = {name: getattr(weights, attribute) for name, attribute in FIELDS.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    _check_finite(arrays, "this SAE")
    meta = {
        "format": FORMAT,
        "version": VERSION if needs_version_2(weights) else 1,
        **{name: getattr(weights, name) for name in SCALARS if name != "tensors"},
        **({name: getattr(weights, name) for name in SCALARS_2} if needs_version_2(weights) else {}),
        "tensors": {name: list(array.shape) for name, array in arrays.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).unlink(missing_ok=True)  # ORDER: never the old json beside the new arrays
    except OSError as error:
        raise DiskError(f"could not write {folder}: {error.strerror or error}") from error
    data = save(arrays)
    write_atomic(folder / TENSORS, lambda file: file.write(data))
    text = json.dumps(meta, indent=1, ensure_ascii=False, allow_nan=False).encode()
    write_atomic(folder / META, lambda file: file.write(text))


def needs_version_2(weights: SAEWeights) -> bool:
    """Whether a reader of version 1 would compute something else."""
    return weights.norm_mode != "none" or bool(weights.hook_out) or bool(weights.ports)


def load_weights(folder: Path | str) -> SAEWeights:
    """Read what `save_weights` wrote.

    Raises:
        FormatError: not such a folder, truncated or foreign files, shapes or dtypes that do not fit, NaN.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    arrays = _read_tensors(folder / TENSORS, meta)
    _check_finite(arrays, str(folder / TENSORS))
    d_out = meta.get("d_out", meta["d_in"])
    if arrays["W_dec"].shape != (meta["num_latents"], d_out):
        raise FormatError(
            f"{folder}: {META} says {meta['num_latents']} latents of width {d_out}, "
            f"W_dec has shape {arrays['W_dec'].shape}; one of the files is of another SAE"
        )
    fields: dict[str, Any] = {FIELDS[name]: array for name, array in arrays.items()}
    fields |= {name: meta[name] for name in SCALARS if name not in ("d_in", "num_latents", "tensors")}
    fields |= {name: meta[name] for name in SCALARS_2 if name in meta and name != "d_out"}
    try:
        return SAEWeights(**fields)
    except SAEError as error:
        raise FormatError(f"{folder}: {error}") from error
    except (TypeError, ValueError) as error:
        raise FormatError(f"{folder}: 'ports' in {META} is no list of hook points and widths") from error


def read_meta(folder: Path) -> dict[str, Any]:
    """What `sae.json` says: sizes, variant, hook point, training. FormatError where it is missing or damaged."""
    path = folder / META
    if not path.is_file():
        raise FormatError(f"{folder} is no SAE checkpoint: it has no {META}; name the folder that `train` wrote")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise FormatError(f"{path} is not a {FORMAT} file")
    if meta.get("version") not in (1, VERSION):
        raise FormatError(f"{path} has version {meta.get('version')!r}, this program reads 1 to {VERSION}")
    for name, kind in (SCALARS | (SCALARS_2 if meta["version"] == VERSION else {})).items():
        value = meta.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{path}: {name!r} is missing or of the wrong type ({value!r})")
    return meta


def _read_tensors(path: Path, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FormatError(f"{path} is missing; {META} is there, so the folder was copied in part")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            arrays = {name: file.get_tensor(name) for name in names if name in FIELDS}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); the file is truncated or not safetensors") from error
    for name in REQUIRED:
        if name not in arrays:
            raise FormatError(f"{path} has no tensor {name!r}; it holds {', '.join(sorted(names)) or 'nothing'}")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise FormatError(f"{path}: tensor {name!r} must be float32, got {array.dtype}")
        if meta["tensors"].get(name) != list(array.shape):
            raise FormatError(f"{path}: tensor {name!r} has shape {array.shape}, {META} says otherwise")
    return arrays


def _check_finite(arrays: dict[str, np.ndarray], where: str) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FormatError(f"{where}: {name} holds NaN or infinity")
