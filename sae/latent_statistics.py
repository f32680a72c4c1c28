"""What each latent does on a split, streamed in float64. numpy only.

    density   share of the rows on which the latent fires
    mean_on   mean activation where it fires            max     largest activation
    explained (sum over rows of ||e + s a_f W_dec[f]||^2 - ||e||^2) / sum ||x - mean||^2,  e = x - x_hat, s = sigma:
              by how much FVU would rise if the latent were left out of the reconstruction. It is below zero where
              the latent makes things worse, and the shares of the latents do not add up to 1 - FVU.

Of columns in P parts, each in units of its own scale s_p, `explained` is that of the parts together: both sums are
sum_p (...)_p / s_p^2.

Shape letters: N rows, D columns reconstructed, P parts of them, F latents, K slots, M firings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .errors import ConfigError, ShapeError

BLOCK_BYTES = 4 << 20  # decoder rows gathered at once


class LatentStatistics:
    """The columns of this page for a dictionary of decoder rows W_dec_FD, batch by batch.

    `parts`: the columns of W_dec in P parts (default: one) whose shares are kept apart.
    """

    def __init__(self, W_dec_FD: np.ndarray, parts: Sequence[slice] = (slice(None),)) -> None:
        self.W_dec_FD, self.parts = W_dec_FD, tuple(parts)
        self.rows = 0
        self.fired_F = np.zeros(len(W_dec_FD), np.int64)
        self.sum_F = np.zeros(len(W_dec_FD))
        self.max_F = np.zeros(len(W_dec_FD), np.float32)
        self.gain_PF = np.zeros((len(self.parts), len(W_dec_FD)))

    def update(
        self, x_ND: np.ndarray, x_hat_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray,
        sigma_N1: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Add rows with their reconstruction and their latents (slots of value 0 are unused).

        `sigma_N1`: what activations are in units of (`runtime.sigma`); 1 where not given.

        Raises:
            ShapeError: the arrays do not belong to the same rows or to this dictionary.
        """
        if idx_NK.shape != vals_NK.shape or len(idx_NK) != len(x_ND) or x_ND.shape != x_hat_ND.shape:
            raise ShapeError(
                f"rows {x_ND.shape}, reconstructions {x_hat_ND.shape}, latents {idx_NK.shape}, values {vals_NK.shape}"
            )
        if x_ND.shape[1] != self.W_dec_FD.shape[1]:
            raise ShapeError(f"rows of width {x_ND.shape[1]}, decoder rows of width {self.W_dec_FD.shape[1]}")
        row_M, slot_M = np.nonzero(vals_NK > 0)
        latent_M, value_M = idx_NK[row_M, slot_M], vals_NK[row_M, slot_M]
        latents = len(self.fired_F)
        self.rows += len(x_ND)
        self.fired_F += np.bincount(latent_M, minlength=latents)
        self.sum_F += np.bincount(latent_M, weights=value_M, minlength=latents)
        np.maximum.at(self.max_F, latent_M, value_M)
        if sigma_N1 is not None:
            value_M = value_M * sigma_N1[row_M, 0]
        error_ND = np.subtract(x_ND, x_hat_ND, dtype=np.float32)
        for gain_F, part in zip(self.gain_PF, self.parts, strict=True):
            gain_M = _gains(self.W_dec_FD[:, part], error_ND[:, part], row_M, latent_M, value_M)
            gain_F += np.bincount(latent_M, weights=gain_M, minlength=latents)

    def explained_of(self, scatter_P: ArrayLike) -> np.ndarray:
        """`explained` of every part by itself, (F, P); `scatter_P` as in `result`."""
        return self.gain_PF.T / np.asarray(scatter_P, np.float64)

    def result(self, scatter_P: ArrayLike, scale_P: ArrayLike = 1.0) -> dict[str, np.ndarray]:
        """The columns by name, each (F,); `scatter_P`: sum ||x - mean||^2 over the same rows, of each part (or the one).

        Raises:
            ConfigError: no rows, or no scatter.
        """
        scatter_P, scale_P = np.broadcast_arrays(np.atleast_1d(scatter_P).astype(np.float64), scale_P)
        if self.rows == 0 or not (scatter_P > 0).all():
            raise ConfigError(f"statistics of latents need rows that differ, got {self.rows} with scatter {scatter_P}")
        weight_P = scatter_P / np.square(scale_P)
        return {
            "density": self.fired_F / self.rows,
            "mean_on": np.divide(self.sum_F, self.fired_F, out=np.zeros_like(self.sum_F), where=self.fired_F > 0),
            "max": self.max_F,
            "explained": self.explained_of(scatter_P) @ (weight_P / weight_P.sum()),
        }


def _gains(
    W_dec_FD: np.ndarray, error_ND: np.ndarray, row_M: np.ndarray, latent_M: np.ndarray, value_M: np.ndarray
) -> np.ndarray:
    """||e + a W||^2 - ||e||^2 = 2 a <e, W> + a^2 ||W||^2 of every firing, float64."""
    value_M = value_M.astype(np.float64)
    norm2_F = np.einsum("fd,fd->f", W_dec_FD, W_dec_FD, dtype=np.float64)
    dot_M = np.empty(len(row_M))
    step = max(1, BLOCK_BYTES // (4 * W_dec_FD.shape[1]))
    for start in range(0, len(row_M), step):
        some = slice(start, start + step)
        dot_M[some] = np.einsum("md,md->m", error_ND[row_M[some]], W_dec_FD[latent_M[some]])
    return 2 * value_M * dot_M + value_M**2 * norm2_F[latent_M]
