"""The hook points of SAEs over several: which columns are whose, and metrics over all and at each.

N rows, I columns read, O columns reconstructed, P hook points of these, F latents, K active.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae.errors import ConfigError, ShapeError
from sae.metrics import Moments, ReconstructionMetrics
from sae.weights import SAEWeights
from sae.wiring import spans

from ..llama.hooks import HookPoint

LEAST_SCALE = 1e-37  # what is divided by less is no float32

Ports = tuple[tuple[str, int], ...]  # (hook point, width), in the order of the columns


def ports_of(weights: SAEWeights) -> tuple[Ports, Ports]:
    """What is read, and what is reconstructed: of a crosscoder and an SAE the same.

    Raises:
        ConfigError: the file's hook points do not divide into d_in and d_out columns, or one is named twice.
    """
    if not weights.ports:
        return ((weights.hook, weights.d_in),), ((weights.hook_out or weights.hook, weights.d_out),)
    ends = np.cumsum([width for _, width in weights.ports])
    read = int(np.searchsorted(ends, weights.d_in)) + 1
    inputs, outputs = weights.ports[:read], weights.ports[read:] if weights.hook_out else weights.ports
    fits = sum(width for _, width in inputs) == weights.d_in and outputs and all(width for _, width in weights.ports)
    if not fits or any(len(dict(ports)) < len(ports) for ports in (inputs, outputs)):
        raise ConfigError(
            f"expected hook points that differ, of {weights.d_in} columns read and {weights.d_out} reconstructed, got "
            f"{', '.join(f'{name} ({width})' for name, width in weights.ports)}"
        )
    return inputs, outputs


class OutputMetrics(ReconstructionMetrics):
    """The metrics of all outputs side by side; `fvu` with each divided by its scale, `fvu_of` at each by itself."""

    def __init__(self, outputs: Ports, num_latents: int) -> None:
        super().__init__(sum(width for _, width in outputs), num_latents)
        self.names = [name for name, _ in outputs]
        self.parts = spans(outputs)
        self.each = [ReconstructionMetrics(width, num_latents) for _, width in outputs]
        self.scale_P = [1.0] * len(outputs)

    @property
    def scatter_P(self) -> list[float]:
        """sum ||y - mean||^2 of each output."""
        return [metrics.moments.scatter for metrics in self.each]

    def update(self, x_ND: np.ndarray, x_hat_ND: np.ndarray, idx_NK: np.ndarray, vals_NK: np.ndarray) -> None:
        super().update(x_ND, x_hat_ND, idx_NK, vals_NK)
        for metrics, part in zip(self.each, self.parts, strict=True):
            metrics.update(x_ND[:, part], x_hat_ND[:, part], idx_NK, vals_NK)

    def result(self) -> dict[str, Any]:
        fvu_P = [metrics.result()["fvu"] for metrics in self.each]
        return super().result() | {
            "fvu": scaled_fvu(fvu_P, self.scatter_P, self.scale_P),
            "fvu_of": dict(zip(self.names, fvu_P, strict=True)),
        }


def scaled_fvu(fvu_P: Sequence[float], scatter_P: Sequence[float], scale_P: Sequence[float]) -> float:
    """FVU of P outputs together, each divided by its scale: the mean of theirs, weighted by scatter / scale^2."""
    weight_P = np.asarray(scatter_P) / np.square(scale_P)
    return float(np.average(fvu_P, weights=weight_P))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def side_by_side(ports: Ports, acts: Mapping[HookPoint, np.ndarray]) -> np.ndarray:
    """The values at the hook points as columns. ShapeError for a point whose rows are not as wide as the SAE says."""
    parts = [acts[HookPoint.parse(name)] for name, _ in ports]
    for (name, width), part in zip(ports, parts, strict=True):
        if part.shape[1:] != (width,):
            got = " x ".join(str(n) for n in part.shape[1:])
            raise ShapeError(f"expected {width} values a row at {name}, as the SAE was trained on; the model has {got}")
    return np.concatenate(parts, axis=1)


def output_scales(weights: SAEWeights, moments_P: Sequence[Moments]) -> list[float]:
    """What the training divided each output by.

    Files that do not say: 1 each where one number served all (or there is one output), else by the rule of the
    training on the rows seen, the power of two nearest to sqrt(E||y - mean||^2 / width).

    Raises:
        ConfigError: `training["scales"]` is not a positive number for each hook point.
    """
    found, outputs = weights.training.get("scales"), len(moments_P)
    if found is not None:
        points = len(weights.ports) or 2
        if not (
            isinstance(found, list)
            and len(found) == points
            and all(_is_number(scale) and LEAST_SCALE < scale < 1 / LEAST_SCALE for scale in found)
        ):
            raise ConfigError(f"expected training['scales'] of {points} positive numbers, got {str(found)[:60]}")
        return [float(scale) for scale in found[-outputs:]]
    one = weights.training.get("scale")
    if outputs == 1 or (isinstance(one, list) and len(one) == 1):
        return [1.0] * outputs
    return [2.0 ** round(math.log2(math.sqrt(m.variance / len(m.mean_D)))) if m.scatter else 1.0 for m in moments_P]
