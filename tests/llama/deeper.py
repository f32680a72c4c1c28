"""A GGUF file with more blocks than another: its blocks again and again, each with weights of its own."""

from __future__ import annotations

import os
import re

import gguf
import numpy as np

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def write_deeper(
    path: str | os.PathLike[str], source: str | os.PathLike[str], blocks: int, **keys: tuple[object, gguf.GGUFValueType]
) -> None:
    """`source` (F32) with `blocks` blocks. `keys`: further keys of the architecture, `__` for a dot."""
    reader = gguf.GGUFReader(os.fspath(source))
    architecture = reader.get_field("general.architecture").contents()
    own = {f"{architecture}.{name.replace('__', '.')}": value for name, value in keys.items()}
    depth = reader.get_field(f"{architecture}.block_count").contents()
    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    for field in reader.fields.values():
        kind, *inner = field.types
        value = blocks if field.name == f"{architecture}.block_count" else field.contents()
        if kind == gguf.GGUFValueType.ARRAY and field.name.startswith(architecture) and len(value) == depth:
            value = [value[block % depth] for block in range(blocks)]
        if not field.name.startswith("GGUF.") and field.name != "general.architecture" and field.name not in own:
            writer.add_key_value(field.name, value, kind, inner[-1] if inner else None)
    for name, (value, kind) in own.items():
        writer.add_key_value(name, value, *((gguf.GGUFValueType.ARRAY, kind) if isinstance(value, list) else (kind,)))
    rng = np.random.default_rng(3)
    for block in range(-1, blocks):  # -1: what belongs to no block
        for tensor in reader.tensors:
            match, data = _BLOCK.match(tensor.name), np.array(tensor.data)
            if match is None and block == -1:
                writer.add_tensor(tensor.name, data)
            elif match is not None and block >= 0 and int(match[1]) == block % depth:
                noise = 1 + 0.2 * rng.standard_normal(data.shape).astype(np.float32)
                writer.add_tensor(f"blk.{block}.{match[2]}", data * noise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
