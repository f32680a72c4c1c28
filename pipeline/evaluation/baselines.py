"""What the residual is replaced by: an SAE's reconstruction, or a baseline's of k components.

N rows, D width, F latents, K active, C components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import final

import numpy as np

from sae import runtime
from sae.encoders import Encoder, encoder_of
from sae.errors import ShapeError
from sae.weights import SAEWeights


class Replacement(ABC):
    """x_hat = decode(code(x)): a sparse code of at most K values per row, and its reconstruction."""

    num_latents: int

    @abstractmethod
    def code(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(idx_NK int32, vals_NK float32); a value of 0 is an unused slot."""

    @abstractmethod
    def decode(self, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        """x_hat_ND float32, raw model units; `x_ND`: the rows of the code, whose norms some need."""

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.decode(*self.code(x_ND), x_ND)


@final
class SAEReplacement(Replacement):
    """The reconstruction by a sparse autoencoder; `encoder` computes its latents, numpy without one."""

    def __init__(self, weights: SAEWeights, encoder: Encoder | None = None) -> None:
        self.weights, self.encoder = weights, encoder_of(weights, encoder)
        self.num_latents = weights.num_latents

    def code(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.encoder.encode(x_ND)

    def decode(self, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        return runtime.decode(self.weights, idx_NK, vals_NK, x_ND)


@final
class PCAReplacement(Replacement):
    """x_hat = mean + V^T V (x - mean) with the K leading principal directions V_KD: L0 = K everywhere."""

    def __init__(self, mean_D: np.ndarray, components_KD: np.ndarray) -> None:
        if components_KD.ndim != 2 or components_KD.shape[1] != len(mean_D):
            raise ShapeError(
                f"expected PCA components of shape (K, {len(mean_D)}), got {components_KD.shape}; "
                "fit them with fit_pca on rows of the same hook"
            )
        self.mean_D = mean_D.astype(np.float32)
        self.components_KD = components_KD.astype(np.float32)
        self.num_latents = len(components_KD)

    def code(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vals_NK = (x_ND - self.mean_D) @ self.components_KD.T
        idx_NK = np.broadcast_to(np.arange(self.num_latents, dtype=np.int32), vals_NK.shape)
        return idx_NK, vals_NK

    def decode(self, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        return vals_NK @ self.components_KD + self.mean_D


@final
class ConstantReplacement(Replacement):
    """x_hat = c for every row: zero ablation with c = 0, mean ablation with c = E[x]. L0 = 0."""

    num_latents = 0

    def __init__(self, constant_D: np.ndarray) -> None:
        self.constant_D = constant_D.astype(np.float32)

    def code(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((len(x_ND), 0), np.int32), np.empty((len(x_ND), 0), np.float32)

    def decode(self, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.constant_D, (len(idx_NK), len(self.constant_D)))


def fit_pca(chunks_ND: Iterable[np.ndarray], components: int) -> PCAReplacement:
    """PCA of streamed rows: mean and covariance in float64 about the first chunk's mean, then eigh.

    Shifting by a fixed vector near the mean keeps the subtraction in C = E[yy^T] - E[y]E[y]^T harmless
    when the mean is large against the deviations.
    """
    shift_D: np.ndarray | None = None
    total_D, second_DD, count = np.zeros(0), np.zeros((0, 0)), 0
    for chunk_ND in chunks_ND:
        if not len(chunk_ND):
            continue
        y_ND = chunk_ND.astype(np.float64)
        if shift_D is None:
            shift_D = np.asarray(y_ND.mean(axis=0))
            total_D, second_DD = np.zeros_like(shift_D), np.zeros((len(shift_D), len(shift_D)))
        y_ND = y_ND - shift_D
        total_D += y_ND.sum(axis=0)
        second_DD += y_ND.T @ y_ND
        count += len(y_ND)
    if shift_D is None:
        raise ShapeError("expected rows to fit PCA on, got none; give a store with committed, unflagged rows")
    if not 0 < components <= len(shift_D):
        raise ShapeError(f"expected 1 to {len(shift_D)} PCA components, got {components}; lower k")
    mean_D = total_D / count
    covariance_DD = second_DD / count - np.outer(mean_D, mean_D)
    _, vectors_DD = np.linalg.eigh(covariance_DD)  # ascending eigenvalues, eigenvectors in columns
    return PCAReplacement(shift_D + mean_D, vectors_DD[:, ::-1][:, :components].T)
