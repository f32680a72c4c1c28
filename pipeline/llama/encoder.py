"""An SAE's encoder as a ggml graph: W_enc in the type it is stored in, on llama.cpp's threads and kernels.

    pre = W_enc u + b_enc,  u the row less b_dec, normalised where the SAE has layer norm

On the CPU u is made in float32 by numpy (a few thousand numbers): folding W_enc b_dec into the bias would leave the
product to round a row several times as large. Then W_enc u + b_enc in ggml, of one row in `products.c` where that has
the type as it lies in memory; of the variant "topk" the k largest in `reading.c`; the other variants select by the
general path's code. A row that is only read goes through `reading.c` as a whole (`row_reading`).

On another device, and on a CPU without a compiler, all of it is ggml nodes (`latent_nodes.py`), and a row that is only
read is copied from the hooked tensor to the encoder's input there (`DeviceRow`).

ggml rounds u to what its kernel of the type multiplies with: F16 for F16, BF16 for BF16, blocks of 8-bit integers for
the quantised types. A row beyond the range of those takes the general path.

Shape letters: N rows, D d_in, F latents, K slots for active latents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import final

import gguf
import numpy as np

from convert.sae_gguf import StoredMatrix
from sae.encoders import PAIR, Encoder, RowReading
from sae.errors import LlamaError, ShapeError
from sae.rows import RowMatrix
from sae.runtime import PRE_ACT_BYTES, checked_rows, encode, encoder_input, joined, select
from sae.weights import SAEWeights

from .ggml_graph import Affine, Backend, Graph, to_host
from .latent_nodes import LatentNodes
from .reading import Bounds, CompiledRow, Decoder, decoder_of, kernels, most_open
from .switching import quick_switching

MATRIX_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0")
_HALF = 65504.0  # the largest F16
_log = logging.getLogger(__name__)


@final
class GgmlEncoder(Encoder):
    """`sae.runtime.encode` at ggml's speed: the same latents away from ties, values within the type's rounding."""

    def __init__(
        self, weights: SAEWeights, *, n_threads: int, stored: StoredMatrix | None = None, device: int = 0
    ) -> None:
        """`stored`: W_enc in its file's type; without it as `weights` has it: the file's type too (`StoredRows`), or
        float32. `n_threads`: as many as the model's session has. `device`: whose memory the hook point's values are in
        (placement.py), 0 is the CPU.

        LlamaError where llama.cpp's device cannot compute it, ShapeError where `stored` is of another SAE.
        """
        super().__init__(weights)
        shape = (weights.num_latents, weights.d_in)
        self.dtype, raw = _stored_bytes(weights, stored)
        if stored is not None and stored.shape != shape:
            raise ShapeError(f"the stored encoder is {stored.shape}, the SAE's {shape}")
        if self.dtype not in MATRIX_TYPES:
            raise LlamaError(f"no encoder of type {self.dtype}; expected one of {', '.join(MATRIX_TYPES)}")
        kind = gguf.GGMLQuantizationType[self.dtype]
        self._limit = _largest_input(kind)
        backend = Backend(n_threads=n_threads, device=device)
        self._native = kernels()
        self._affine = Affine(backend, int(kind), raw, weights.d_in, weights.b_enc_F)
        on_cpu = self._native is not None and backend.is_cpu
        self._step = max(1, PRE_ACT_BYTES // (4 * weights.num_latents))
        self._nodes = None if on_cpu else LatentNodes(self._affine, weights, most_rows=self._step)
        self._decoder = None if weights.needs_input else decoder_of(weights.W_dec_FD, weights.b_dec_D)
        self._n_threads = n_threads
        self._pre_1F = np.empty((1, weights.num_latents), np.float32)
        has = on_cpu and self._native is not None and self._native.has_affine(self.dtype, weights.num_latents)
        self._one_row = has and self._is_ggmls_product()

    @property
    def name(self) -> str:
        """`ggml:DEVICE:LAYOUT:TYPE`."""
        return f"ggml:{self._affine.backend.name}:{self._affine.layout}:{self.dtype}"

    @property
    def selects_on_device(self) -> bool:
        """Whether the latents are chosen by ggml, too."""
        return self._nodes is not None and self._nodes.selects

    def _is_ggmls_product(self) -> bool:
        """Whether `reading.c` and ggml agree about how the matrix lies in memory: on one row both give the same."""
        u_1D = np.cos(np.arange(self.weights.d_in, dtype=np.float32))[None]
        ggmls_1F = self._affine.pre_acts(u_1D)
        gap_1F = self._compiled_pre_acts(u_1D) - ggmls_1F
        return bool(np.abs(gap_1F).max() <= 1e-4 * np.abs(ggmls_1F).max())

    def _encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x_ND = checked_rows(self.weights, x_ND)
        if not len(x_ND):
            return encode(self.weights, x_ND)
        with quick_switching():
            blocks = [self._block(x_ND[i : i + self._step]) for i in range(0, len(x_ND), self._step)]
            return blocks[0] if len(blocks) == 1 else joined(self.weights, blocks)

    def _holds(self, u_ND: np.ndarray) -> bool:
        """Whether ggml's rounding of these rows stays finite; NaN is not."""
        flat_M = u_ND.reshape(-1)
        if float(np.dot(flat_M, flat_M)) < self._limit**2:  # one cheap pass says yes for all but rare rows
            return True
        return bool(max(u_ND.max(), -u_ND.min()) < self._limit)

    def _by_numpy(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _log.info("rows beyond what a %s product holds: encoded by numpy", self.dtype)
        return encode(self.weights, x_ND)

    def squared_error(self, x_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray) -> np.ndarray:
        if self._native is None or self._decoder is None:
            return super().squared_error(x_ND, idx_NK, vals_NK)
        x_ND = np.ascontiguousarray(x_ND, np.float32)
        return self._native.squared_error(self._decoder, x_ND, idx_NK, vals_NK)

    def row_reading(self) -> RowReading | None:
        if self._nodes is not None:
            graph = None if self.weights.is_transcoder else self._nodes.row_graph()
            return None if graph is None else DeviceRow(self, self._nodes, graph)
        return None if self._decoder is None else self._compiled_row(self._decoder)

    @cached_property
    def _row(self) -> CompiledRow | None:
        """For `encode` of a single row."""
        return self._compiled_row(None)

    def _compiled_row(self, decoder: Decoder | None) -> CompiledRow | None:
        w, plain = self.weights, self.weights.variant != "groupmax" and self.weights.norm_mode == "none"
        if self._native is None or not (self._one_row and plain):
            return None
        return CompiledRow(
            self._native, w, decoder, self.dtype, self._affine.weight_address, self._affine,
            limit=self._limit, threads=self._n_threads, bounds=self._bounds,
        )  # fmt: skip

    @cached_property
    def _bounds(self) -> Bounds | None:
        """Of the encoder's rows, made with the first reading: half a byte a weight more that saves reading most others."""
        assert self._native is not None
        w, n_threads = self.weights, self._n_threads
        if not most_open(self.dtype, w, n_threads):
            return None
        return self._native.bounds(self.dtype, self._affine.weight_address, (w.num_latents, w.d_in), n_threads)

    def _pre_acts(self, u_ND: np.ndarray) -> np.ndarray:
        """Pre-activations, valid until the next call."""
        return self._compiled_pre_acts(u_ND) if self._one_row and len(u_ND) == 1 else self._affine.pre_acts(u_ND)

    def _compiled_pre_acts(self, u_1D: np.ndarray) -> np.ndarray:
        assert self._native is not None
        u_D = np.ascontiguousarray(u_1D[0])
        address, b_F = self._affine.weight_address, self.weights.b_enc_F
        self._native.affine(self.dtype, address, u_D, b_F, self._pre_1F[0], self._n_threads)
        return self._pre_1F

    def _block(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._nodes is not None:
            found = self._nodes.encode(x_ND)
            return self._by_numpy(x_ND) if found is None else found
        if len(x_ND) == 1 and self._row is not None:
            self._row.x_D[:] = x_ND[0]
            found = self._row.latents()
            return self._by_numpy(x_ND) if found is None else found
        u_ND = encoder_input(self.weights, x_ND)
        if not self._holds(u_ND):
            return self._by_numpy(x_ND)
        pre_NF = self._pre_acts(u_ND)
        if self._native is not None and self.weights.variant == "topk":
            return self._native.largest(pre_NF, self.weights.k, self._n_threads)
        return select(self.weights, pre_NF)


@final
class DeviceRow(RowReading):
    """A row that stays on the encoder's device; what comes back are its latents, and the row for its squared error."""

    def __init__(self, encoder: GgmlEncoder, nodes: LatentNodes, graph: Graph) -> None:
        self._encoder, self._nodes, self._graph = encoder, nodes, graph
        self._x_1D = graph.x_ND
        self.width, self.tensor = encoder.weights.d_in, 0 if self._x_1D is not None else graph.x

    @property
    def x_D(self) -> np.ndarray:
        return (to_host(self._graph.x) if self._x_1D is None else self._x_1D)[0]

    def read(self, top: int) -> tuple[bytes, int, float] | None:
        with quick_switching():
            self._graph.compute()
        found = self._nodes.latents(self._graph)
        if found is None:
            return None
        idx_1K, vals_1K = found
        error = float(self._encoder.squared_error(self.x_D[None], idx_1K, vals_1K)[0])
        fired = int(np.count_nonzero(vals_1K))
        pairs = zip(idx_1K[0, : min(fired, top)].tolist(), vals_1K[0].tolist(), strict=False)
        return b"".join(PAIR.pack(*pair) for pair in pairs), fired, error


def _stored_bytes(weights: SAEWeights, stored: StoredMatrix | None) -> tuple[str, np.ndarray | Iterator[np.ndarray]]:
    """W_enc's type and its bytes, whole or piece by piece."""
    if stored is not None:
        return stored.dtype, stored.raw
    W_enc_FD = weights.W_enc_FD
    if isinstance(W_enc_FD, RowMatrix):
        return W_enc_FD.type_name, W_enc_FD.pieces()
    return "F32", W_enc_FD.view(np.uint8).reshape(-1)


def _largest_input(kind: gguf.GGMLQuantizationType) -> float:
    """From here on ggml's own rounding of a row overflows."""
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
        return float(np.finfo(np.float32).max)
    return _HALF if kind == gguf.GGMLQuantizationType.F16 else 127 * _HALF  # a block's scale is an F16


def open_encoder(
    weights: SAEWeights, choice: str, *, n_threads: int, stored: StoredMatrix | None = None, device: int = 0
) -> Encoder | None:
    """The encoder of `apply.encoder`: None (numpy) for "numpy", and for "auto" where ggml cannot, with the reason logged.

    LlamaError for "ggml" where it cannot.
    """
    if choice == "numpy":
        return None
    try:
        return GgmlEncoder(weights, n_threads=n_threads, stored=stored, device=device)
    except LlamaError as error:
        if choice == "ggml":
            raise
        _log.warning("the encoder runs in numpy, which is slower: %s", error)
        return None
