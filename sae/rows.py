"""A matrix kept in another form than float32 arrays: rows are made when they are asked for. numpy only.

Shape letters: F rows (latents), D columns, N rows multiplied with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK_BYTES = 4 << 20  # float32 values made at a time


class RowMatrix(ABC):
    """Stands for a float32 (F, D) array in `SAEWeights` where only some rows are ever needed: a file's quantised matrix.

    `matrix[index]` gives float32 rows for any numpy index of the first axis; `np.asarray(matrix)` the whole array.
    """

    ndim = 2
    shape: tuple[int, int]
    type_name: str

    @abstractmethod
    def rows(self, index: Any) -> np.ndarray:
        """Float32 rows: an index of shape S gives S + (D,)."""

    @abstractmethod
    def pieces(self) -> Iterator[np.ndarray]:
        """The bytes as they are kept, uint8, one piece after the other; each is valid until the next."""

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.rows(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.rows(slice(None)).astype(dtype or np.float32, copy=False)

    def blocks(self) -> Iterator[slice]:
        """Slices over all rows, BLOCK_BYTES of float32 each."""
        step = max(1, BLOCK_BYTES // (4 * self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(self.shape[0], start + step))


def times_transposed(x_ND: np.ndarray, W_FD: np.ndarray | RowMatrix, out_NF: np.ndarray) -> np.ndarray:
    """out_NF = x_ND W_FD^T; of a `RowMatrix` without ever making all of it."""
    if not isinstance(W_FD, RowMatrix):
        return np.matmul(x_ND, W_FD.T, out=out_NF)
    for rows in W_FD.blocks():
        out_NF[:, rows] = x_ND @ W_FD[rows].T
    return out_NF
