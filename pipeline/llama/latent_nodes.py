"""From a row to its latents in ggml nodes: for devices whose memory is not ours, where each copy to the host is a wait.

    u = (x - mu) / (sigma + eps) - b_dec,   pre = W_enc u + b_enc,   the latents that fire: k largest | one of each group | over their threshold

The variant's choice is made by the device where it has the operations, else on the host from all pre-activations; so
is u. What is above zero is told on the host, from what was chosen.

Shape letters: N rows, D d_in, F latents, K slots for active latents, G latents of a group.
"""

from __future__ import annotations

import ctypes
from typing import final

import numpy as np

from sae.runtime import encoder_input, gather, select
from sae.weights import SAEWeights

from .ggml_graph import Affine, Constants, Graph, Graphs, unsupported
from .symbols import function, tensor_at

_P, _I64, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_top_k = function("ggml_top_k", _P, _P, _P, ctypes.c_int)
_argmax = function("ggml_argmax", _P, _P, _P)
_get_rows = function("ggml_get_rows", _P, _P, _P, _P)
_reshape_2d = function("ggml_reshape_2d", _P, _P, _P, _I64, _I64)
_reshape_3d = function("ggml_reshape_3d", _P, _P, _P, _I64, _I64, _I64)
_add = function("ggml_add", _P, _P, _P, _P)
_sub = function("ggml_sub", _P, _P, _P, _P)
_mul = function("ggml_mul", _P, _P, _P, _P)
_div = function("ggml_div", _P, _P, _P, _P)
_sqr = function("ggml_sqr", _P, _P, _P)
_sqrt = function("ggml_sqrt", _P, _P, _P)
_mean = function("ggml_mean", _P, _P, _P)
_sum_rows = function("ggml_sum_rows", _P, _P, _P)
_scale_bias = function("ggml_scale_bias", _P, _P, _P, _F, _F)
_step = function("ggml_step", _P, _P, _P)


@final
class LatentNodes:
    """The encoder of an SAE on the device of `affine`, which holds W_enc and b_enc."""

    def __init__(self, affine: Affine, weights: SAEWeights, *, most_rows: int = 1) -> None:
        """`most_rows` of one call."""
        self._affine, self._w = affine, weights
        constants = {"b_dec": weights.b_dec_D} if weights.b_dec_subtracted else {}
        if weights.threshold_F is not None:
            constants["threshold"] = weights.threshold_F
        self._constants = Constants(affine.backend, constants)
        D = weights.d_in
        sizes = (1, most_rows)
        self.takes_rows = not unsupported(affine.backend, D, lambda context, x: [self._input(context, x)], sizes)
        self.selects = not unsupported(
            affine.backend, D, lambda context, x: self._chosen(context, affine.product(context, x)), sizes
        )
        self._graphs = Graphs(affine.backend, D, self._nodes)

    def encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """`sae.runtime.encode` of these rows; None where a row is beyond what the device's product holds."""
        return self.latents(self._graphs.run(x_ND if self.takes_rows else encoder_input(self._w, x_ND)))

    def row_graph(self) -> Graph | None:
        """The graph of one row, which is put into its `x`; None where the row is made ready on the host."""
        return Graph(self._affine.backend, 1, self._w.d_in, self._nodes) if self.takes_rows else None

    def latents(self, graph: Graph) -> tuple[np.ndarray, np.ndarray] | None:
        """(idx_NK, vals_NK) of a computed graph, sorted and padded as `sae.runtime.encode` says."""
        w, threshold = self._w, self._w.variant == "threshold"
        if not self.selects or threshold:
            pre_NF = graph.values(0)
            if not np.isfinite(pre_NF).all():
                return None
            return gather(pre_NF, pre_NF != 0, None) if self.selects else select(w, pre_NF)
        idx_NK, vals_NK = graph.values(0), graph.values(1)
        if not np.isfinite(vals_NK).all():  # one number beyond the type makes every pre-activation of its row so
            return None
        if w.variant == "groupmax":
            idx_NK = idx_NK + np.arange(w.k, dtype=np.int32) * (w.num_latents // w.k)
        fires_NK = vals_NK > 0
        vals_NK, idx_NK = np.where(fires_NK, vals_NK, np.float32(0)), np.where(fires_NK, idx_NK, 0)
        order_NK = np.lexsort((idx_NK, -vals_NK))
        return np.take_along_axis(idx_NK, order_NK, 1), np.take_along_axis(vals_NK, order_NK, 1)

    def _nodes(self, context: int, x: int) -> list[int]:
        pre = self._affine.product(context, self._input(context, x) if self.takes_rows else x)
        return self._chosen(context, pre) if self.selects else [pre]

    def _input(self, context: int, x: int) -> int:
        """u: `sae.runtime.encoder_input`."""
        w = self._w
        if w.norm_mode != "none":
            x = _sub(context, x, _mean(context, x))
            scatter = _sum_rows(context, _sqr(context, x))
            sigma = _sqrt(context, _scale_bias(context, scatter, 1 / (w.d_in - w.norm_correction), 0.0))
            x = _div(context, x, _scale_bias(context, sigma, 1.0, w.norm_eps))
            x = _add(context, x, _scale_bias(context, scatter, 0.0, 0.0))  # squares beyond float32 make it not a number
        return _sub(context, x, self._constants["b_dec"]) if w.b_dec_subtracted else x

    def _chosen(self, context: int, pre: int) -> list[int]:
        """(latents, their pre-activations); of the variant "threshold" all activations."""
        w, rows = self._w, tensor_at(pre).ne[1]
        if w.variant == "threshold":
            fires = _step(context, _sub(context, pre, self._constants["threshold"]))
            return [_mul(context, pre, fires)]
        if w.variant == "groupmax":
            size = w.num_latents // w.k
            best = _argmax(context, _reshape_2d(context, pre, size, w.k * rows))
            each = _reshape_2d(context, best, 1, w.k * rows)
            vals = _get_rows(context, _reshape_3d(context, pre, 1, size, w.k * rows), each)
            return [_reshape_2d(context, best, w.k, rows), _reshape_2d(context, vals, w.k, rows)]
        idx = _top_k(context, pre, w.k)
        vals = _get_rows(context, _reshape_3d(context, pre, 1, w.num_latents, rows), idx)
        return [idx, _reshape_2d(context, vals, w.k, rows)]
