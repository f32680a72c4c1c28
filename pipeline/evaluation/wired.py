"""The reconstruction by SAEs over several hook points: transcoders and crosscoders, on held-out windows.

N rows, I columns read, O columns reconstructed, F latents, K active.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sae import runtime
from sae.errors import ConfigError
from sae.metrics import Moments, ReconstructionMetrics
from sae.weights import SAEWeights

from ..corpus.windows import WindowTable
from ..llama.hooks import HookPoint
from ..llama.model import Model
from .evaluate import Progress, captured_rows
from .measure import json_safe

LEAST_SCALE = 1e-37  # what is divided by less is no float32

Ports = tuple[tuple[str, int], ...]  # (hook point, width), in the order of the columns


def ports_of(weights: SAEWeights) -> tuple[Ports, Ports]:
    """What is read, and what is reconstructed: of a crosscoder the same."""
    if not weights.ports:
        return ((weights.hook, weights.d_in),), ((weights.hook_out, weights.d_out),)
    if not weights.hook_out:
        return weights.ports, weights.ports
    ends = np.cumsum([width for _, width in weights.ports])
    read = int(np.searchsorted(ends, weights.d_in)) + 1
    return weights.ports[:read], weights.ports[read:]


def evaluate_wired(
    model: Model,
    weights: SAEWeights,
    table: WindowTable,
    chosen_W: np.ndarray,
    *,
    session: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`fvu`, `l0`, `dead_share` and the other reconstruction metrics of all that is reconstructed, on the chosen windows.

    `fvu_of` has FVU = sum ||y - y_hat||^2 / sum ||y - mean||^2 of each output p by itself. `fvu` is that of all, each
    divided by its scale s_p, as in training: sum_p (sum ||y - y_hat||^2)_p / s_p^2 over sum_p (sum ||y - mean||^2)_p / s_p^2.
    `scale_of` has the s_p (`output_scales`). The other metrics are those of the raw columns side by side.

    Rows that the table flags, that are not finite, or whose norm at a hook point exceeds the outlier threshold of the
    training there are left out; `flagged_share` says how many.

    Raises:
        ConfigError: every row is left out.
    """
    inputs, outputs = ports_of(weights)
    names = list(dict.fromkeys(name for name, _ in (*inputs, *outputs)))
    whole = ReconstructionMetrics(weights.d_out, weights.num_latents)
    each = [ReconstructionMetrics(width, weights.num_latents) for _, width in outputs]
    total, done = int(np.diff(table.window_starts)[chosen_W].sum()), 0
    limits = weights.training.get("outlier_thresholds", {})
    for rows, found in rows_at(model, table, chosen_W, names, limits, session):
        x_NI, y_NO = (np.concatenate([found[name] for name, _ in ports], axis=1) for ports in (inputs, outputs))
        if len(x_NI):
            idx_NK, vals_NK = runtime.encode(weights, x_NI)
            y_hat_NO = runtime.decode(weights, idx_NK, vals_NK, x_NI)
            whole.update(y_NO, y_hat_NO, idx_NK, vals_NK)
            start = 0
            for metrics, (_, width) in zip(each, outputs, strict=True):
                part = slice(start, start := start + width)
                metrics.update(y_NO[:, part], y_hat_NO[:, part], idx_NK, vals_NK)
        done += rows
        if progress is not None:
            progress("reconstruct", done, total)
    if not whole.rows:
        raise ConfigError("every held-out row is flagged or not finite; give a longer corpus")
    fvu_P = [metrics.result()["fvu"] for metrics in each]
    scale_P = output_scales(weights, [metrics.moments for metrics in each])
    result = {key: value for key, value in whole.result().items() if key != "density_F"}
    result["fvu"] = scaled_fvu(fvu_P, [metrics.moments.scatter for metrics in each], scale_P)
    of = {
        key: {name: value for value, (name, _) in zip(values, outputs, strict=True)}
        for key, values in (("fvu_of", fvu_P), ("scale_of", scale_P))
    }
    shares = {"num_latents": weights.num_latents, "captured_rows": done, "flagged_share": 1 - whole.rows / done}
    return json_safe(result | shares | {"inputs": [name for name, _ in inputs]} | of)


def scaled_fvu(fvu_P: Sequence[float], scatter_P: Sequence[float], scale_P: Sequence[float]) -> float:
    """FVU of P outputs together, each divided by its scale: the mean of theirs, weighted by scatter / scale^2."""
    weight_P = np.asarray(scatter_P) / np.square(scale_P)
    return float(np.average(fvu_P, weights=weight_P))


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
            and all(isinstance(scale, float) and LEAST_SCALE < scale < 1 / LEAST_SCALE for scale in found)
        ):
            raise ConfigError(f"expected training['scales'] of {points} positive numbers, got {str(found)[:60]}")
        return found[-outputs:]
    one = weights.training.get("scale")
    if outputs == 1 or (isinstance(one, list) and len(one) == 1):
        return [1.0] * outputs
    return [2.0 ** round(math.log2(math.sqrt(m.variance / len(m.mean_D)))) if m.scatter else 1.0 for m in moments_P]


def rows_at(
    model: Model,
    table: WindowTable,
    chosen_W: np.ndarray,
    names: Sequence[str],
    limits: Mapping[str, float],
    session: Mapping[str, Any],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(rows captured, {hook point: its values}) a few windows at a time; only rows that every hook point keeps.

    The windows run through the model once for each hook point.
    """
    captures = [
        captured_rows(
            model, table, chosen_W, HookPoint.parse(name), outlier_norm=limits.get(name, 0.0), session=session
        )
        for name in names
    ]
    for parts in zip(*captures, strict=True):
        kept = set.intersection(*(set(part.row_N.tolist()) for part in parts))
        in_all = [np.array([row in kept for row in part.row_N.tolist()], bool) for part in parts]
        yield parts[0].rows, {n: part.x_ND[keep] for n, part, keep in zip(names, parts, in_all, strict=True)}
