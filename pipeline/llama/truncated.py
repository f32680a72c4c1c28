"""The first blocks of a model, loaded as if the file had no more.

A capture that stops after block b needs neither the blocks behind it nor the output matrix, yet llama.cpp loads every
tensor of a file (and refuses one with other tensors than its hyper-parameters say). So it is handed a stream: the
file's own header with a smaller `block_count`, then the tensors kept, read from the file where they lie. What it then
computes in the blocks kept is the same, bit for bit: the same kernels on the same bytes.

One block more than asked for is kept, since llama.cpp computes the last one only for tokens whose logits are asked
for. In place of the output matrix comes one of zeros in the smallest type there is: without any, llama.cpp takes the
token embedding, and where it repacks weights it makes a copy of it. So such a model has no logits.

`ARCHITECTURES` are those tested to give the same bits. In the build that was read (layer_inp.py) their hyper-parameters
take from the number of blocks nothing but the name of the model's size (`load_arch_hparams`). Left out: gemma2 and
gemma3, whose scale of attention follows that size (27B: 46 and 62 blocks), and all that were not read: some have layers
behind the last block (multi-token prediction), share keys between blocks counted from the end, or list blocks by kind.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae.errors import LlamaError

from .hooks import blocks_read
from .identity import model_id
from .layer_inp import other_build
from .parts import Part, stream_of
from .symbols import GgmlTensor, function, tensor_at

ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gpt-oss", "phi2", "phi3", "gpt2", "gptneox", "olmo2"}
)
# What a header may hold as an array with a value for each block; any other array of the architecture is not known.
_BY_BLOCK = frozenset(
    {"attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern"}
    | {"feed_forward_length", "expert_feed_forward_length", "expert_used_count"}
)
_BLOCK_COUNT, _LAYERS_BEHIND = "block_count", "nextn_predict_layers"
_HEAD, _EMBEDDING = b"output.weight", b"token_embd.weight"
_BLOCK = re.compile(rb"blk\.(\d+)\.")
_GGUF_UINT32, _GGUF_STRING, _GGUF_ARRAY = 4, 8, 9  # of gguf_type
_ZEROS = (41, 2, 1)  # Q1_0, Q4_0, F16 of ggml_type: the first whose blocks fit the rows
_P, _C, _I = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(_P)))


_from_file = function("gguf_init_from_file", _P, _C, _GgufParams)
_empty = function("gguf_init_empty", _P)
_free = function("gguf_free", None, _P)
_copy_kv = function("gguf_set_kv", None, _P, _P)
_n_kv = function("gguf_get_n_kv", _I, _P)
_key = function("gguf_get_key", _C, _P, _I)
_kv_type = function("gguf_get_kv_type", ctypes.c_int, _P, _I)
_array_type = function("gguf_get_arr_type", ctypes.c_int, _P, _I)
_array_n = function("gguf_get_arr_n", ctypes.c_size_t, _P, _I)
_array_data = function("gguf_get_arr_data", _P, _P, _I)
_set_array = function("gguf_set_arr_data", None, _P, _C, ctypes.c_int, _P, ctypes.c_size_t)
_set_u32 = function("gguf_set_val_u32", None, _P, _C, ctypes.c_uint32)
_alignment = function("gguf_get_alignment", ctypes.c_size_t, _P)
_data_offset = function("gguf_get_data_offset", ctypes.c_size_t, _P)
_n_tensors = function("gguf_get_n_tensors", _I, _P)
_tensor_name = function("gguf_get_tensor_name", _C, _P, _I)
_tensor_offset = function("gguf_get_tensor_offset", ctypes.c_size_t, _P, _I)
_tensor_size = function("gguf_get_tensor_size", ctypes.c_size_t, _P, _I)
_add_tensor = function("gguf_add_tensor", None, _P, _P)
_meta_size = function("gguf_get_meta_size", ctypes.c_size_t, _P)
_meta_data = function("gguf_get_meta_data", None, _P, _P)
_get_tensor = function("ggml_get_tensor", _P, _P, _C)
_free_tensors = function("ggml_free", None, _P)
_block_size = function("ggml_blck_size", _I, ctypes.c_int)
_type_size = function("ggml_type_size", ctypes.c_size_t, ctypes.c_int)


def unavailable(architecture: str) -> str:
    """Why a model of this architecture is only loaded whole, in a clause; empty when the first blocks can be had."""
    if why := other_build():
        return why
    if architecture in ARCHITECTURES:
        return ""
    return f"not tested for architecture '{architecture}' (tested: {', '.join(sorted(ARCHITECTURES))})"


def blocks_to_load(path: Path, points: Sequence[str]) -> int:
    """What `Model(path, blocks=...)` needs for captures of these texts, as `hooks.expand` takes them; 0: all blocks."""
    blocks = blocks_read(points)
    return 0 if blocks is None or not points or blocks + 1 >= model_id(path).n_layer else blocks + 1


@contextmanager
def first_blocks(path: Path, architecture: str, blocks: int) -> Iterator[int]:
    """A C `FILE *` of a GGUF file's first `blocks` blocks, for `llama_model_load_from_file_ptr`.

    LlamaError where that cannot be had: another architecture or layout of the file, no compiler, not glibc.
    """
    if why := unavailable(architecture):
        raise LlamaError(why)
    tensors = _P()
    source = _from_file(os.fsencode(path), _GgufParams(True, ctypes.pointer(tensors)))
    if not source:
        raise LlamaError(f"llama.cpp cannot read the header of {path}")
    made = _empty()
    try:
        _copy_header(source, made, architecture, blocks)
        parts, size = _keep_tensors(source, tensors, made, blocks)
        meta = ctypes.create_string_buffer(_meta_size(made))
        _meta_data(made, meta)
    finally:
        _free(made)
        _free(source)
        _free_tensors(tensors)
    start = len(meta)
    placed = [Part(start + part.start, part.length, part.source) for part in parts]
    with stream_of(path, meta.raw, placed, start + size) as stream:
        yield stream


def _copy_header(source: Any, made: Any, architecture: str, blocks: int) -> None:
    """The keys of `source` with fewer blocks. LlamaError for what this module does not know how to shorten."""
    prefix = f"{architecture}."
    key_of = {_key(source, i): i for i in range(_n_kv(source))}
    count = key_of.get(f"{prefix}{_BLOCK_COUNT}".encode(), -1)
    if count < 0 or _kv_type(source, count) != _GGUF_UINT32:
        raise LlamaError("its number of blocks is not written as usual")
    if _alignment(source) != _alignment(made) or b"split.count" in key_of:
        raise LlamaError("its tensors are split over files or aligned otherwise than usual")
    if f"{prefix}{_LAYERS_BEHIND}".encode() in key_of:
        raise LlamaError("it has layers behind the last block")
    _copy_kv(made, source)
    _set_u32(made, f"{prefix}{_BLOCK_COUNT}".encode(), blocks)
    for key, i in key_of.items():
        name = key.decode("utf-8", "replace")
        if name.startswith(prefix) and _kv_type(source, i) == _GGUF_ARRAY:
            kind = _array_type(source, i)
            if name.removeprefix(prefix) not in _BY_BLOCK or kind == _GGUF_STRING:
                raise LlamaError(f"whether {name} has a value for each block is not known")
            _set_array(made, key, kind, _array_data(source, i), min(blocks, _array_n(source, i)))


def _keep_tensors(source: Any, tensors: Any, made: Any, blocks: int) -> tuple[list[Part], int]:
    """Describe the tensors kept in `made`; where its bytes lie, counted from the first tensor, and how many there are."""
    data, kept = _data_offset(source), []
    for i in range(_n_tensors(source)):
        name = _tensor_name(source, i)
        block = _BLOCK.match(name)
        if (block is None or int(block[1]) < blocks) and name != _HEAD:
            _add_tensor(made, _get_tensor(tensors, name))
            kept.append((data + _tensor_offset(source, i), _tensor_size(source, i)))
    parts = [Part(_tensor_offset(made, i), length, start) for i, (start, length) in enumerate(kept)]
    _add_zeros(made, tensors)
    last = _n_tensors(made) - 1
    return parts, _tensor_offset(made, last) + _tensor_size(made, last)


def _add_zeros(made: Any, tensors: Any) -> None:
    """The output matrix as zeros, shaped as the token embedding; no part holds its bytes."""
    if not (embedding := _get_tensor(tensors, _EMBEDDING)):
        raise LlamaError("it has no token embedding")
    d, v = tensor_at(embedding).ne[:2]
    kind = next(kind for kind in _ZEROS if d % _block_size(kind) == 0)
    row = d // _block_size(kind) * _type_size(kind)
    zeros = GgmlTensor(type=kind, ne=(d, v, 1, 1), nb=(_type_size(kind), row, row * v, row * v), name=_HEAD)
    _add_tensor(made, ctypes.byref(zeros))
