"""What computes the latents of a row: one interface for the numpy equations and for faster ways. numpy only.

Shape letters: N rows, D d_in, O d_out, K slots for active latents.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import final

import numpy as np

from .errors import ShapeError
from .runtime import decode, encode
from .weights import SAEWeights

PAIR = struct.Struct("=if")  # a latent, its activation


class RowReading(ABC):
    """Reads one row at a time from memory of its own, without arrays made for each."""

    width: int
    tensor: int = 0  # where the row is put: a ggml tensor on another device, or, where it is 0, ...
    call: tuple[int, int] = (0, 0)  # addresses of a C function that reads the row, and of its argument; 0: of none

    @property
    @abstractmethod
    def x_D(self) -> np.ndarray:
        """... this float32 memory. With `tensor` a copy of what that holds."""

    @property
    def y_O(self) -> np.ndarray:
        """What the reconstruction is compared with: `x_D`; of a transcoder memory for the row at its output."""
        return self.x_D

    @abstractmethod
    def read(self, top: int) -> tuple[bytes, int, float] | None:
        """PAIRs of the active latents of `x_D`, largest first, at most `top`; how many are active; ||y - y_hat||^2.

        None for a row that only `Encoder.encode` can take.
        """

    def found(self, top: int) -> tuple[bytes, int, float] | None:
        """What `read` gives; where there is a `call`, only after its function, which has read the row."""
        return self.read(top)


class Encoder(ABC):
    """An SAE's encoder. The last result is kept: a reading and a clamp of the same rows cost one product."""

    def __init__(self, weights: SAEWeights) -> None:
        self.weights = weights
        self._last: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """How the numbers come about; part of what names a forward pass. "numpy" for the general path."""

    @abstractmethod
    def _encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def row_reading(self) -> RowReading | None:
        """A faster way for single rows, with the results of `encode` and `squared_error`; None where there is none."""
        return None

    @final
    def encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(idx_NK int32, vals_NK float32), sorted and padded as `sae.runtime.encode` says. ShapeError like it."""
        if self._last is None or not np.array_equal(self._last[0], x_ND):
            found = self._encode(x_ND)
            for array in found:
                array.flags.writeable = False
            self._last = np.array(x_ND), found
        return self._last[1]

    def squared_error(self, x_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray) -> np.ndarray:
        """||x - x_hat||^2 of each row, float64 (N,), for latents that `encode` gave."""
        return squared_gap(x_ND, decode(self.weights, idx_NK, vals_NK, x_ND))


@final
class NumpyEncoder(Encoder):
    """The general path: `sae.runtime.encode`."""

    @property
    def name(self) -> str:
        return "numpy"

    def _encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return encode(self.weights, x_ND)


def squared_gap(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """||a - b||^2 of each row, float64 (N,)."""
    gap_ND = np.subtract(a_ND, b_ND, dtype=np.float64)
    return np.einsum("nd,nd->n", gap_ND, gap_ND)


def encoder_of(w: SAEWeights, encoder: Encoder | None) -> Encoder:
    """`encoder`, or numpy. Raises ShapeError for an encoder of another SAE's shape."""
    if encoder is None:
        return NumpyEncoder(w)
    if (encoder.weights.num_latents, encoder.weights.d_in) != (w.num_latents, w.d_in):
        raise ShapeError(
            f"the encoder is of an SAE of {encoder.weights.num_latents} latents over {encoder.weights.d_in} "
            f"dimensions, expected {w.num_latents} over {w.d_in}"
        )
    return encoder


def encoder_name(encoder: Encoder | None) -> str:
    """`/name` of an encoder that is not the general path, else ""."""
    return "" if encoder is None or encoder.name == "numpy" else f"/{encoder.name}"
