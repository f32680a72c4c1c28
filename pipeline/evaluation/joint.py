"""Several SAEs in one forward pass: what the model loses when it runs on all of their reconstructions at once.

    joint        every hook point carries its SAE's reconstruction of what arrives there, i.e. of activations that the
                 reconstructions before it have already changed
    joint_zero   every one of them is zero;  joint_mean: E[x] of its training rows
    alone/HOOK   one of the further SAEs by itself; the first one by itself is the run "sae"

Their numbers are those of a single SAE with these runs in place of sae, zero and mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError
from sae.metrics import ReconstructionMetrics
from sae.weights import SAEWeights

from ..llama.hooks import HookPoint
from .baselines import ConstantReplacement, SAEReplacement
from .losses import clustered_mean
from .measure import measured, quality, run_losses
from .splice import CLEAN, Joint, SpliceResult

JOINT, JOINT_ZERO, JOINT_MEAN, ALONE = "joint", "joint_zero", "joint_mean", "alone/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Further:
    """An SAE at another hook point of the same model, and the norm above which its rows were outside its training."""

    weights: SAEWeights
    outlier_norm: float = 0.0


def hooks_of(weights: SAEWeights, further: Sequence[Further]) -> list[HookPoint]:
    """The hook point of each SAE. ConfigError where two of them share one."""
    hooks = [HookPoint.parse(w.hook) for w in (weights, *(f.weights for f in further))]
    if len(set(hooks)) != len(hooks):
        raise ConfigError(
            f"SAEs spliced together need a hook point each, got {', '.join(map(str, hooks))}; "
            "compare two SAEs of one hook point with evaluate.against"
        )
    return hooks


class JointRuns:
    """The runs of this page for `weights` and the further SAEs.

    Raises:
        ConfigError: two of the SAEs belong to the same hook point.
    """

    def __init__(self, weights: SAEWeights, further: Sequence[Further]) -> None:
        self.hooks = hooks_of(weights, further)
        self.outlier_norms = {HookPoint.parse(f.weights.hook): f.outlier_norm for f in further}
        every = dict(zip(self.hooks, (weights, *(f.weights for f in further)), strict=True))
        self._alone = dict(list(every.items())[1:])
        self._live = {hook: ReconstructionMetrics(w.d_in, w.num_latents) for hook, w in every.items()}
        self._own = {hook: ReconstructionMetrics(w.d_in, w.num_latents) for hook, w in self._alone.items()}
        self.runs: dict[str, Joint] = {
            JOINT: {hook: measured(SAEReplacement(w), self._live[hook]) for hook, w in every.items()},
            JOINT_ZERO: {hook: ConstantReplacement(np.zeros(w.d_in)) for hook, w in every.items()},
            JOINT_MEAN: {hook: ConstantReplacement(w.mean_D) for hook, w in every.items()},
            **{f"{ALONE}{h}": {h: measured(SAEReplacement(w), self._own[h])} for h, w in self._alone.items()},
        }

    def result(self, losses: SpliceResult, cluster_N: np.ndarray, own: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of the joint run; `own` are those of the first SAE by itself."""
        alone = {str(self.hooks[0]): dict(own)}
        for hook in self._alone:
            delta = clustered_mean(losses.ce[f"{ALONE}{hook}"] - losses.ce[CLEAN], cluster_N)
            kl = clustered_mean(losses.kl[f"{ALONE}{hook}"], cluster_N)
            alone[str(hook)] = {
                "delta_ce_nats": delta.mean,
                "delta_ce_ci95": [delta.low, delta.high],
                "kl": kl.mean,
                "kl_ci95": [kl.low, kl.high],
                **quality(self._own[hook]),
            }
        return {
            "hooks": [str(hook) for hook in self.hooks],
            **run_losses(losses, JOINT, cluster_N, zero=JOINT_ZERO, mean=JOINT_MEAN),
            **{f"ce_{key}": float(losses.ce[name].mean()) for key, name in
               (("joint", JOINT), ("zero", JOINT_ZERO), ("mean", JOINT_MEAN)) if len(cluster_N)},
            "kl_zero": float(losses.kl[JOINT_ZERO].mean()) if len(cluster_N) else None,
            "sum_of_delta_ce_alone": sum(row["delta_ce_nats"] for row in alone.values()),
            "live": {str(hook): quality(metrics) for hook, metrics in self._live.items()},
            "alone": alone,
        }  # fmt: skip
