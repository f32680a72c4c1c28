"""The geometric median: the point of least total distance to the rows. numpy only."""

from __future__ import annotations

import numpy as np

from .errors import ShapeError


def geometric_median(x_ND: np.ndarray, *, tolerance: float = 1e-6, most_rounds: int = 200) -> np.ndarray:
    """argmin_c sum_n ||x_n - c||, float64 (D,), by Weiszfeld's iteration from the mean.

    c' = sum_n x_n / ||x_n - c|| / sum_n 1 / ||x_n - c||, until c moves by less than `tolerance` of the rows' mean
    distance to it. A row at c itself is left out of that round.

    Raises:
        ShapeError: there are no rows.
    """
    x_ND = np.asarray(x_ND, np.float64)
    if x_ND.ndim != 2 or not len(x_ND):
        raise ShapeError(f"the geometric median needs rows, got an array of shape {x_ND.shape}")
    centre_D = x_ND.mean(0)
    for _ in range(most_rounds):
        distance_N = np.linalg.norm(x_ND - centre_D, axis=1)
        apart_N = distance_N > 0
        if not apart_N.any():
            break
        weight_N = np.divide(1.0, distance_N, out=np.zeros_like(distance_N), where=apart_N)
        moved_D = weight_N @ x_ND / weight_N.sum()
        step = float(np.linalg.norm(moved_D - centre_D))
        centre_D = moved_D
        if step <= tolerance * distance_N.mean():
            break
    return centre_D
