"""A copy of a model with re-drawn weights: the baseline that has the architecture and nothing learnt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sae.errors import FormatError

from .identity import open_gguf

_TYPES = (
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.Q8_0,
)


def write_random_copy(source: str | os.PathLike[str], destination: str | os.PathLike[str], seed: int) -> None:
    """Write `destination` with the metadata, tokenizer, tensor names, shapes and types of `source`, but other weights.

    Every matrix is drawn from a Gaussian of mean 0 with the standard deviation of the source's matrix; norm weights
    become 1, biases 0, other vectors (RoPE factors) stay. Each tensor has its own stream, so the draw depends on `seed` and the
    tensor's name only. Written whole or not at all. FormatError for a type that cannot be written back.
    """
    reader = open_gguf(source)
    for tensor in reader.tensors:
        if tensor.tensor_type not in _TYPES:
            raise FormatError(
                f"{source}: {tensor.name} has type {tensor.tensor_type.name}; a random copy can be made of "
                f"{', '.join(t.name for t in _TYPES)} (take an F16 or Q8_0 file of this model)"
            )
    partial = Path(f"{os.fspath(destination)}.partial")
    architecture = reader.get_field("general.architecture")
    writer = gguf.GGUFWriter(partial, architecture.contents() if architecture else "llama")
    try:
        _copy_metadata(reader, writer)
        for tensor in reader.tensors:
            kind = tensor.tensor_type
            writer.add_tensor(tensor.name, gguf.quants.quantize(_redrawn(tensor, seed), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


def _redrawn(tensor: Any, seed: int) -> np.ndarray:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    if len(shape) < 2:
        if tensor.name.endswith(".bias"):
            return np.zeros_like(values)
        return np.ones_like(values) if tensor.name.endswith("norm.weight") else values
    rng = np.random.default_rng([seed, *tensor.name.encode()])
    spread = np.float32(values.std(dtype=np.float64))
    return rng.standard_normal(shape, np.float32) * spread


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    skipped = {"general.architecture", "general.alignment"}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in skipped:
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
