"""An SAE as plain arrays: what every stage after training reads. numpy only.

Shape letters: N rows, D d_in, F latents, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ConfigError, ShapeError
from .labels import checked_labels
from .rows import RowMatrix

VARIANTS = ("topk", "threshold", "groupmax")
NORM_MODES = ("none", "layer")
# what the stages read of `training`
TRAINING_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str, "store_sha256": str, "source": str, "config": dict, "outlier_threshold": (int, float), "thresholds": dict,
}  # fmt: skip
LAYER_NORM_EPS = 1e-5  # of the SAEs trained here


@dataclass(frozen=True, kw_only=True)
class SAEWeights:
    """A trained SAE in raw model units.

    pre = W_enc (x - b_dec) + b_enc     (without "- b_dec" where `b_dec_subtracted` is false)
    a   = TopK(ReLU(pre))               variant "topk": at most k latents fire
    a   = ReLU(pre) of the largest pre of each of k groups of F / k neighbouring latents    variant "groupmax"
    a   = pre where pre > threshold, else 0     variant "threshold" (JumpReLU; threshold >= 0, any number may fire)
    x_hat = sum_i a_i W_dec[i] + b_dec

    norm_mode "layer": these hold for n = (x - mu) / (sigma + norm_eps) in place of x, mu and sigma the row's mean and
    standard deviation (sum of squares over D - norm_correction), and x_hat = sigma n_hat + mu. a is then in units of
    sigma: a latent adds a_i sigma W_dec[i] to x.

    A transcoder reads `hook` and gives y_hat, what is computed at `hook_out`: d_out numbers, mean and variance are of
    y, and y_hat = sum_i a_i W_dec[i] + b_dec (+ W_skip x). `ports` names the hook points of SAEs over several, with
    their widths, in the order of the columns: what is read, then (of transcoders) what is written; `hook` and `hook_out`
    are the first of each.

    All arrays are made float32 and C-contiguous; a `RowMatrix` may stand for W_enc and W_dec where only rows of them
    are needed. SAEs trained here have unit-norm rows in W_dec; imported ones
    keep theirs.

    Raises:
        ShapeError: an array whose shape does not fit the others.
        ConfigError: k, variant or variance out of range, a threshold that does not fit the variant, a setting of
            transcoders on an SAE.
    """

    W_enc_FD: np.ndarray
    b_enc_F: np.ndarray
    W_dec_FD: np.ndarray  # (F, O)
    b_dec_D: np.ndarray  # (O,)
    mean_D: np.ndarray  # E[x] over the training rows
    variance: float  # E||x - mean||^2 over the training rows: the denominator of a token's FVU
    k: int
    hook: str  # "blocks.3.hook_resid_post"
    variant: str = "topk"
    b_dec_subtracted: bool = True
    threshold_F: np.ndarray | None = None
    # share of the rows of the last tenth of the training on which a latent fired, by the training's rule; with thresholds
    # fitted afterwards (thresholds.py) of the rows they were fitted on
    freq_F: np.ndarray | None = None
    norm_mode: str = "none"
    norm_eps: float = 0.0
    norm_correction: int = 0
    hook_out: str = ""  # transcoders: the hook point that is reconstructed
    W_skip_OD: np.ndarray | None = None  # ... and a linear map of x beside the latents
    ports: tuple[tuple[str, int], ...] = ()  # (hook point, width) where there are several
    host: dict[str, Any] = field(default_factory=dict)  # ModelId.as_dict() of the model it was trained on
    training: dict[str, Any] = field(default_factory=dict)  # summary: tokens, lr, seed, final metrics
    labels: dict[int, str] = field(default_factory=dict)  # what people call a latent; sae/labels.py

    def __post_init__(self) -> None:
        for name in ("W_dec_FD", "W_enc_FD"):
            if getattr(self, name).ndim != 2:
                raise ShapeError(f"{name} must be a matrix (latents, d_in), got shape {getattr(self, name).shape}")
        latents, d_out = self.W_dec_FD.shape
        d_in = self.W_enc_FD.shape[1] if self.hook_out else d_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc_FD": (latents, d_in),
            "W_dec_FD": (latents, d_out),
            "b_enc_F": (latents,),
            "b_dec_D": (d_out,),
            "mean_D": (d_out,),
            "threshold_F": (latents,),
            "freq_F": (latents,),
            "W_skip_OD": (d_out, d_in),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ShapeError(f"{name} must have shape {shape} to fit W_dec {(latents, d_out)}, got {array.shape}")
            if not isinstance(array, RowMatrix):
                object.__setattr__(self, name, np.ascontiguousarray(array, dtype=np.float32))
        object.__setattr__(self, "ports", tuple((str(name), int(width)) for name, width in self.ports))
        object.__setattr__(self, "labels", checked_labels(self.labels.items(), latents))
        self._check_scalars(latents)
        self._check_sides(d_in, d_out)

    def _check_scalars(self, latents: int) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"unknown SAE variant {self.variant!r}; known are {', '.join(VARIANTS)}")
        if (self.threshold_F is not None) != (self.variant == "threshold"):
            raise ConfigError("variant 'threshold' needs threshold_F, and only that variant may have it")
        if self.threshold_F is not None and not bool(np.all(self.threshold_F >= 0)):
            raise ConfigError("threshold_F must be >= 0: activations are never negative")
        if not 1 <= self.k <= latents:
            raise ConfigError(f"k must be between 1 and the {latents} latents, got {self.k}")
        if self.variant == "groupmax" and latents % self.k:
            raise ConfigError(f"variant 'groupmax' needs the {latents} latents divisible by k, got {self.k}")
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise ConfigError(f"variance must be a positive number, got {self.variance}")
        for name, kind in TRAINING_TYPES.items():
            if not isinstance(self.training.get(name, kind[0]() if isinstance(kind, tuple) else kind()), kind):
                raise ConfigError(f"training[{name!r}] is of the wrong type: {str(self.training[name])[:40]!r}")
        if self.norm_mode not in NORM_MODES:
            raise ConfigError(f"unknown norm mode {self.norm_mode!r}; known are {', '.join(NORM_MODES)}")
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0) or self.norm_correction not in (0, 1):
            raise ConfigError(
                f"norm_eps must be >= 0 and norm_correction 0 or 1, got {self.norm_eps}, {self.norm_correction}"
            )

    def _check_sides(self, d_in: int, d_out: int) -> None:
        if self.hook_out and (self.b_dec_subtracted or self.norm_mode != "none"):
            raise ConfigError("a transcoder subtracts no b_dec from its input and has no layer norm")
        if self.W_skip_OD is not None and not self.hook_out:
            raise ConfigError("W_skip belongs to a transcoder: name its hook_out")
        if not self.ports:
            return
        first = {0: self.hook} | ({d_in: self.hook_out} if self.hook_out else {})  # column at which a side begins
        at = 0
        for name, width in self.ports:
            if first.pop(at, name) != name:
                raise ConfigError(
                    f"the ports {[name for name, _ in self.ports]} do not fit {self.hook}, {self.hook_out}"
                )
            at += width
        columns = d_in + d_out if self.hook_out else d_in
        if first or at != columns:
            raise ConfigError(f"the ports' widths {[width for _, width in self.ports]} do not add up to {columns}")

    @property
    def trained_id(self) -> str:
        """The id of the training it came from: its own but where thresholds were fitted afterwards. "" where it has none."""
        of = self.training.get("thresholds", {}).get("of")
        return of if isinstance(of, str) else self.training.get("id", "")

    @property
    def is_wired(self) -> bool:
        """Whether it reads several hook points or reconstructs another than it reads."""
        return bool(self.hook_out or self.ports)

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook point and reconstructs one other."""
        return bool(self.hook_out) and len(self.ports) in (0, 2)

    @property
    def d_in(self) -> int:
        """Width of the activations this SAE reads."""
        return self.W_enc_FD.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs: d_in but for transcoders."""
        return self.W_dec_FD.shape[1]

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_dec_FD.shape[0]

    @property
    def needs_input(self) -> bool:
        """Whether the reconstruction needs the row itself beside its latents."""
        return self.norm_mode != "none" or self.W_skip_OD is not None
