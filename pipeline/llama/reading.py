"""The compiled parts of a reading (`reading.c`), built with the machine's C compiler when first wanted.

Without a compiler, ggml and numpy do the same, slower. On a CPU built with OpenMP its threads are the model's own.

Shape letters: N rows, D width, F latents, K slots for active latents.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import final

import numpy as np

from convert.stored_rows import StoredRows
from sae import native
from sae.native.build import BuildError, build
from sae.rows import RowMatrix

_STEP = Path(native.__file__).parent
_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-I{_STEP}")
_VARIANTS = (
    (*_COMMON, "-march=native", "-fopenmp"),
    (*_COMMON, "-march=native"),
    (*_COMMON, "-mcpu=native"),
    _COMMON,
)
_KINDS = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}  # of matrices that reading.c knows
_I = ctypes.c_int64
_log = logging.getLogger(__name__)


@final
class Kernels:
    """The functions of reading.c; MemoryError where they could not have their scratch memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._affine, self._largest = library.ggscope_affine, library.ggscope_largest
        self._squared_error = library.ggscope_squared_error
        p = ctypes.c_void_p
        self._affine.argtypes = [ctypes.c_int, p, _I, _I, p, p, p, _I]
        self._largest.argtypes = [p, _I, _I, _I, p, p, _I]
        self._squared_error.argtypes = [ctypes.c_int, p, _I, _I, p, p, p, p, _I, _I, p]
        self._has_affine = library.ggscope_has_affine

    def has_affine(self, type_name: str) -> bool:
        """Whether `affine` multiplies with matrices of this type on this processor."""
        return type_name in _KINDS and bool(self._has_affine(_KINDS[type_name]))

    def affine(self, type_name: str, W: int, u_D: np.ndarray, b_F: np.ndarray, pre_F: np.ndarray, threads: int) -> None:
        """pre_F = W u + b, W at this address in F rows of D values of this type; u is rounded as ggml rounds it."""
        addresses = u_D.ctypes.data, b_F.ctypes.data, pre_F.ctypes.data
        _check(self._affine(_KINDS[type_name], W, b_F.size, u_D.size, *addresses, threads))

    def largest(self, pre_NF: np.ndarray, k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """(idx_NK, vals_NK) of the k largest above zero: sorted and padded as `sae.runtime.encode` says."""
        rows, latents = pre_NF.shape
        idx_NK, vals_NK = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
        places = idx_NK.ctypes.data, vals_NK.ctypes.data
        _check(self._largest(pre_NF.ctypes.data, rows, latents, k, *places, min(rows, threads)))
        return idx_NK, vals_NK

    def squared_error(self, decoder: Decoder, x_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray) -> np.ndarray:
        """||x - x_hat||^2 of each row, float64 (N,)."""
        error_N = np.empty(len(x_ND))
        arrays = (decoder.b_dec_D, x_ND, idx_NK, vals_NK)
        addresses = [array.ctypes.data for array in arrays]
        sizes = *idx_NK.shape, error_N.ctypes.data
        _check(self._squared_error(decoder.kind, decoder.address, decoder.row_bytes, x_ND.shape[1], *addresses, *sizes))
        return error_N


@final
class Decoder:
    """W_dec and b_dec where reading.c finds them; it keeps the arrays."""

    def __init__(self, W_dec_FD: np.ndarray | RowMatrix, raw_FB: np.ndarray, kind: int, b_dec_D: np.ndarray) -> None:
        self._kept, self.b_dec_D = (W_dec_FD, raw_FB), b_dec_D
        self.kind, self.address, self.row_bytes = kind, raw_FB.ctypes.data, raw_FB.shape[1]


def decoder_of(W_dec_FD: np.ndarray | RowMatrix, b_dec_D: np.ndarray) -> Decoder | None:
    """None for a type that reading.c does not know."""
    if not isinstance(W_dec_FD, RowMatrix):
        return Decoder(W_dec_FD, W_dec_FD.view(np.uint8), _KINDS["F32"], b_dec_D)
    if not isinstance(W_dec_FD, StoredRows) or W_dec_FD.type_name not in _KINDS:
        return None
    return Decoder(W_dec_FD, W_dec_FD.raw_FB, _KINDS[W_dec_FD.type_name], b_dec_D)


def _check(code: int) -> None:
    if code:
        raise MemoryError("no memory for the scratch space of a reading")


@functools.cache
def kernels() -> Kernels | None:
    """The library, built on first use; None, after one note in the log, where it cannot be had."""
    sources = [Path(__file__).with_name("reading.c"), _STEP / "select.c", _STEP / "step.c"]
    try:
        return Kernels(build("reading", sources, _VARIANTS, headers=[_STEP / "vectors.h"]))
    except (BuildError, OSError, AttributeError) as error:  # the last two: a library that does not load
        _log.info("readings without compiled kernels, which is slower: %s", error)
        return None
