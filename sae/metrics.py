"""One definition per metric, streamed in float64. numpy only.

    fvu      = sum ||x - x_hat||^2 / sum ||x - mean||^2      mean: of the rows seen, as exact as two passes
    mse      = sum ||x - x_hat||^2 / (N D)
    cosine   = mean over rows of <x, x_hat> / (||x|| ||x_hat||); a row with a zero vector counts as 0
    l2_ratio = mean over rows of ||x_hat|| / ||x||; rows with x = 0 are left out
    relative_reconstruction_bias = sum ||x_hat||^2 / sum <x, x_hat>
               1: unbiased; below 1: the reconstruction is too short (Rajamanoharan et al. 2404.16014, eq. 10)
    l2_norm_in, l2_norm_out = mean ||x||, mean ||x_hat||
    l0, l1   = mean number of latents with a > 0, mean sum of the a
    density_F  = share of rows on which latent f fires;  dead_share = share of latents that fired on no row
    dense_share = share of latents that fire on more than a tenth of the rows
    top_k_overlap = mean over rows of |A & B| / max(|A|, |B|), A and B the latents with a > 0 of two SAEs or two inputs

Shape letters: N rows, D d_in, F latents, K slots.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .errors import ConfigError, ShapeError

DENSE = 0.1  # a latent that fires on a larger share of the rows is dense


def squared_errors(x_ND: np.ndarray, x_hat_ND: np.ndarray) -> np.ndarray:
    """||x - x_hat||^2 of every row, float64 (N,)."""
    if x_ND.shape != x_hat_ND.shape:
        raise ShapeError(f"x has shape {x_ND.shape}, its reconstruction {x_hat_ND.shape}")
    error_ND = x_ND.astype(np.float64) - x_hat_ND
    return np.einsum("nd,nd->n", error_ND, error_ND)


def token_fvu(x_ND: np.ndarray, x_hat_ND: np.ndarray, variance: float) -> np.ndarray:
    """||x - x_hat||^2 / E||x - mean||^2 of every row, float64 (N,). The denominator is the SAE's stored `variance`.

    Averaged over the rows it was taken from, it is their FVU.

    Raises:
        ConfigError: variance is not above zero.
    """
    if not variance > 0:
        raise ConfigError(f"the variance of the activations must be above zero, got {variance}")
    return squared_errors(x_ND, x_hat_ND) / variance


def top_k_overlap(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """|A & B| / max(|A|, |B|) of every row, float64 (N,); NaN where nothing fires in either.

    `first` and `second` are (idx_NK, vals_NK) of the same rows as `sae.runtime.encode` gives them; K may differ.
    """
    if len(first[0]) != len(second[0]):
        raise ShapeError(f"expected the latents of the same rows twice, got {len(first[0])} and {len(second[0])} rows")
    rows = len(first[0])
    places = []
    for idx_NK, vals_NK in (first, second):
        row_M, slot_M = np.nonzero(vals_NK > 0)
        places.append((row_M.astype(np.int64) << 32) | idx_NK[row_M, slot_M])
    common_N, *sizes = (
        np.bincount(place >> 32, minlength=rows) for place in (np.intersect1d(*places, assume_unique=True), *places)
    )
    largest_N = np.maximum(*sizes)
    return np.divide(common_N, largest_N, out=np.full(rows, math.nan), where=largest_N > 0)


def mean_overlap(overlap_N: np.ndarray) -> float:
    """The mean of `top_k_overlap` over the rows on which anything fires; 1 where there are none."""
    fires_N = ~np.isnan(overlap_N)
    return float(overlap_N[fires_N].mean()) if fires_N.any() else 1.0


class Moments:
    """Mean and sum of squared deviations of rows that come in batches (Chan, Golub and LeVeque 1979).

    After every update: mean_D = E[x], scatter_D = sum (x - mean)^2 per dimension, float64. It does not lose digits
    when the mean is large beside the spread, and gives the same result for any split into batches to rounding.
    """

    def __init__(self, d_in: int) -> None:
        self.rows = 0
        self.mean_D = np.zeros(d_in)
        self.scatter_D = np.zeros(d_in)

    def update(self, x_ND: np.ndarray) -> None:
        """Add the rows of x_ND."""
        if x_ND.ndim != 2 or x_ND.shape[1] != len(self.mean_D):
            raise ShapeError(f"expected rows of width {len(self.mean_D)}, got an array of shape {x_ND.shape}")
        added = len(x_ND)
        if added == 0:
            return
        x_ND = x_ND.astype(np.float64)
        mean_D = x_ND.mean(axis=0)
        x_ND -= mean_D
        total = self.rows + added
        shift_D = mean_D - self.mean_D
        self.scatter_D += np.einsum("nd,nd->d", x_ND, x_ND) + shift_D**2 * (self.rows * added / total)
        self.mean_D += shift_D * (added / total)
        self.rows = total

    @property
    def scatter(self) -> float:
        """sum ||x - mean||^2 over all rows."""
        return float(self.scatter_D.sum())

    @property
    def variance(self) -> float:
        """E||x - mean||^2."""
        return self.scatter / self.rows if self.rows else math.nan


class ReconstructionMetrics:
    """The metrics of this page over a split, batch by batch. `num_latents` fixes the length of density_F."""

    def __init__(self, d_in: int, num_latents: int) -> None:
        self.moments = Moments(d_in)
        self.fired_F = np.zeros(num_latents, np.int64)
        self._error = self._cosine = self._ratio = self._dot = self._hat = 0.0
        self._norm = self._hat_norm = self._l1 = 0.0
        self._nonzero = self._ratio_rows = 0

    @property
    def rows(self) -> int:
        """Rows seen so far."""
        return self.moments.rows

    def update(self, x_ND: np.ndarray, x_hat_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray) -> None:
        """Add rows with their reconstruction and their latents (slots of value 0 are unused).

        Raises:
            ShapeError: the arrays do not belong to the same rows, or a latent is out of range.
        """
        if idx_NK.shape != vals_NK.shape or len(idx_NK) != len(x_ND):
            raise ShapeError(f"{len(x_ND)} rows of x, latents {idx_NK.shape} with values {vals_NK.shape}")
        fired_M = idx_NK[vals_NK > 0]
        if fired_M.size and not (fired_M.min() >= 0 and fired_M.max() < len(self.fired_F)):
            raise ShapeError(f"latents must be below {len(self.fired_F)}, got {fired_M.min()}..{fired_M.max()}")
        self._error += float(squared_errors(x_ND, x_hat_ND).sum())
        self.moments.update(x_ND)
        x64_ND, hat64_ND = x_ND.astype(np.float64), x_hat_ND.astype(np.float64)
        dot_N = np.einsum("nd,nd->n", x64_ND, hat64_ND)
        norm_N, hat_norm_N = np.linalg.norm(x64_ND, axis=1), np.linalg.norm(hat64_ND, axis=1)
        both_N = norm_N * hat_norm_N
        self._cosine += float(np.divide(dot_N, both_N, out=np.zeros_like(both_N), where=both_N > 0).sum())
        self._ratio += float((hat_norm_N[norm_N > 0] / norm_N[norm_N > 0]).sum())
        self._ratio_rows += int((norm_N > 0).sum())
        self._dot += float(dot_N.sum())
        self._hat += float((hat_norm_N**2).sum())
        self._norm += float(norm_N.sum())
        self._hat_norm += float(hat_norm_N.sum())
        self._l1 += float(vals_NK[vals_NK > 0].sum(dtype=np.float64))
        self._nonzero += fired_M.size
        self.fired_F += np.bincount(fired_M, minlength=len(self.fired_F))

    def result(self) -> dict[str, Any]:
        """The metrics by name; `density_F` is an array, the rest are numbers.

        Raises:
            ConfigError: no rows, or all of them equal (FVU has no denominator).
        """
        rows = self.rows
        if rows == 0 or self.moments.scatter == 0:
            raise ConfigError(f"metrics need at least two different rows, got {rows} without any variance")
        return {
            "rows": rows,
            "fvu": self._error / self.moments.scatter,
            "mse": self._error / (rows * len(self.moments.mean_D)),
            "cosine": self._cosine / rows,
            "l2_ratio": self._ratio / self._ratio_rows,
            "relative_reconstruction_bias": self._hat / self._dot if self._dot != 0 else math.nan,
            "l2_norm_in": self._norm / rows,
            "l2_norm_out": self._hat_norm / rows,
            "l0": self._nonzero / rows,
            "l1": self._l1 / rows,
            "dead_share": float((self.fired_F == 0).mean()),
            "dense_share": float((self.fired_F > DENSE * rows).mean()),
            "density_F": self.fired_F / rows,
        }


def density_histogram(density_F: np.ndarray, bins_per_decade: int = 2) -> tuple[np.ndarray, np.ndarray, int]:
    """How many latents fire how often, over log10(density).

    Returns (count_B, edges_B1, dead): edges are powers of ten from below the rarest living latent to 1; `dead` counts
    the latents with density 0, which have no logarithm.
    """
    alive = density_F[density_F > 0]
    lowest = math.floor(math.log10(alive.min())) if alive.size else -1
    lowest = min(lowest, -1)
    edges_B1 = 10.0 ** np.linspace(lowest, 0, -lowest * bins_per_decade + 1)
    edges_B1[-1] = 1.0
    count_B, _ = np.histogram(alive, bins=edges_B1)
    return count_B, edges_B1, int((density_F == 0).sum())
