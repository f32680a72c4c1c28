"""What a variant of the SAE can be told, beside its sizes. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError

VARIANT_NAMES = ("topk", "batchtopk", "matryoshka", "groupmax", "jumprelu", "relu", "gated")
DECODER_ROWS = ("unit", "free")
INPUT_NORMS = ("dataset", "none", "layer")
B_DEC_INITS = ("mean", "geometric_median", "zero")
OPTIMIZERS = ("adam", "signum", "muon")
TOP_K_FAMILY = ("topk", "batchtopk", "matryoshka")
WITHOUT_K = ("jumprelu", "relu", "gated")  # how many latents fire is what their penalty comes to


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEOptions:
    """Settings of the variants; each names the variants that read it.

    Raises:
        ConfigError: an unknown choice, a number out of range, a setting that the variant cannot use.
    """

    decoder_rows: str = "unit"  # topk, batchtopk: "free" rows are not renormalised, selection is by pre * ||W_dec||
    input_norm: str = "dataset"  # "dataset": one scale, folded on export; "none"; "layer": every row by its own
    b_dec_init: str = "mean"  # ... of the activations
    k_start: int = 0  # topk family: k falls linearly from here to k (0: no annealing) ...
    k_anneal_share: float = 0.1  # ... over this share of the steps
    multi_k: int = 0  # topk: Multi-TopK, also reconstruct from so many latents (0: off; Gao et al. use 4 k) ...
    multi_coef: float = 1 / 8  # ... at this weight
    prefixes: tuple[int, ...] = ()  # matryoshka: sizes of the nested dictionaries, the whole one is added
    l1_coef: float = 2.0  # relu, gated: weight of the L1 penalty, in units of sqrt(E||x - mean||^2 / D)
    l0_coef: float = 1e-3  # jumprelu: weight of the L0 penalty, in units of the variance per active latent
    sparsity_warmup_share: float = 0.05  # relu, gated, jumprelu: the penalty grows over this share of the steps
    threshold_start: float = 2.0  # jumprelu: first threshold, in standard deviations of the first pre-activations
    bandwidth: float = 0.5  # jumprelu: width of the straight-through kernel, in units of sqrt(E||x - mean||^2 / D)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        for name, known in (
            ("decoder_rows", DECODER_ROWS),
            ("input_norm", INPUT_NORMS),
            ("b_dec_init", B_DEC_INITS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("k_start", "multi_k", "multi_coef", "l1_coef", "l0_coef"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("threshold_start", "bandwidth"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("k_anneal_share", "sparsity_warmup_share"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        growing = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        self._check("prefixes", growing, "sizes that grow from 1 or more")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{name} must be {wanted}, got {value}")

    def check_variant(self, variant: str, num_latents: int, k: int) -> None:
        """Refuse what this variant would ignore or cannot do."""
        if variant not in VARIANT_NAMES:
            raise ConfigError(f"unknown SAE variant {variant!r}; known are {', '.join(VARIANT_NAMES)}")
        only = {
            "k_start": (self.k_start > 0, TOP_K_FAMILY),
            "multi_k": (self.multi_k > 0, ("topk",)),
            "prefixes": (bool(self.prefixes), ("matryoshka",)),
            "decoder_rows=free": (self.decoder_rows == "free", ("topk", "batchtopk", "relu")),
        }
        for name, (used, by) in only.items():
            if used and variant not in by:
                raise ConfigError(f"{name} is a setting of {', '.join(by)}; the variant is {variant}")
        if self.k_start and not k <= self.k_start <= num_latents:
            raise ConfigError(f"k_start must lie between k = {k} and num_latents = {num_latents}, got {self.k_start}")
        if self.multi_k and not k < self.multi_k <= num_latents:
            raise ConfigError(f"multi_k must be above k = {k}, at most {num_latents}, got {self.multi_k}")
        if self.prefixes and self.prefixes[-1] > num_latents:
            raise ConfigError(f"prefixes go up to num_latents = {num_latents}, got {list(self.prefixes)}")
        if variant == "groupmax" and num_latents % k:
            raise ConfigError(f"groupmax needs num_latents divisible by k, got {num_latents} and {k}")
