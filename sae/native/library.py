"""The compiled step through ctypes: its one structure, its functions, whether it can be had.

Shape letters: N rows, D d_in, F latents, K top-k.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from ..kernels import rest_
from ..model import SparseCoder
from ..pre_acts import MOST_DIMENSIONS
from ..train_config import TrainConfig
from .build import BuildError, build, flag_variants, processor

FOLDER = Path(__file__).parent
UNIT = 96  # as in vectors.h
LANES = 16  # as in vectors.h
AMX = 16  # height of a tile, as in vectors.h
LATENTS_PER_K = 48  # fewer latents than this for each of the k, and tiles tell too little about the k largest

_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_TORCHS_OPENMP = Path(torch.__file__).parent / "lib" / "libomp.dylib"  # in its wheels for macOS
SERIAL_THREADS = 2  # of torch, with which a compiled step of one thread is still the faster
LATENTS_PER_K_OF_BATCH = 12  # BatchTopK asks no tiles; but of fewer latents too many would be candidates
_INTEGERS = ("N", "D", "F", "K", "threads", "pool_capacity", "tile", "C", "M", "auxk_k")
_FLOATS = ("beta1", "beta2", "eps", "step_size", "root_correction", "least", "auxk_weight")
_BEFORE = (
    "W_enc_FD", "W_enc_m", "W_enc_v", "b_enc_F", "b_enc_m", "b_enc_v",
    "W_dec_FD", "W_dec_m", "W_dec_v", "b_dec_D", "b_dec_m", "b_dec_v",
)  # fmt: skip
_AFTER = (
    "bf16_FD", "q_tiles", "q_scale_F", "q_norm_F", "q_shift_F", "q_offset_F", "balance_D", "dither_D",
    "u_ND", "named_NC", "centred_ND", "grad_ND", "first_N1", "row_P", "idx_P", "vals_P", "grad_vals_P", "error_N", "candidates_N",
    "pool", "pool_used", "pool_at_N", "pool_count_N", "fired_F", "start_F1", "pair_P", "sorted_row_P", "sorted_val_P", "sorted_grad_P", "sum_enc_FD", "sum_dec_FD", "partial_D", "extra_of_F", "extra_enc_MD", "extra_dec_MD", "extra_bias_M",
    "auxk_memory", "dead_M", "auxk_loss",
)  # fmt: skip

_log = logging.getLogger(__name__)


class Step(ctypes.Structure):
    """`struct step` of vectors.h. It holds addresses: the tensors must outlive every call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in _BEFORE),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_void_p) for name in _AFTER),
    )

    def point(self, **tensors: torch.Tensor | None) -> None:
        """Set addresses; None: not there."""
        for name, tensor in tensors.items():
            assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu"), name
            setattr(self, name, None if tensor is None else tensor.data_ptr())


class Library:
    """The functions of select.c, candidates.c, auxk.c, sums.c and step.c; MemoryError where they could not have their scratch memory."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.step_bytes = int(self._library.ggscope_step_bytes())  # Step's size, as the compiler has it
        heights = (ctypes.c_int64 * 2)()
        # of the 8-bit products that run here, the fastest first; empty: none does
        self.tiles = tuple(heights[: self._library.ggscope_tiles(heights)])
        self.tile = self.tiles[0] if self.tiles else 0
        self._auxk_bytes = self._library.ggscope_auxk_bytes
        self._auxk_bytes.restype = ctypes.c_int64
        self.has_threads = bool(self._library.ggscope_has_threads())

    @property
    def has_int8(self) -> bool:
        return bool(self.tiles)

    def tile_shape(self, num_latents: int, d_in: int) -> tuple[int, int]:
        """Latents and dimensions of the 8-bit weights, with the zeros beyond them."""
        columns = 64 if self.tile == AMX else 4
        return -(-num_latents // UNIT) * UNIT, -(-d_in // columns) * columns

    def run(self, function: str, step: Step) -> None:
        """A function that takes the structure: `rows_int8`, `latents`, ..."""
        self._check(function, getattr(self._library, f"ggscope_{function}")(ctypes.byref(step)))

    def auxk_bytes(self, step: Step) -> int:
        """How much memory `auxk` needs for the sizes in the structure."""
        return int(self._auxk_bytes(ctypes.byref(step)))

    def topk(self, pre_NF: torch.Tensor, k: int, idx_NK: torch.Tensor) -> None:
        """idx_NK (int32) of the k largest entries of every row of float32 or bfloat16 pre-activations, in no order.

        Equal entries at the edge: the lower index. NaN counts as the largest.
        """
        function = {torch.float32: "topk_f32", torch.bfloat16: "topk_bf16"}[pre_NF.dtype]
        assert pre_NF.is_contiguous()
        assert idx_NK.is_contiguous()
        assert idx_NK.dtype == torch.int32
        rows, latents = (ctypes.c_int64(size) for size in pre_NF.shape)
        code = getattr(self._library, f"ggscope_{function}")(
            ctypes.c_void_p(pre_NF.data_ptr()), rows, latents, ctypes.c_int64(k),
            ctypes.c_void_p(idx_NK.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        self._check(function, code)

    def keep_(self, pre_NF: torch.Tensor, k: int) -> torch.Tensor:
        """ReLU, and all but the k largest entries of every row to zero, in place. Ties and NaN as in `topk`."""
        function = {torch.float32: "keep_f32", torch.bfloat16: "keep_bf16"}[pre_NF.dtype]
        assert pre_NF.is_contiguous()
        rows, latents = (ctypes.c_int64(size) for size in pre_NF.shape)
        code = getattr(self._library, f"ggscope_{function}")(
            ctypes.c_void_p(pre_NF.data_ptr()), rows, latents, ctypes.c_int64(k),
            ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        self._check(function, code)
        return pre_NF

    def rest_(
        self, product_ND: torch.Tensor, minus_error_ND: torch.Tensor, unit: float, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernels.rest_`; a bfloat16 product becomes the gradient in place, in one pass."""
        if product_ND.dtype != torch.bfloat16:
            return rest_(product_ND, minus_error_ND, unit, scale)
        assert product_ND.is_contiguous()
        assert minus_error_ND.is_contiguous()
        rows, width = (ctypes.c_int64(size) for size in product_ND.shape)
        square_N = torch.empty(len(product_ND), dtype=torch.float64)
        code = self._library.ggscope_rest_bf16(
            ctypes.c_void_p(product_ND.data_ptr()), ctypes.c_void_p(minus_error_ND.data_ptr()), rows, width,
            ctypes.c_float(unit), ctypes.c_float(float(scale)), ctypes.c_void_p(square_N.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        self._check("rest_bf16", code)
        return square_N.sum().float(), product_ND

    @staticmethod
    def _check(function: str, code: int) -> None:
        if code != 0:
            raise MemoryError(f"no memory for the scratch space of {function}")


@functools.cache
def native_library() -> Library | None:
    """The library, built on first use; None, after one warning, where it cannot be had."""
    try:
        sources = [FOLDER / name for name in ("select.c", "candidates.c", "step.c", "sums.c", "auxk.c")]
        flags = flag_variants(_COMMON, openmp=_TORCHS_OPENMP if _TORCHS_OPENMP.exists() else None)
        library = Library(
            build("step", sources, flags, [FOLDER / name for name in ("vectors.h", "product.h", "rounded.h")])
        )
        if not library.tiles and "avx512_vnni" in processor():
            _log.warning(
                "this compiler made no 8-bit products of this processor, so training is slower: try gcc (CC=gcc)"
            )
        if not library.has_threads:
            _log.warning("this compiler has no OpenMP, so the compiled step has one thread: try gcc (CC=gcc)")
        return library
    except (BuildError, OSError, AttributeError) as error:  # the last two: a library that does not load
        _log.warning("training without compiled kernels, which is slower: %s", error)
        return None


def selects_in_int8(d_in: int, num_latents: int, k: int, *, over_batch: bool = False) -> bool:
    """Whether the latents are found by 8-bit products, their exact float32 values deciding: faster than bfloat16.
    `over_batch`: the choice is BatchTopK's."""
    library = native_library()
    least = (LATENTS_PER_K_OF_BATCH if over_batch else LATENTS_PER_K) * k
    return library is not None and library.has_int8 and num_latents >= least and d_in <= MOST_DIMENSIONS


def finds_in_int8(model: SparseCoder, config: TrainConfig) -> bool:
    """`selects_in_int8` of a model, with the largest k that it trains with."""
    most_k = max(config.k, config.options.k_start)
    return selects_in_int8(model.d_in, model.num_latents, most_k, over_batch=model.selects == "batchtopk")
