"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from .errors import ConfigError
from .options import OPTIMIZERS, SAEOptions

FREE_KEYS = (
    "checkpoint_steps",
    "log_steps",
    "keep_last",
    "save_best",
    "device",
    "prefetch_batches",
    "kernel",  # only what it came to counts
    "parallel",  # the same
)  # may change on resume
SHARED_KEYS = ("batch_tokens", "tokens", *FREE_KEYS)  # the same for SAEs trained on the same batches
KERNELS = ("auto", "torch", "native", "triton")
PARALLEL = ("data", "latent")
MAX_WARMUP_SHARE = 0.25  # of the steps: a short run leaves its warm-up too
MOST_DEAD_AFTER_TOKENS = 10_000_000
DEAD_AFTER_SHARE = 0.05  # of the tokens, where a run is too short for that many


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What decides the result of a training run (and, marked *, what only decides how it is run).

    The learning rate at step t of T is lr * min(1, (t + 1) / w) * min(1, (T - t) / (decay_share T))
    with w = min(warmup_steps, T / 4).

    Raises:
        ConfigError: a value out of range.
    """

    num_latents: int
    k: int
    batch_tokens: int = 2048
    tokens: int = 4_000_000  # rounded up to whole batches
    lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.35
    seed: int = 0
    auxk_coef: float = 1 / 32
    auxk_k: int = 0  # 0: d_in / 2
    dead_after_tokens: int = 0  # 0: a twentieth of tokens, at most 10M; once made, the number that it comes to
    init_scale: float = 0.0  # W_enc starts as this times W_dec; 0: half of what reconstructs best (sae/initial.py)
    encoder_dtype: str = "auto"  # auto | float32 | bfloat16
    auxk_dtype: str = "auto"  # auto | float32 | bfloat16
    kernel: str = "auto"  # auto | torch | native | triton
    betas: tuple[float, float] = (0.8, 0.999)  # the first below Adam's usual 0.9: runs/reports/training.md
    eps: float = 1e-8
    optimizer: str = "adam"  # adam | signum | muon
    momentum: float = 0.95  # of signum and muon
    variant: str = "topk"  # options.VARIANT_NAMES
    options: SAEOptions = dataclasses.field(default_factory=SAEOptions)  # of the variants
    checkpoint_steps: int = 500  # *
    log_steps: int = 20  # *
    keep_last: int = 2  # *
    save_best: bool = False  # * keep the checkpoint of the lowest FVU too, over the steps since the one before
    device: str = "auto"  # * auto | cpu | cuda
    parallel: str = "data"  # * on several ranks: data | latent
    prefetch_batches: int = 2  # * read ahead in a thread; 0: no thread

    def __post_init__(self) -> None:
        for name in ("num_latents", "k", "batch_tokens", "tokens", "log_steps", "keep_last"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "dead_after_tokens",
            "auxk_coef",
            "auxk_k",
            "checkpoint_steps",
            "prefetch_batches",
        ):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        # AuxK's error is a share of the batch's own scatter, of which one row has none
        self._check("batch_tokens", self.batch_tokens > 1 or not self.auxk_coef, "2 or more, or auxk_coef 0")
        self._check("k", self.k <= self.num_latents, f"at most num_latents = {self.num_latents}")
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "above 0")
        self._check("init_scale", math.isfinite(self.init_scale) and self.init_scale >= 0, "0 or more")
        self._check("eps", math.isfinite(self.eps) and self.eps > 0, "above 0")
        self._check("decay_share", 0 <= self.decay_share <= 1, "between 0 and 1")
        self._check("kernel", self.kernel in KERNELS, f"one of {', '.join(KERNELS)}")
        self._check("parallel", self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")
        self._check("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two in [0, 1)")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._check("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.options.check_variant(self.variant, self.num_latents, self.k)
        object.__setattr__(self, "betas", tuple(self.betas))
        if not self.dead_after_tokens:
            share = max(1, int(self.tokens * DEAD_AFTER_SHARE))
            object.__setattr__(self, "dead_after_tokens", min(MOST_DEAD_AFTER_TOKENS, share))

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """T: number of batches."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def first_checkpoint(self) -> int:
        """The step after which the first checkpoint is due."""
        return min(self.checkpoint_steps, self.steps) or self.steps

    def lr_at(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        warmup_steps = min(self.warmup_steps, int(self.steps * MAX_WARMUP_SHARE))
        warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        decay_steps = self.decay_share * self.steps
        decay = min(1.0, (self.steps - step) / decay_steps) if decay_steps else 1.0
        return self.lr * warm * decay


def shared_settings(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """The first settings, after a check that the others have the same batches, tokens and ways to run.

    Raises:
        ConfigError: no settings, or a difference in one of SHARED_KEYS.
    """
    if not configs:
        raise ConfigError("expected the settings of at least one SAE, got none")
    (first_name, first), *others = configs.items()
    for name, config in others:
        for key in SHARED_KEYS:
            one, other = getattr(first, key), getattr(config, key)
            if one != other:
                raise ConfigError(f"SAEs trained together share {key}: {first_name} has {one}, {name} has {other}")
    return first
