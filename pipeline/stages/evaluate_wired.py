"""`ggscope evaluate` of transcoders, crosscoders and cross-layer transcoders, on held-out text inside llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sae.errors import ConfigError
from sae.latent_statistics import LatentStatistics
from sae.weights import SAEWeights
from sae.wiring import spans

from ..evaluation.latents import dictionary_summary, wired_columns
from ..evaluation.linear import MOST_COLUMNS, linear_baselines
from ..evaluation.measure import json_safe
from ..evaluation.ports import Ports, ports_of
from ..evaluation.wired import evaluate_wired
from ..run import RunContext
from ..store.reader import ActivationStore
from .corpora import window_table
from .evaluate_files import EVALUATION_NAME, write
from .evaluate_rows import say_measured, seen_in_training, training_pairs, warn_other_corpus
from .evaluate_text import numbers
from .inputs import check_host, counted, describe_model, open_model, open_store, own_store, relative, session_options

AT_ONE_POINT = ("also", "against", "probe", "random_sae")  # settings of what is not measured here
NAMED = 2  # hook points in a title


def evaluate_several(context: RunContext, path: Path, weights: SAEWeights) -> None:
    """ConfigError for settings of what is measured of plain SAEs only."""
    config = context.config.evaluate
    for key in AT_ONE_POINT:
        if getattr(config, key):
            raise ConfigError(f"evaluate.{key} is for SAEs at one hook point; leave it out for this one")
    inputs, outputs = ports_of(weights)
    statistics = LatentStatistics(weights.W_dec_FD, spans(outputs))
    place = own_store(weights.training.get("store_sha256", ""))
    store = open_store(context, weights) if config.baselines and (place or context.config.store.path) else None
    if store is not None:
        warn_other_corpus(context, store)
    with open_model(context) as model:
        check_host(context, weights, model)
        found = {}
        if config.baselines:
            found = linear_baselines(weights, training_pairs(context, weights, model, store))
            if not found:
                context.console.print(
                    f"no linear maps beside it: more than {MOST_COLUMNS:,} columns on one side",
                    style="dim",
                    highlight=False,
                )
        table = window_table(context, model, split="held_out", max_tokens=0)
        with context.progress("evaluating", say_measured(context, table)) as progress:
            result = evaluate_wired(
                model, weights, table, config=config, baselines=found, statistics=statistics,
                session=session_options(context.config.model),
                progress=lambda what, done, total: progress(done, total, note=what),
            )  # fmt: skip
        given = f"{relative(path)} in {describe_model(model)}, {counted(len(table.documents), 'held-out document')}"
    result["sae_id"] = weights.training.get("id")
    trained_on = ActivationStore(place).iter_documents() if place is not None else None
    result["documents_trained_on"] = seen_in_training(context, trained_on, table)
    columns = wired_columns(
        weights, statistics, result.pop("scatter"), list(result["scale_of"].values()),
        searched=config.structure_latents, seed=config.seed,
    )  # fmt: skip
    columns["outputs"] = np.array([name for name, _ in outputs])
    result["dictionary"] = json_safe(dictionary_summary(columns))
    between = named(outputs) if inputs == outputs else f"{named(inputs)} to {named(outputs)}"
    write(context, result, columns, f"{between}, {counted(weights.num_latents, 'latent')}")
    context.three_lines(
        given,
        f"from {', '.join(name for name, _ in inputs)}: {numbers(result)}",
        relative(context.folder / EVALUATION_NAME),
    )


def named(ports: Ports) -> str:
    """`a`, `a and b`, `a, b and 4 more`."""
    names = [name for name, _ in ports]
    first, more = names[:NAMED], len(names) - NAMED
    return f"{', '.join(first)} and {more} more" if more > 0 else " and ".join(first)
