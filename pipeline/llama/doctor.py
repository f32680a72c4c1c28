"""What this build of llama.cpp can compute on."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

from . import amx
from .log import log_tail
from .symbols import (
    device_at,
    device_count,
    device_description,
    device_memory,
    device_name,
    device_type,
    ggml_commit,
    ggml_version,
    lc,
)

_KINDS = {0: "cpu", 1: "gpu", 2: "integrated gpu", 3: "accelerator", 4: "meta"}


def backends() -> list[dict[str, Any]]:
    """The devices llama.cpp sees: name, description, type, free and total memory in bytes."""
    log_tail.install()
    lc.llama_backend_init()
    found = []
    for index in range(device_count()):
        device = device_at(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        device_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            {
                "name": device_name(device).decode("utf-8", "replace"),
                "description": device_description(device).decode("utf-8", "replace"),
                "type": _KINDS.get(device_type(device), "other"),
                "memory_free": free.value,
                "memory_total": total.value,
            }
        )
    return found


def versions() -> dict[str, str]:
    """Versions of llama-cpp-python, ggml and its commit, gguf, and the instruction sets the CPU backend uses."""
    return {
        "llama-cpp-python": version("llama-cpp-python"),
        "ggml": ggml_version().decode(),
        "llama.cpp commit": ggml_commit().decode(),
        "gguf": version("gguf"),
        "cpu features": lc.llama_print_system_info().decode("utf-8", "replace").strip(),
        "amx products": ("used" if amx.usable() else "off: this build's are broken") if amx.there() else "not there",
        "gpu offload": "yes" if lc.llama_supports_gpu_offload() else "no",
    }
