"""`ggscope evaluate`: how good an SAE is on held-out text, inside llama.cpp, beside its baselines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, ModelMismatchError
from sae.untrained import untrained_weights
from sae.weights import SAEWeights

from ..corpus.windows import WindowTable
from ..evaluation.baselines import Replacement, SAEReplacement
from ..evaluation.evaluate import evaluate, pca_baseline, reconstruction_on_store, store_rows
from ..llama.identity import check_same_model
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
    outlier_norm,
    relative,
    session_options,
)

EVALUATION_NAME = "evaluation.json"
PCA_ROWS = 200_000  # of the store, spread evenly


def run(context: RunContext) -> None:
    config = context.config.evaluate
    path, weights = open_sae(context)
    store = open_store(context, weights) if config.baselines else None
    with open_model(context) as model:
        check_host(context, weights, model)
        table = window_table(context, model, split="held_out", max_tokens=0)
        if store is not None:
            check_same_model(store.meta.model, model.id)
        found = baselines(weights, store, config.random_sae, config.seed) if store else {}
        with context.progress("evaluating", config.tokens) as progress:
            result = evaluate(
                model, weights, table, config=config, baselines=found,
                outlier_norm=outlier_norm(weights),
                session=session_options(context.config.model),
                progress=lambda what, done, total: progress(done, total, note=what),
            )  # fmt: skip
        given = f"{relative(path)} in {describe_model(model)}, {len(table.documents)} held-out documents"
    if config.random_sae:
        result["random_model_own"] = own_quality(config.random_sae)
    result["sae_id"] = weights.training.get("id")
    result["documents_trained_on"] = seen_in_training(context, store, table)
    write_json(context.folder / EVALUATION_NAME, result)
    context.outputs["evaluation"] = str(context.folder / EVALUATION_NAME)
    context.metrics = {key: value for key, value in result.items() if key != "density_histogram"}
    low, high = map(number, result["delta_ce_ci95"])
    context.three_lines(
        given,
        f"FVU {number(result['fvu'])}, L0 {result['l0']:.1f}, dead {result['dead_share']:.2%} of {weights.num_latents} over {result['rows']:,} rows "
        f"({result['flagged_share']:.2%} flagged, left out); CE recovered {number(result['ce_recovered'])}, delta CE {number(result['delta_ce_nats'])} "
        f"nats [{low}, {high}], KL {number(result['kl'])} nats over {result['splice_rows']:,} rows; {beside(result)}",
        relative(context.folder / EVALUATION_NAME),
    )


def seen_in_training(context: RunContext, store: ActivationStore | None, table: WindowTable) -> int:
    """Held-out documents whose text is in the training store too: none, unless it was made with another split."""
    trained = {document["sha256"] for document in store.documents} if store is not None else set()
    seen = sum(document.sha256 in trained for document in table.documents)
    if seen:
        context.console.print(
            f"warning: {seen} of {len(table.documents)} evaluation documents were trained on",
            style="yellow",
            highlight=False,
        )
    return seen


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
    if store.hooks[weights.hook].width != weights.d_in:
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
