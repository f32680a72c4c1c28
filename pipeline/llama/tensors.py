"""Rows of a ggml tensor to numpy and back, whatever its strides."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from sae.errors import LlamaError

from .symbols import TYPE_F32, tensor_at, tensor_get, tensor_nbytes, tensor_set, type_name


class TensorWindow:
    """A float32 tensor seen as (rows, width): one row per token, the rest of the axes side by side.

    `read` copies the values to the host into a buffer that is kept from call to call; `write` puts that buffer back.
    A tensor that is not contiguous (a view into a fused product) is copied with the gaps between its elements, and
    the gaps are written back as they were.
    """

    def __init__(self) -> None:
        self._span = np.empty(0, np.float32)
        self._address = 0

    def open(self, address: int, label: str) -> None:
        """Point at a tensor of the running graph; LlamaError when it is not float32."""
        tensor = tensor_at(address)
        if tensor.type != TYPE_F32:
            raise LlamaError(f"{label} holds {type_name(tensor.type).decode()} values; only F32 tensors can be hooked")
        self._address = address
        self.ne: tuple[int, ...] = tuple(tensor.ne)
        self._nb: tuple[int, ...] = tuple(tensor.nb)
        self._bytes = tensor_nbytes(address)
        self.size = self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]
        self._dense = self._bytes == 4 * self.size and self._nb[0] == 4 and self._ascending()
        if self._bytes > self._span.nbytes:
            self._span = np.empty(self._bytes // 4, np.float32)

    def read(self) -> np.ndarray:
        """The values in ggml's order as (ne3, ne2, ne1, ne0): a view of the buffer."""
        tensor_get(self._address, self._span.ctypes.data, 0, self._bytes)
        shape = self.ne[::-1]
        if self._dense:
            return self._span[: self.size].reshape(shape)
        return as_strided(self._span, shape, self._nb[::-1])

    def write(self) -> None:
        """Put the buffer back into the tensor."""
        tensor_set(self._address, self._span.ctypes.data, 0, self._bytes)

    def _ascending(self) -> bool:
        return all(self._nb[i + 1] == self._nb[i] * self.ne[i] for i in range(3) if self.ne[i + 1] > 1)


def as_rows(values: np.ndarray, rows: int, label: str) -> np.ndarray:
    """(ne3, ne2, ne1, ne0) as (rows, width); a view where the strides allow it.

    The tokens are the outermost axis longer than one.
    """
    if rows and values.size % rows == 0:
        outer = next((n for n in values.shape if n > 1), 1)
        if outer == rows or rows == 1:
            return values.reshape(rows, -1)
    raise LlamaError(f"{label} has shape {values.shape[::-1]} (ggml order) and no row for each of {rows} tokens")


def half_apart(width: int, heads: int) -> np.ndarray:
    """Column order that turns neighbouring RoPE pairs (GGUF) into pairs half a head apart (HF)."""
    head = width // heads
    within = np.arange(head).reshape(head // 2, 2).T.ravel()
    return (np.arange(heads)[:, None] * head + within).ravel()


def add_delta_(values_ND: np.ndarray, delta: Any, label: str) -> None:
    """x + delta in place; elements whose delta is zero keep their bits."""
    delta_ND = np.asarray(delta, np.float32)
    if delta_ND.shape != values_ND.shape:
        raise LlamaError(f"an edit of {label} returned shape {delta_ND.shape}, expected {values_ND.shape}")
    np.add(values_ND, delta_ND, out=values_ND, where=delta_ND != 0)
