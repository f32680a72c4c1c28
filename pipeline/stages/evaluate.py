"""`ggscope evaluate`: how good an SAE is on held-out text, inside llama.cpp, beside its baselines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, ModelMismatchError
from sae.untrained import untrained_weights
from sae.weights import SAEWeights

from ..evaluation.baselines import Replacement, SAEReplacement
from ..evaluation.evaluate import evaluate, pca_baseline, reconstruction_on_store, store_rows
from ..run import RunContext, write_json
from ..store.reader import ActivationStore
from .corpora import window_table
from .inputs import (
    LABELS,
    check_host,
    describe_model,
    load_sae,
    open_model,
    open_sae,
    open_store,
    relative,
    session_options,
)

EVALUATION_NAME = "evaluation.json"
PCA_ROWS = 200_000  # of the store, spread evenly


def run(context: RunContext) -> None:
    config = context.config.evaluate
    path, weights = open_sae(context)
    store = open_store(context) if config.baselines else None
    with open_model(context) as model:
        check_host(context, weights, model)
        table = window_table(context, model, split="held_out", max_tokens=0)
        found = baselines(weights, store, config.random_sae, config.seed) if store else {}
        with context.progress("evaluating", config.tokens) as progress:
            result = evaluate(
                model, weights, table, config=config, baselines=found,
                outlier_norm=store.hooks[weights.hook].outlier_threshold if store else 0.0,
                session=session_options(context.config.model),
                progress=lambda what, done, total: progress(done, total, note=what),
            )  # fmt: skip
        given = f"{relative(path)} in {describe_model(model)}, {len(table.documents)} held-out documents"
    if config.random_sae:
        result["random_model_own"] = own_quality(config.random_sae)
    write_json(context.folder / EVALUATION_NAME, result)
    context.outputs["evaluation"] = str(context.folder / EVALUATION_NAME)
    context.metrics = {key: value for key, value in result.items() if key != "density_histogram"}
    low, high = result["delta_ce_ci95"]
    context.three_lines(
        given,
        f"FVU {result['fvu']:.4f}, L0 {result['l0']:.1f}, dead {result['dead_share']:.2%} of {weights.num_latents} over {result['rows']:,} rows "
        f"({result['flagged_share']:.2%} flagged, left out); CE recovered {number(result['ce_recovered'])}, delta CE {result['delta_ce_nats']:.4f} "
        f"nats [{low:.4f}, {high:.4f}], KL {result['kl']:.4f} nats over {result['splice_rows']:,} rows; {beside(result)}",
        relative(context.folder / EVALUATION_NAME),
    )


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def beside(result: dict[str, Any]) -> str:
    rows = [
        f"{LABELS.get(name, name)} FVU {number(row['fvu'])} CE {number(row['ce_recovered'])}"
        for name, row in result["baselines"].items()
    ]
    return "beside " + ", ".join(rows)


def baselines(weights: SAEWeights, store: ActivationStore, random_sae: str, seed: int) -> dict[str, Replacement]:
    """PCA with k components, an untrained SAE, and the SAE of a random model where there is one."""
    if weights.hook not in store.hooks:
        raise ConfigError(
            f"the store holds {', '.join(store.hooks)}, the SAE belongs to {weights.hook}; name its store with store.path"
        )
    if store.meta.model.get("n_embd") != weights.d_in and store.hooks[weights.hook].width != weights.d_in:
        raise ModelMismatchError(
            f"the store's rows are {store.hooks[weights.hook].width} wide, the SAE's {weights.d_in}"
        )
    sample = next(iter(store_rows(store, weights.hook, 16_384)))
    untrained = untrained_weights(
        weights.d_in, weights.num_latents, weights.k, weights.mean_D, weights.variance, weights.hook,
        weights.host, seed, sample_ND=sample[:4096],
    )  # fmt: skip
    found: dict[str, Replacement] = {
        "pca": pca_baseline(store, weights.hook, weights.k, PCA_ROWS),
        "untrained": SAEReplacement(untrained),
    }
    if random_sae:
        other = load_sae(Path(random_sae))
        if (other.d_in, other.k) != (weights.d_in, weights.k):
            raise ModelMismatchError(
                f"evaluate.random_sae: expected width {weights.d_in} and k={weights.k}, got {other.d_in} and k={other.k}"
            )
        found["random_model"] = SAEReplacement(dataclasses.replace(other, host=weights.host))
    return found


def own_quality(random_sae: str) -> dict[str, Any] | None:
    """The random model's SAE on its own model's activations, where its store lies beside it."""
    store = Path(random_sae).parents[1] / "extract" / "activations.zarr"
    return reconstruction_on_store(load_sae(Path(random_sae)), ActivationStore(store)) if store.is_dir() else None
