"""An SAE as plain arrays: what every stage after training reads. numpy only.

Shape letters: N rows, D d_in, F latents, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ConfigError, ShapeError

VARIANTS = ("topk", "threshold")


@dataclass(frozen=True, kw_only=True)
class SAEWeights:
    """A trained SAE in raw model units.

    pre = W_enc (x - b_dec) + b_enc     (without "- b_dec" where `b_dec_subtracted` is false)
    a   = TopK(ReLU(pre))               variant "topk": at most k latents fire
    a   = pre where pre > threshold, else 0     variant "threshold" (JumpReLU; threshold >= 0, any number may fire)
    x_hat = sum_i a_i W_dec[i] + b_dec

    All arrays are made float32 and C-contiguous. SAEs trained here have unit-norm rows in W_dec; imported ones
    keep theirs.

    Raises:
        ShapeError: an array whose shape does not fit the others.
        ConfigError: k, variant or variance out of range, or a threshold that does not fit the variant.
    """

    W_enc_FD: np.ndarray
    b_enc_F: np.ndarray
    W_dec_FD: np.ndarray
    b_dec_D: np.ndarray
    mean_D: np.ndarray  # E[x] over the training rows
    variance: float  # E||x - mean||^2 over the training rows: the denominator of a token's FVU
    k: int
    hook: str  # "blocks.3.hook_resid_post"
    variant: str = "topk"
    b_dec_subtracted: bool = True
    threshold_F: np.ndarray | None = None
    freq_F: np.ndarray | None = None  # share of rows on which a latent fired
    host: dict[str, Any] = field(default_factory=dict)  # ModelId.as_dict() of the model it was trained on
    training: dict[str, Any] = field(default_factory=dict)  # summary: tokens, lr, seed, final metrics

    def __post_init__(self) -> None:
        if self.W_dec_FD.ndim != 2:
            raise ShapeError(f"W_dec must be a matrix (latents, d_in), got shape {self.W_dec_FD.shape}")
        latents, d_in = self.W_dec_FD.shape
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc_FD": (latents, d_in),
            "W_dec_FD": (latents, d_in),
            "b_enc_F": (latents,),
            "b_dec_D": (d_in,),
            "mean_D": (d_in,),
            "threshold_F": (latents,),
            "freq_F": (latents,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ShapeError(f"{name} must have shape {shape} to fit W_dec {(latents, d_in)}, got {array.shape}")
            object.__setattr__(self, name, np.ascontiguousarray(array, dtype=np.float32))
        self._check_scalars(latents)

    def _check_scalars(self, latents: int) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"unknown SAE variant {self.variant!r}; known are {', '.join(VARIANTS)}")
        if (self.threshold_F is not None) != (self.variant == "threshold"):
            raise ConfigError("variant 'threshold' needs threshold_F, and only that variant may have it")
        if self.threshold_F is not None and not bool(np.all(self.threshold_F >= 0)):
            raise ConfigError("threshold_F must be >= 0: activations are never negative")
        if not 1 <= self.k <= latents:
            raise ConfigError(f"k must be between 1 and the {latents} latents, got {self.k}")
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise ConfigError(f"variance must be a positive number, got {self.variance}")

    @property
    def d_in(self) -> int:
        """Width of the activations this SAE reads."""
        return self.W_dec_FD.shape[1]

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_dec_FD.shape[0]
