"""The evaluation of SAEs over several hook points: transcoders, crosscoders, cross-layer transcoders.

CE and KL are of the model in which every output hook point is replaced by its part of y_hat = decode(encode(x)), all
in one forward pass. x are the rows of the undisturbed run at every input, also where an input lies behind an output or
is one: so the second pass only writes, and the latents are those that FVU and L0 are of. In a model that ran on
its own replacements a later input would differ.

N rows, I columns read, O columns reconstructed, P hook points of these, F latents, K active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig
from sae import runtime
from sae.errors import ConfigError
from sae.latent_statistics import LatentStatistics
from sae.weights import SAEWeights

from ..corpus.windows import WindowTable
from ..llama.hooks import HookPoint
from ..llama.model import Model
from .baselines import ConstantReplacement, Replacement, SAEReplacement
from .evaluate import (
    Progress,
    captured_rows,
    counted,
    spliced_numbers,
    spliced_windows,
    split_numbers,
    take_windows,
    window_order,
)
from .measure import MEAN, SAE, ZERO, json_safe
from .ports import OutputMetrics, Ports, output_scales, ports_of, side_by_side
from .splice import RowsAt, SpliceConfig, Wired, splice

LARGEST = 1e38  # of a norm in float32


def evaluate_wired(
    model: Model,
    weights: SAEWeights,
    windows: WindowTable,
    *,
    config: EvaluateConfig,
    baselines: Mapping[str, Replacement] | None = None,
    statistics: LatentStatistics | None = None,
    session: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The numbers of `evaluate` for what is reconstructed, without further SAEs.

    `fvu_of` has FVU = sum ||y - y_hat||^2 / sum ||y - mean||^2 of each output p by itself. `fvu` is that of all, each
    divided by its scale s_p, as in training: sum_p (sum ||y - y_hat||^2)_p / s_p^2 over sum_p (sum ||y - mean||^2)_p / s_p^2.
    `scale_of` has the s_p (`output_scales`), `scatter` the sum ||y - mean||^2 of each. The other reconstruction metrics
    are those of the raw columns side by side.

    `ce_recovered`, `delta_ce_nats`, `kl` are of the model with all outputs replaced (see above), also by each of
    `baselines`, by zero and by their means; CE recovered is on the scale of these two.

    Rows that the table flags, that are not finite, or whose norm at a hook point exceeds the outlier threshold of the
    training there are left out; `flagged_share` says how many. `statistics` (its parts: the outputs) is filled.

    Raises:
        ConfigError: every row is left out; two outputs are one tensor of the model, which only one of them can replace.
        ShapeError: a hook point is not as wide as the SAE says.
    """
    inputs, outputs = ports_of(weights)
    _check_points(model, inputs, outputs)
    order_W = window_order(windows, config.seed)
    chosen_W = take_windows(windows, order_W, config.tokens)
    whole = OutputMetrics(outputs, weights.num_latents)
    captured = _reconstruct(model, weights, windows, chosen_W, whole, statistics, session or {}, progress)
    whole.scale_P = output_scales(weights, [metrics.moments for metrics in whole.each])
    result = split_numbers(whole.result(), weights.num_latents, captured)

    runs: dict[str, Replacement] = {
        SAE: SAEReplacement(weights),
        **(baselines or {}),
        MEAN: ConstantReplacement(weights.mean_D),
        ZERO: ConstantReplacement(np.zeros(weights.d_out)),
    }
    metrics = {name: OutputMetrics(outputs, max(1, run.num_latents)) for name, run in runs.items()}
    for measured in metrics.values():
        measured.scale_P = whole.scale_P
    spliced = spliced_windows(windows, order_W, config.splice_tokens)
    losses = splice(
        model,
        spliced,
        {},
        HookPoint.parse(outputs[0][0]),
        wired={name: wired_run(run, metrics[name], inputs, outputs) for name, run in runs.items()},
        config=SpliceConfig(
            outlier_norms={HookPoint.parse(name): limit for name, limit in limits_of(weights).items()},
            session=session or {},
        ),
        progress=counted(progress, "splice", sum(len(w.tokens) for w in spliced)),
    )
    of = {"scale_of": dict(zip(whole.names, whole.scale_P, strict=True)), "scatter": whole.scatter_P}
    found = result | {"inputs": [name for name, _ in inputs]} | of
    return json_safe(found | spliced_numbers(losses, metrics))


def _check_points(model: Model, inputs: Ports, outputs: Ports) -> None:
    for name, _ in (*inputs, *outputs):
        if HookPoint.parse(name).site == "pattern":
            raise ConfigError(f"expected hook points with a row of values for each token, {name} has a pattern")
    by_place: dict[int, str] = {}
    for name, _ in outputs:
        place = model.graph.find(HookPoint.parse(name)).index
        if place in by_place:
            raise ConfigError(
                f"expected outputs that differ, {by_place[place]} and {name} are one tensor of this model: which of both "
                "reconstructions it goes on with cannot be said"
            )
        by_place[place] = name


def limits_of(weights: SAEWeights) -> dict[str, float]:
    """Above which norm a row was outside the training at a hook point (0: none is known).

    Raises:
        ConfigError: `training["outlier_thresholds"]` holds anything but numbers from 0 on.
    """
    limits = weights.training.get("outlier_thresholds", {})
    numbers = list(limits.values()) if isinstance(limits, dict) else [None]
    if not all(isinstance(limit, (int, float)) and 0 <= limit < LARGEST for limit in numbers):
        raise ConfigError(f"expected training['outlier_thresholds'] of numbers from 0 on, got {str(limits)[:60]}")
    return {name: float(limits.get(name, 0.0)) for ports in ports_of(weights) for name, _ in ports}


def wired_run(run: Replacement, metrics: OutputMetrics, inputs: Ports, outputs: Ports) -> Wired:
    """`run` reads all inputs side by side and gives all outputs so; every reconstruction is counted in `metrics`."""
    read, written = ([HookPoint.parse(name) for name, _ in ports] for ports in (inputs, outputs))

    def reconstruct(acts: RowsAt) -> RowsAt:
        x_NI, y_NO = (side_by_side(ports, acts) for ports in (inputs, outputs))
        idx_NK, vals_NK = run.code(x_NI)
        y_hat_NO = run.decode(idx_NK, vals_NK, x_NI)
        metrics.update(y_NO, y_hat_NO, idx_NK, np.abs(vals_NK))  # of a linear map the values have both signs
        return {point: y_hat_NO[:, part] for point, part in zip(written, metrics.parts, strict=True)}

    return Wired(points=tuple(dict.fromkeys([*read, *written])), reconstruct=reconstruct)


def _reconstruct(
    model: Model,
    weights: SAEWeights,
    table: WindowTable,
    chosen_W: np.ndarray,
    metrics: OutputMetrics,
    statistics: LatentStatistics | None,
    session: Mapping[str, Any],
    progress: Progress | None,
) -> int:
    """Fill `metrics` and `statistics`; gives the rows captured, flagged ones included."""
    inputs, outputs = ports_of(weights)
    names = list(dict.fromkeys(name for name, _ in (*inputs, *outputs)))
    captured = int(np.diff(table.window_starts)[chosen_W].sum())
    advance = counted(progress, "reconstruct", captured)
    for rows, found in rows_at(model, table, chosen_W, names, limits_of(weights), session):
        acts = {HookPoint.parse(name): values for name, values in found.items()}
        x_NI, y_NO = (side_by_side(ports, acts) for ports in (inputs, outputs))
        if len(x_NI):
            idx_NK, vals_NK = runtime.encode(weights, x_NI)
            y_hat_NO = runtime.decode(weights, idx_NK, vals_NK, x_NI)
            metrics.update(y_NO, y_hat_NO, idx_NK, vals_NK)
            if statistics is not None:
                statistics.update(y_NO, y_hat_NO, idx_NK, vals_NK, runtime.sigma(weights, x_NI))
        advance(rows)
    if not metrics.rows:
        raise ConfigError("every held-out row is flagged or not finite; give a longer corpus")
    return captured


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
