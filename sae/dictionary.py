"""The geometry of a dictionary: cosines between its directions. numpy only.

Products are made block by block, so that a dictionary of any size needs `block_bytes` beside itself.

Shape letters: D d_in, F latents, S latents searched.
"""

from __future__ import annotations

import numpy as np

from .errors import ShapeError

BLOCK_BYTES = 64 << 20


def unit_rows(W_FD: np.ndarray) -> np.ndarray:
    """W[f] / ||W[f]||, float32; a zero row stays zero, so its cosine with everything is 0."""
    norm_F1 = np.linalg.norm(W_FD, axis=1, keepdims=True)
    return np.divide(W_FD, norm_F1, out=np.zeros(W_FD.shape, np.float32), where=norm_F1 > 0, casting="same_kind")


def nearest(
    W_FD: np.ndarray, searched_S: np.ndarray | None = None, *, block_bytes: int = BLOCK_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other row of each row in `searched_S` (default: of all): max_{g != f} cos(W[f], W[g]).

    Returns (cosine_S float32, index_S int64). With a single row there is no other: NaN and -1.
    """
    searched_S = np.arange(len(W_FD)) if searched_S is None else np.asarray(searched_S, np.int64)
    if len(W_FD) < 2:
        return np.full(len(searched_S), np.nan, np.float32), np.full(len(searched_S), -1, np.int64)
    unit_FD = unit_rows(W_FD)
    cosine_S, index_S = np.empty(len(searched_S), np.float32), np.empty(len(searched_S), np.int64)
    step = max(1, block_bytes // (4 * len(W_FD)))
    for start in range(0, len(searched_S), step):
        part_S = searched_S[start : start + step]
        cosines = unit_FD[part_S] @ unit_FD.T
        rows = np.arange(len(part_S))
        cosines[rows, part_S] = -np.inf
        index_S[start : start + step] = cosines.argmax(axis=1)
        cosine_S[start : start + step] = cosines[rows, index_S[start : start + step]]
    return cosine_S, index_S


def row_cosines(A_FD: np.ndarray, B_FD: np.ndarray) -> np.ndarray:
    """cos(A[f], B[f]) of every row, float64 (F,); 0 where one of them is zero.

    Raises:
        ShapeError: the matrices have different shapes.
    """
    if A_FD.shape != B_FD.shape:
        raise ShapeError(f"row by row needs matrices of one shape, got {A_FD.shape} and {B_FD.shape}")
    dot_F = np.einsum("fd,fd->f", A_FD, B_FD, dtype=np.float64)
    norms_F = np.linalg.norm(A_FD.astype(np.float64), axis=1) * np.linalg.norm(B_FD.astype(np.float64), axis=1)
    return np.divide(dot_F, norms_F, out=np.zeros_like(dot_F), where=norms_F > 0)
