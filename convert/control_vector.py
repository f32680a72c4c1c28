"""Stock llama.cpp control vectors: a direction added to the residual stream after a block (`--control-vector`).

`direction.L` is added raw to `l_out-L`, the residual after block L counted from 0. Source: llama.cpp, common/common.cpp
(control_vector_load_one) and llama-adapter.cpp; the stock generator shifts by one and calls the output of block i
`direction.(i+1)`, this module does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from sae.errors import ConfigError, FormatError, ShapeError

from .gguf_file import read_gguf, write_atomically

_ARCHITECTURE = "controlvector"


def write_control_vector(
    path: str | Path, directions: Mapping[int, np.ndarray], *, model_hint: str, n_layer: int
) -> Path:
    """Writes x' = x + direction_D after block L for each `{L: direction_D}`, in raw model units, atomically.

    For a latent of an SAE on `blocks.L.hook_resid_post`: {L: coeff * W_dec_FD[latent]}. Raises ConfigError for block 0
    or a block the model lacks, ShapeError for widths that differ.
    """
    if not directions:
        raise ConfigError("a control vector needs at least one direction")
    widths = {np.shape(direction) for direction in directions.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ShapeError(f"directions should all be 1-D of the model's width, got shapes {sorted(widths)}")
    for block, direction in directions.items():
        if block == 0:
            raise ConfigError(
                "block 0 cannot be steered by a control vector: llama.cpp reads direction.1 and up only; "
                "use `ggscope apply` for this hook point"
            )
        if not 1 <= block < n_layer:
            raise ConfigError(f"block {block} does not exist, the model has blocks 0..{n_layer - 1}")
        if not np.isfinite(direction).all():
            raise FormatError(f"the direction of block {block} holds values that are not finite")

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_int32("controlvector.layer_count", len(directions))
        for block in sorted(directions):
            writer.add_tensor(f"direction.{block}", np.ascontiguousarray(directions[block], dtype=np.float32))

    return write_atomically(path, _ARCHITECTURE, fill)


def read_control_vector(path: str | Path) -> dict[int, np.ndarray]:
    """Directions by block, float32. Raises FormatError on any file that is not a control vector."""
    file = read_gguf(path)
    if file.fields.get("general.architecture") != _ARCHITECTURE:
        found = str(file.fields.get("general.architecture"))[:80]
        raise FormatError(f"{path}: general.architecture is {found!r}, expected 'controlvector'")
    directions: dict[int, np.ndarray] = {}
    for name, entry in file.tensors.items():
        prefix, _, number = name.partition(".")
        if prefix != "direction" or not number.isascii() or not number.isdigit() or int(number) < 1:
            raise FormatError(
                f"{path}: unexpected tensor {name[:80]!r}, a control vector has direction.1, direction.2 ..."
            )
        if len(entry.shape) != 1 or entry.dtype != "F32":
            raise FormatError(f"{path}: {name} should be F32 with one dimension, got {entry.dtype} {entry.shape}")
        directions[int(number)] = file.tensor(name)
    if not directions or len({len(direction) for direction in directions.values()}) != 1:
        raise FormatError(f"{path}: expected directions of one width, found {len(directions)}")
    if not all(np.isfinite(direction).all() for direction in directions.values()):
        raise FormatError(f"{path}: a direction holds values that are not finite")
    return directions
