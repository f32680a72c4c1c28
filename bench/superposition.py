"""Toy rows with a known dictionary: more sparse features than dimensions, on a shifted, noisy background.

    x = mean + sum over `draws` of c f_i + noise        i ~ Zipf: p_i proportional to (i + 10)^-0.8,  c ~ U(0.3, 1.5)

||f_i|| = 1, ||mean|| = 2, noise 0.02 per dimension. A batch is a pure function of (d, truths, seed, its number), the
same in every environment: each side makes its own, outside of what is timed.

Shape letters: N rows, D d_in, M true features, S draws.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

ZIPF_SHIFT, ZIPF_POWER = 10.0, 0.8
COEFFICIENT = (0.3, 1.5)
MEAN_NORM, NOISE = 2.0, 0.02
HELD_OUT = 1 << 40  # numbers of batches from here on are never trained on


class Superposition:
    """The dictionary `truth_MD` and rows made from it."""

    def __init__(self, d_in: int, truths: int, *, seed: int = 0, draws: int = 24) -> None:
        rng = np.random.default_rng((1234, d_in, truths))
        truth_MD = rng.standard_normal((truths, d_in), dtype=np.float32)
        self.truth_MD = truth_MD / np.linalg.norm(truth_MD, axis=1, keepdims=True)
        mean_D = rng.standard_normal(d_in, dtype=np.float32)
        self.mean_D = mean_D * np.float32(MEAN_NORM / np.linalg.norm(mean_D))
        weight_M = (np.arange(truths) + ZIPF_SHIFT) ** -ZIPF_POWER
        self._cumulative_M = np.cumsum(weight_M / weight_M.sum())
        self.seed, self.draws = seed, draws

    def batch(self, number: int, rows: int) -> np.ndarray:
        """x_ND of batch `number`, float32."""
        rng = np.random.default_rng((self.seed, number))
        idx_NS = np.searchsorted(self._cumulative_M, rng.random((rows, self.draws)))
        np.minimum(idx_NS, len(self.truth_MD) - 1, out=idx_NS)
        low, high = COEFFICIENT
        c_NS = rng.random((rows, self.draws), dtype=np.float32) * np.float32(high - low) + np.float32(low)
        x_ND = functional.embedding_bag(
            torch.from_numpy(idx_NS),
            torch.from_numpy(self.truth_MD),
            per_sample_weights=torch.from_numpy(c_NS),
            mode="sum",
        ).numpy()
        x_ND += self.mean_D
        x_ND += rng.standard_normal(x_ND.shape, dtype=np.float32) * np.float32(NOISE)
        return x_ND

    def held_out(self, rows: int) -> np.ndarray:
        """Rows that no training batch holds."""
        return self.batch(HELD_OUT, rows)
