"""float32 to float16 by ggml's own vector code: numpy converts one value at a time, twenty times slower."""

from __future__ import annotations

import ctypes

import numpy as np

from .symbols import function

_convert = function("ggml_cpu_fp32_to_fp16", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_LARGEST = 65520.0  # from here on rounding to nearest even gives infinity


def to_float16(x_ND: np.ndarray) -> tuple[np.ndarray, bool]:
    """`(float16 array, whether a value overflowed)`, rounded to nearest even: `x.astype(np.float16)`, bit for bit."""
    x_ND = np.ascontiguousarray(x_ND, np.float32)
    half_ND = np.empty(x_ND.shape, np.float16)
    _convert(x_ND.ctypes.data, half_ND.ctypes.data, x_ND.size)
    overflow = bool(x_ND.size) and not (x_ND.min() > -_LARGEST and x_ND.max() < _LARGEST)
    return half_ND, overflow
