"""`ggscope evaluate` of transcoders and crosscoders: how well they reconstruct held-out activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..evaluation.evaluate import take_windows
from ..evaluation.wired import evaluate_wired, ports_of
from ..run import RunContext, write_json
from .corpora import window_table
from .inputs import check_host, counted, describe_model, number, open_model, relative, session_options

SPLICED = ("also", "against", "probe", "random_sae")  # settings of what is not measured here


def evaluate_several(context: RunContext, path: Path, weights: SAEWeights, name: str) -> None:
    """Write the numbers to `name` in the run folder. ConfigError for settings of what only plain SAEs have."""
    config = context.config.evaluate
    for key in SPLICED:
        if getattr(config, key):
            raise ConfigError(
                f"evaluate.{key} is for SAEs at one hook point; of this one FVU, L0 and dead share are measured"
            )
    with open_model(context) as model:
        check_host(context, weights, model)
        table = window_table(context, model, split="held_out", max_tokens=0)
        order_W = np.random.default_rng(config.seed).permutation(table.n_windows)
        with context.progress("evaluating", config.tokens) as progress:
            result = evaluate_wired(
                model, weights, table, take_windows(table, order_W, config.tokens),
                session=session_options(context.config.model),
                progress=lambda what, done, total: progress(done, total, note=what),
            )  # fmt: skip
        given = f"{relative(path)} in {describe_model(model)}, {counted(len(table.documents), 'held-out document')}"
    result["sae_id"] = weights.training.get("id")
    write_json(context.folder / name, result)
    context.outputs["evaluation"] = str(context.folder / name)
    context.metrics = result
    inputs, _ = ports_of(weights)
    parts = ", ".join(f"{hook} {number(fvu)}" for hook, fvu in result["fvu_of"].items())
    context.three_lines(
        given,
        f"from {', '.join(hook for hook, _ in inputs)}: FVU {number(result['fvu'])} ({parts}), L0 {result['l0']:.1f}, dead "
        f"{result['dead_share']:.2%} of {result['num_latents']} over {result['rows']:,} rows ({result['flagged_share']:.2%} "
        "flagged, left out); CE is measured for SAEs at one hook point only",
        relative(context.folder / name),
    )
