"""The C symbols beyond llama-cpp-python's own table, and the layout of `ggml_tensor`.

Every symbol is looked up on `llama_cpp.llama_cpp._lib`: the search follows libllama's dependencies, so it finds
the one ggml that llama.cpp itself uses. Opening libggml-base.so by its file name maps a second copy with its own
backend registry. The layout is checked at import by making tensors through the API.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.errors import LlamaError

from ..waits import asleep

with asleep():
    from llama_cpp import llama_cpp as _llama_cpp

lc: Any = _llama_cpp  # ctypes: its annotations do not survive a type checker
_LIB: Any = _llama_cpp._lib
_P = ctypes.c_void_p

MAX_SRC = 10
TYPE_F32 = 0


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml 0.25 on a 64-bit machine; `ne` counts elements, `nb` is the stride in bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _P),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _P * MAX_SRC),
        ("view_src", _P),
        ("view_offs", ctypes.c_size_t),
        ("data", _P),
        ("name", ctypes.c_char * 64),
        ("extra", _P),
    )


NAME_OFFSET: int = GgmlTensor.name.offset


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


def library_files() -> list[Path]:
    """The files of llama.cpp that are loaded."""
    folder = Path(_LIB._name).resolve().parent
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(("libllama", "libggml")))


def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A typed C function of the loaded libraries; LlamaError when this build lacks it."""
    try:
        found = _LIB[name]  # by item a new object: another user's types of the same function do not replace ours
    except AttributeError:
        raise LlamaError(
            f"the installed llama.cpp has no symbol '{name}'; ggscope is tested with llama-cpp-python 0.3.36: "
            "reinstall the pinned version"
        ) from None
    found.restype = result
    found.argtypes = list(arguments)
    return found


op_name = function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
type_name = function("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
buffer_name = function("ggml_backend_buffer_name", ctypes.c_char_p, _P)
tensor_nbytes = function("ggml_nbytes", ctypes.c_size_t, _P)
tensor_get = function("ggml_backend_tensor_get", None, _P, _P, ctypes.c_size_t, ctypes.c_size_t)
tensor_set = function("ggml_backend_tensor_set", None, _P, _P, ctypes.c_size_t, ctypes.c_size_t)
tensor_copy = function("ggml_backend_tensor_copy", None, _P, _P)  # within a device, or between two
device_count = function("ggml_backend_dev_count", ctypes.c_size_t)
device_at = function("ggml_backend_dev_get", _P, ctypes.c_size_t)
device_name = function("ggml_backend_dev_name", ctypes.c_char_p, _P)
device_description = function("ggml_backend_dev_description", ctypes.c_char_p, _P)
device_type = function("ggml_backend_dev_type", ctypes.c_int, _P)
device_memory = function(
    "ggml_backend_dev_memory", None, _P, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_buffer_type = function("ggml_backend_buffer_get_type", _P, _P)
_buffer_is_host = function("ggml_backend_buffer_is_host", ctypes.c_bool, _P)
_device_of_type = function("ggml_backend_buft_get_device", _P, _P)
ggml_version = function("ggml_version", ctypes.c_char_p)
ggml_commit = function("ggml_commit", ctypes.c_char_p)


def is_cpu(device: int) -> bool:
    return device_type(device) == 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def cpu_device() -> int:
    """LlamaError for a llama.cpp without one."""
    for i in range(device_count()):
        if is_cpu(device_at(i)):
            return device_at(i)
    raise LlamaError("llama.cpp knows no CPU; reinstall llama-cpp-python")


def device_of(buffer: int | None) -> int:
    """The device whose memory this is; 0 for the host's (also that which a GPU can read), or where it is not known."""
    if not buffer or _buffer_is_host(buffer):
        return 0
    device = _device_of_type(_buffer_type(buffer)) or 0
    return 0 if device and is_cpu(device) else device


def tensor_at(address: int) -> Any:
    """The `ggml_tensor` at an address, without a copy."""
    return GgmlTensor.from_address(address)


def _layout_problems() -> list[str]:
    """Fields of two tensors made through the API that do not read back as they were made."""
    init = function("ggml_init", _P, InitParams)
    free = function("ggml_free", None, _P)
    new = function("ggml_new_tensor_3d", _P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    view = function("ggml_view_1d", _P, _P, _P, ctypes.c_int64, ctypes.c_size_t)
    rename = function("ggml_set_name", _P, _P, ctypes.c_char_p)
    context = init(InitParams(1 << 14, None, True))
    try:
        base = rename(new(context, TYPE_F32, 3, 5, 7), b"layout probe")
        part = view(context, base, 11, 8)
        whole, piece = tensor_at(base), tensor_at(part)
        expected = {
            "type": (whole.type, TYPE_F32),
            "ne": (tuple(whole.ne), (3, 5, 7, 1)),
            "nb": (tuple(whole.nb), (4, 12, 60, 420)),
            "op": (op_name(whole.op), b"NONE"),
            "name": (whole.name, b"layout probe"),
            "view op": (op_name(piece.op), b"VIEW"),
            "src": (piece.src[0], base),
            "src end": (piece.src[MAX_SRC - 1], None),
            "view_src": (piece.view_src, base),
            "view_offs": (piece.view_offs, 8),
            "view ne": (tuple(piece.ne), (11, 1, 1, 1)),
            "view data": (piece.data, None),
        }
        return [
            f"{field} reads {came!r}, expected {want!r}" for field, (came, want) in expected.items() if came != want
        ]
    finally:
        free(context)


def check_layout() -> None:
    """LlamaError when this llama.cpp lays `ggml_tensor` out differently."""
    if problems := _layout_problems():
        raise LlamaError(
            f"the installed llama.cpp lays out ggml_tensor differently ({problems[0]}); "
            "ggscope is tested with llama-cpp-python 0.3.36: reinstall the pinned version"
        )


def mapped_ggml_bases() -> set[str]:
    """Paths of the libggml-base files mapped into this process (Linux; empty elsewhere). More than one is a fault."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    paths = (line.split(None, 5)[-1].strip() for line in maps.read_text().splitlines())
    return {path for path in paths if Path(path).name.startswith("libggml-base")}


check_layout()
