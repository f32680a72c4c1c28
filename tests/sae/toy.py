"""Superposition toy data: more sparse features than dimensions, on a shifted, noisy background.

    x = mean + sum_i c_i f_i + noise,   3D unit features f_i, about 6 of them on, c_i in [2.5, 7.5]

Row r of the stream is a pure function of (seed, batch number), so any batch can be made again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae.weights import SAEWeights

D = 32
FEATURES = 3 * D
MEAN_ON = 4


class Toy:
    """A BatchSource of toy rows; `poison` is the batch (counted from 1) whose rows are NaN."""

    d_in = D

    def __init__(self, batch: int = 512, seed: int = 0, poison: int = 0) -> None:
        rng = np.random.default_rng(99)
        features_FD = rng.standard_normal((FEATURES, D))
        self.features_FD = features_FD / np.linalg.norm(features_FD, axis=1, keepdims=True)
        self.mean_D = 3 * rng.standard_normal(D)
        self.batch, self.seed, self.poison, self.served = batch, seed, poison, 0

    def rows(self, count: int, *key: int) -> np.ndarray:
        rng = np.random.default_rng(key)
        on_NF = rng.random((count, FEATURES)) < MEAN_ON / FEATURES
        coef_NF = on_NF * rng.uniform(2.5, 7.5, (count, FEATURES))
        noise_ND = 0.1 * rng.standard_normal((count, D))
        return (self.mean_D + coef_NF @ self.features_FD + noise_ND).astype(np.float32)

    def next(self) -> np.ndarray:
        self.served += 1
        x_BD = self.rows(self.batch, self.seed, self.served)
        return np.full_like(x_BD, np.nan) if self.served == self.poison else x_BD

    def state(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state(self, state: dict[str, Any]) -> None:
        self.served = state["served"]

    def statistics(self) -> dict[str, Any]:
        """mean_D, variance, hook and host as `Trainer` takes them."""
        x_ND = self.rows(8192, 12345).astype(np.float64)
        mean_D = x_ND.mean(0)
        variance = float(((x_ND - mean_D) ** 2).sum(1).mean())
        return {
            "mean_D": mean_D.astype(np.float32),
            "variance": variance,
            "hook": "blocks.0.hook_resid_post",
            "host": {},
        }


def random_weights(rng: np.random.Generator, *, d: int, latents: int, k: int, **extra: Any) -> SAEWeights:
    """An SAE with nothing special about it: shifted, biased, decoder rows of norm 1."""
    W_dec_FD = rng.standard_normal((latents, d))
    W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    fields: dict[str, Any] = {
        "W_enc_FD": rng.standard_normal((latents, d)),
        "b_enc_F": 0.3 * rng.standard_normal(latents),
        "W_dec_FD": W_dec_FD,
        "b_dec_D": rng.standard_normal(d),
        "mean_D": rng.standard_normal(d),
        "variance": float(d),
        "k": k,
        "hook": "blocks.1.hook_resid_post",
    }
    return SAEWeights(**fields | extra)
