"""The compiled parts of a reading (`reading.c`, `products.c`, `bounds.c`, `decoder.c`), built with the machine's C compiler when first wanted.

Without a compiler, ggml and numpy do the same, slower. On a CPU built with OpenMP its threads are the model's own.

Shape letters: N rows, D width, F latents, K slots for active latents.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from convert.stored_rows import StoredRows
from sae import large_pages, native
from sae.encoders import PAIR, RowReading
from sae.native.build import BuildError, build, flag_variants
from sae.rows import RowMatrix
from sae.weights import SAEWeights

_HERE, _STEP = Path(__file__).parent, Path(native.__file__).parent
SOURCES = (
    *(_HERE / f"{name}.c" for name in ("reading", "products", "bounds", "decoder")),
    _STEP / "select.c",
)
HEADERS = (_HERE / "reading.h", _HERE / "bytes.h", _STEP / "vectors.h")
_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-I{_STEP}")
_KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}  # of matrices that are multiplied here
_DECODER_KINDS = {name: kind for name, kind in _KINDS.items() if name != "Q4_0"}  # ... and whose rows are added up
_I, _P = ctypes.c_int64, ctypes.c_void_p
KEEP_BYTES = 64 << 20  # of an encoder: a row takes 2 ms at most, less than Python's threads wait for each other anyway
BOUNDS_BYTES = 1 << 20  # of an encoder: smaller ones are multiplied whole
_WEIGHT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34 / 32}
_BOUND_BYTES = 18 / 32  # of a weight
_log = logging.getLogger(__name__)


@final
class Decoder(ctypes.Structure):
    """W_dec and b_dec as decoder.c takes them (`struct decoder`); it keeps the arrays."""

    _fields_ = (("kind", ctypes.c_int32), ("row_bytes", _I), ("D", _I), ("W", _P), ("b_D", _P))

    def __init__(self, W_dec_FD: np.ndarray | RowMatrix, raw_FB: np.ndarray, kind: int, b_dec_D: np.ndarray) -> None:
        self._kept = W_dec_FD, raw_FB, b_dec_D
        places = {"W": raw_FB.ctypes.data, "b_D": b_dec_D.ctypes.data}
        super().__init__(kind=kind, row_bytes=raw_FB.shape[1], D=b_dec_D.size, **places)


@final
class Kernels:
    """The functions of reading.c; MemoryError where they could not have their scratch memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._affine, self._largest = library.ggscope_affine, library.ggscope_largest
        self._squared_error = library.ggscope_squared_error
        self._affine.argtypes = [ctypes.c_int, _P, _I, _I, _P, _P, _P, _I]
        self._largest.argtypes = [_P, _I, _I, _I, _P, _P, _I]
        self._squared_error.argtypes = [_P, _P, _P, _P, _I, _I, _P]
        self._has_affine = library.ggscope_has_affine
        self._has_affine.argtypes = [ctypes.c_int, _I]
        self.room, self.input_bytes = library.ggscope_reading_room, library.ggscope_input_bytes
        self.room.restype = self.input_bytes.restype = _I
        self.room.argtypes, self.input_bytes.argtypes = [_I, _I], [ctypes.c_int, _I]
        self.bounds_input_bytes, self._bounds_bytes = library.ggscope_bounds_input_bytes, library.ggscope_bounds_bytes
        self.bounds_input_bytes.restype = self._bounds_bytes.restype = _I
        self.bounds_input_bytes.argtypes, self._bounds_bytes.argtypes = [_I], [_I, _I]
        self._has_bounds, self._make_bounds = library.ggscope_has_bounds, library.ggscope_make_bounds
        self._has_bounds.argtypes = [ctypes.c_int, _I, _I]
        self._make_bounds.argtypes = [ctypes.c_int, _P, _I, _I, _P, _P, _P, _I]
        self.read_row = library.ggscope_read_row
        self.read_row_address = ctypes.cast(self.read_row, _P).value or 0
        self.read_small_row = ctypes.PyDLL(str(path)).ggscope_read_row  # does not let go of the interpreter

    def has_affine(self, type_name: str, num_latents: int) -> bool:
        """Whether `affine` multiplies with matrices of this type and so many rows on this processor.

        They lie as in a file, but Q4_0 as ggml's CPU code lays it out anew: eight rows interleaved.
        """
        return type_name in _KINDS and bool(self._has_affine(_KINDS[type_name], num_latents))

    def affine(self, type_name: str, W: int, u_D: np.ndarray, b_F: np.ndarray, pre_F: np.ndarray, threads: int) -> None:
        """pre_F = W u + b, W at this address in F rows of D values of this type; u is rounded as ggml rounds it."""
        addresses = u_D.ctypes.data, b_F.ctypes.data, pre_F.ctypes.data
        _check(self._affine(_KINDS[type_name], W, b_F.size, u_D.size, *addresses, threads))

    def bounds(self, type_name: str, W: int, shape: tuple[int, int], threads: int) -> Bounds | None:
        """Of the F rows of D values of this type at address W; None for types and values that have none.

        They take 9/16 of a byte a weight.
        """
        kind = _KINDS.get(type_name, -1)
        if not self._has_bounds(kind, *shape):
            return None
        # drawn anew by every process: weights made to fit it could hide a latent
        dither_D = np.random.default_rng().uniform(-0.5, 0.5, shape[1]).astype(np.float32)
        try:
            found = Bounds(large_pages.array(self._bounds_bytes(*shape)), dither_D, np.empty(shape[0], np.float32))
        except MemoryError:  # without them readings are as they were, slower
            return None
        places = (array.ctypes.data for array in (found.dither_D, found.rows, found.norm_F))
        if self._make_bounds(kind, W, *shape, *places, threads):
            return None
        large_pages.settle(found.rows.ctypes.data, found.rows.nbytes)
        return found

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
        addresses = [array.ctypes.data for array in (x_ND, idx_NK, vals_NK)]
        _check(self._squared_error(ctypes.byref(decoder), *addresses, *idx_NK.shape, error_N.ctypes.data))
        return error_N


@dataclass(frozen=True, eq=False, slots=True)
class Bounds:
    """What bounds.c keeps of an encoder: four bits a weight, what was added before they were rounded, norms of rows."""

    rows: np.ndarray
    dither_D: np.ndarray
    norm_F: np.ndarray


class _Bounds(ctypes.Structure):
    """`struct bounds` of reading.c."""

    _fields_ = (
        *((name, _P) for name in ("rows", "dither_D", "norm_F", "input", "upper_F", "open_F", "items", "questions")),
        *((name, _I) for name in ("most", "pause", "pauses", "exact")),
    )


class _Reading(ctypes.Structure):
    """`struct reading` of reading.c."""

    _fields_ = (
        ("decoder", Decoder),
        ("kind", ctypes.c_int32),
        *((name, _I) for name in ("D", "F", "K", "threads")),
        *((name, _P) for name in ("W_enc", "b_enc_F", "subtracted_D", "threshold_F")),
        ("limit", ctypes.c_float),
        *((name, _P) for name in ("x_D", "y_O", "u_D", "input")),
        ("bounds", _Bounds),
        ("room", _I),
        *((name, _P) for name in ("items", "counts", "spans", "errors", "idx", "vals", "found")),
    )


_FOUND = struct.Struct("=qqd")  # `struct found` of reading.c before its pairs: state, fired, error


@final
class CompiledRow(RowReading):
    """Everything of one row in one call. The matrix at `address` and `kept` stay where they are as long as this does.

    Without a decoder there is no squared error. `bounds`: of the matrix; with them only the latents that may be active
    are multiplied, to the same bits.
    """

    def __init__(
        self, kernels: Kernels, w: SAEWeights, decoder: Decoder | None, type_name: str, address: int, kept: object, *,
        limit: float, threads: int, bounds: Bounds | None = None,
    ) -> None:  # fmt: skip
        self._kept = w, decoder, kept, bounds
        self._x_D, self.width = np.zeros(w.d_in, np.float32), w.d_in
        self._y_O = np.zeros(w.d_out, np.float32) if w.is_transcoder else self._x_D
        k, kind = (w.k if w.variant == "topk" else 0), _KINDS[type_name]
        room = kernels.room(w.num_latents, k)
        slots = k or w.num_latents
        arrays = {
            "b_enc_F": w.b_enc_F,
            "subtracted_D": w.b_dec_D if w.b_dec_subtracted else None,
            "threshold_F": w.threshold_F,
            "x_D": self._x_D,
            "y_O": self._y_O,
            "u_D": np.empty(w.d_in, np.float32),
            "input": np.empty(-(-kernels.input_bytes(kind, w.d_in) // 4), np.int32),
            "items": np.empty(threads * room, np.uint64),
            "counts": np.empty(threads, np.int64),
            "spans": np.empty(8 * threads, np.uint64),
            "errors": np.empty(w.d_out),
            "idx": np.empty(slots, np.int32),
            "vals": np.empty(slots, np.float32),
            "found": np.empty(_FOUND.size + slots * PAIR.size, np.uint8),
        }
        self._arrays = arrays
        self._bounds_arrays, most = _bounds_arrays(kernels, w, k, threads, bounds), most_open(type_name, w, threads)
        self._c = _Reading(
            kind=kind, D=w.d_in, F=w.num_latents, K=k, threads=threads, W_enc=address, limit=limit, room=room,
            bounds=_Bounds(most=most, **_places(self._bounds_arrays)), **_places(arrays),
        )  # fmt: skip
        if decoder is not None:
            self._c.decoder = decoder
        large = w.num_latents * w.d_in * np.dtype(np.float32).itemsize > 4 * KEEP_BYTES
        self._call, self._argument = kernels.read_row if large else kernels.read_small_row, ctypes.byref(self._c)
        self._top, self._shown = 0, memoryview(arrays["found"])[: _FOUND.size]
        self.call = kernels.read_row_address, ctypes.addressof(self._c)

    @property
    def computed(self) -> int:
        """Of how many latents the last reading computed the exact pre-activation."""
        return self._c.bounds.exact

    @property
    def x_D(self) -> np.ndarray:
        return self._x_D

    @property
    def y_O(self) -> np.ndarray:
        return self._y_O

    def read(self, top: int) -> tuple[bytes, int, float] | None:
        self._call(self._argument)
        return self.found(top)

    def found(self, top: int) -> tuple[bytes, int, float] | None:
        if top != self._top:
            self._top, self._shown = top, memoryview(self._arrays["found"])[: _FOUND.size + PAIR.size * top]
        # few steps: the model has thrown all of Python out of the caches
        found = self._shown.tobytes()
        state, fired, error = _FOUND.unpack_from(found)
        return None if state else (found[_FOUND.size : _FOUND.size + PAIR.size * fired], fired, error)

    def latents(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(idx_1K, vals_1K) of `x_D`, sorted and padded as `sae.runtime.encode` says; None as `read` does."""
        if self._call(self._argument):
            return None
        _, fired, _ = _FOUND.unpack_from(self._arrays["found"])
        shape = 1, self._c.K or max(fired, 1)
        idx_1K, vals_1K = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        idx_1K[0, :fired], vals_1K[0, :fired] = self._arrays["idx"][:fired], self._arrays["vals"][:fired]
        return idx_1K, vals_1K


def most_open(type_name: str, w: SAEWeights, threads: int) -> int:
    """Latents whose exact product may be computed: half of what their bounds save, as rows from here and there take longer
    to read. 0 where the k largest of every thread are half of that already, and where bounds are not worth their bytes."""
    weight_bytes = _WEIGHT_BYTES.get(type_name, _BOUND_BYTES)
    if w.num_latents * w.d_in * weight_bytes < BOUNDS_BYTES:
        return 0
    most = int(w.num_latents * (1 - _BOUND_BYTES / weight_bytes) / 2)
    return most if w.variant != "topk" or 2 * w.k * threads <= most else 0


def _places(arrays: Mapping[str, np.ndarray | None]) -> dict[str, int | None]:
    return {name: None if array is None else array.ctypes.data for name, array in arrays.items()}


def _bounds_arrays(
    kernels: Kernels, w: SAEWeights, k: int, threads: int, bounds: Bounds | None
) -> dict[str, np.ndarray | None]:
    """The arrays of `struct bounds`."""
    if bounds is None:
        return {}
    return {
        "rows": bounds.rows,
        "dither_D": bounds.dither_D,
        "norm_F": bounds.norm_F,
        "input": np.empty(-(-kernels.bounds_input_bytes(w.d_in) // 4), np.int32),
        "upper_F": np.empty(w.num_latents, np.float32),
        "open_F": np.empty(w.num_latents, np.int32),
        "items": np.empty(threads * k + 1, np.uint64),
        "questions": np.empty(threads, np.int64),
    }


def decoder_of(W_dec_FD: np.ndarray | RowMatrix, b_dec_D: np.ndarray) -> Decoder | None:
    """None for a type that decoder.c does not know."""
    if not isinstance(W_dec_FD, RowMatrix):
        return Decoder(W_dec_FD, W_dec_FD.view(np.uint8), _KINDS["F32"], b_dec_D)
    if not isinstance(W_dec_FD, StoredRows) or W_dec_FD.type_name not in _DECODER_KINDS:
        return None
    return Decoder(W_dec_FD, W_dec_FD.raw_FB, _DECODER_KINDS[W_dec_FD.type_name], b_dec_D)


def _check(code: int) -> None:
    if code:
        raise MemoryError("no memory for the scratch space of a reading")


@functools.cache
def kernels() -> Kernels | None:
    """The library, built on first use; None, after one note in the log, where it cannot be had."""
    try:
        return Kernels(build("reading", SOURCES, flag_variants(_COMMON), headers=HEADERS))
    except (BuildError, OSError, AttributeError) as error:  # the last two: a library that does not load
        _log.info("readings without compiled kernels, which is slower: %s", error)
        return None
