"""`ggscope evaluate`: how good an SAE is on held-out text, inside llama.cpp, beside its baselines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import ConfigError, ModelMismatchError
from sae.latent_statistics import LatentStatistics
from sae.untrained import untrained_weights
from sae.weights import SAEWeights

from ..config import EvaluateConfig
from ..corpus.windows import WindowTable
from ..evaluation.baselines import Replacement, SAEReplacement, fit_pca
from ..evaluation.evaluate import captured_rows, evaluate, json_safe, reconstruction_on_store, store_rows
from ..evaluation.latents import dictionary_summary, latent_columns, save_columns
from ..evaluation.picture import draw_evaluation
from ..evaluation.saebench import core_metrics, sparse_probing_metrics
from ..llama.hooks import HookPoint
from ..llama.identity import check_same_model
from ..llama.model import Model
from ..run import RunContext, runs_of, write_json
from ..store.reader import ActivationStore
from ..store.schema import DOCS_FILE
from .corpora import window_table
from .evaluate_extras import measure_extras, numbers_of_extras, open_extras, pool_texts
from .evaluate_wired import evaluate_several
from .inputs import (
    LABELS,
    check_host,
    counted,
    describe_model,
    load_sae,
    number,
    open_model,
    open_sae,
    open_store,
    outlier_norm,
    relative,
    session_options,
)

EVALUATION_NAME = "evaluation.json"
LATENTS_NAME = "latents.npz"
PICTURE_NAME = "evaluation.png"
NOT_IN_MANIFEST = ("density_histogram", "dictionary", "saebench")
PCA_ROWS = 200_000  # of the store, spread evenly
STREAM_ROWS = 65_536  # of the training split, captured again where there was no store
SAMPLE_ROWS = 4096  # for the untrained SAE's scale

RowSource = Callable[[int], Iterable[np.ndarray]]  # at most so many unflagged training rows, chunk by chunk


def run(context: RunContext) -> None:
    config = context.config.evaluate
    path, weights = open_sae(context, several=True)
    if weights.is_wired:
        evaluate_several(context, path, weights, EVALUATION_NAME)
        return
    extras = open_extras(context, weights)
    statistics = LatentStatistics(weights.W_dec_FD)
    streamed = weights.training.get("source") == "stream" and not context.config.store.path
    store = open_store(context, weights) if config.baselines and not streamed else None
    with open_model(context) as model:
        for sae in (weights, *(further.weights for further in extras.also)):
            check_host(context, sae, model)
        found = baselines(weights, training_rows(context, weights, model, store), config) if config.baselines else {}
        table = window_table(context, model, split="held_out", max_tokens=0)
        with context.progress("evaluating", config.tokens) as progress:
            result = evaluate(
                model, weights, table, config=config, baselines=found, also=extras.also, statistics=statistics,
                outlier_norm=outlier_norm(weights),
                session=session_options(context.config.model),
                progress=lambda what, done, total: progress(done, total, note=what),
            )  # fmt: skip
        pooled = pool_texts(context, model, weights, extras) if extras.labelled else None
        given = f"{relative(path)} in {describe_model(model)}, {counted(len(table.documents), 'held-out document')}"
    if config.random_sae:
        result["random_model_own"] = own_quality(config.random_sae)
    result["sae_id"] = weights.training.get("id")
    trained_on = documents_of_training(weights) if streamed else store.iter_documents() if store is not None else ()
    result["documents_trained_on"] = seen_in_training(context, trained_on, table)
    columns = latent_columns(
        weights, statistics, result.pop("scatter"), searched=config.structure_latents, seed=config.seed
    )
    result["dictionary"] = json_safe(dictionary_summary(columns))
    result["saebench"] = json_safe({"core": core_metrics(result, columns, weights.d_in)})
    result |= json_safe(measure_extras(context, weights, extras, pooled))
    if "probing" in result:
        result["saebench"]["sparse_probing"] = sparse_probing_metrics(result["probing"])
    write(context, result, columns, f"{weights.hook}, {counted(weights.num_latents, 'latent')}")
    context.three_lines(given, numbers(result), relative(context.folder / EVALUATION_NAME))


def write(context: RunContext, result: dict[str, Any], columns: dict[str, np.ndarray], title: str) -> None:
    """The numbers as JSON, the latents as arrays, and a picture of both."""
    names = {"evaluation": EVALUATION_NAME, "latents": LATENTS_NAME, "picture": PICTURE_NAME}
    write_json(context.folder / EVALUATION_NAME, result)
    save_columns(context.folder / LATENTS_NAME, columns)
    draw_evaluation(context.folder / PICTURE_NAME, result, title)
    context.outputs |= {output: str(context.folder / name) for output, name in names.items()}
    context.metrics = {key: value for key, value in result.items() if key not in NOT_IN_MANIFEST}


def numbers(result: dict[str, Any]) -> str:
    """The line of numbers."""
    low, high = map(number, result["delta_ce_ci95"])
    return "; ".join(
        [
            f"FVU {number(result['fvu'])}, L0 {result['l0']:.1f}, dead {result['dead_share']:.2%} and dense {result['dense_share']:.2%} of "
            f"{result['num_latents']} over {result['rows']:,} rows ({result['flagged_share']:.2%} flagged, left out)",
            f"CE recovered {number(result['ce_recovered'])}, delta CE {number(result['delta_ce_nats'])} nats [{low}, {high}], "
            f"KL {number(result['kl'])} nats over {result['splice_rows']:,} rows",
            beside(result),
            *numbers_of_extras(result),
        ]
    )


def training_rows(context: RunContext, weights: SAEWeights, model: Model, store: ActivationStore | None) -> RowSource:
    """Training rows for the baselines: of the store, or captured again from the first documents of the corpus."""
    if store is not None:
        check_store(weights, store, model)
        return lambda rows: store_rows(store, weights.hook, rows)
    table = window_table(context, model, max_tokens=STREAM_ROWS)

    def captured(rows: int) -> Iterable[np.ndarray]:
        parts = captured_rows(
            model, table, np.arange(table.n_windows), HookPoint.parse(weights.hook),
            outlier_norm=outlier_norm(weights), session=session_options(context.config.model),
        )  # fmt: skip
        return first_rows((part.x_ND for part in parts), rows)

    return captured


def first_rows(parts: Iterable[np.ndarray], rows: int) -> Iterable[np.ndarray]:
    """The parts until there are `rows` rows."""
    for x_ND in parts:
        yield x_ND[:rows]
        rows -= len(x_ND)
        if rows <= 0:
            return


def documents_of_training(weights: SAEWeights) -> Iterator[dict[str, Any]]:
    """The documents of a streamed training, one after another, where its run folder is found."""
    for folder, manifest in runs_of("train"):
        path = folder / DOCS_FILE
        if manifest.get("metrics", {}).get("sae_id") == weights.training.get("id") and path.is_file():
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)
            return


def seen_in_training(context: RunContext, documents: Iterable[dict[str, Any]], table: WindowTable) -> int:
    """Held-out documents whose text was trained on too: none, unless the training took another split."""
    held_out = {document.sha256 for document in table.documents}
    trained = {document["sha256"] for document in documents if document["sha256"] in held_out}
    seen = sum(document.sha256 in trained for document in table.documents)
    if seen:
        context.console.print(
            f"warning: {seen} of {len(table.documents)} evaluation documents were trained on",
            style="yellow",
            highlight=False,
        )
    return seen


def beside(result: dict[str, Any]) -> str:
    """The baselines, and the SAE on the same rows: those spliced, fewer than its own FVU is over."""
    own = {"sae": {**result["same_rows"], "ce_recovered": result["ce_recovered"]}}
    rows = [
        f"{LABELS.get(name, name)} FVU {number(row['fvu'])} CE {number(row['ce_recovered'])}"
        for name, row in (own | result["baselines"]).items()
    ]
    return f"over the same {result['splice_rows']:,} rows " + ", ".join(rows)


def check_store(weights: SAEWeights, store: ActivationStore, model: Model) -> None:
    """Refuse a store whose rows are not those of the SAE's hook point in this model."""
    check_same_model(store.meta.model, model.id)
    if weights.hook not in store.hooks:
        raise ConfigError(
            f"the store holds {', '.join(store.hooks)}, the SAE belongs to {weights.hook}; name its store with store.path"
        )
    if store.hooks[weights.hook].width != weights.d_in:
        raise ModelMismatchError(
            f"the store's rows are {store.hooks[weights.hook].width} wide, the SAE's {weights.d_in}"
        )


def baselines(weights: SAEWeights, rows: RowSource, config: EvaluateConfig) -> dict[str, Replacement]:
    """PCA with k components, an untrained SAE, and the SAE of a random model where there is one."""
    sample_ND = np.concatenate(list(first_rows(rows(SAMPLE_ROWS), SAMPLE_ROWS)))[:SAMPLE_ROWS]
    untrained = untrained_weights(
        weights.d_in, weights.num_latents, weights.k, weights.mean_D, weights.variance, weights.hook,
        weights.host, config.seed, sample_ND=sample_ND,
    )  # fmt: skip
    found: dict[str, Replacement] = {
        "pca": fit_pca(rows(PCA_ROWS), min(weights.k, weights.d_in)),
        "untrained": SAEReplacement(untrained),
    }
    random_sae = config.random_sae
    if random_sae:
        other = load_sae(Path(random_sae))
        same_k = other.k == weights.k or "threshold" in (other.variant, weights.variant)  # there k is what came out
        if other.d_in != weights.d_in or not same_k:
            raise ModelMismatchError(
                f"evaluate.random_sae: expected width {weights.d_in} and k={weights.k}, got {other.d_in} and k={other.k}"
            )
        found["random_model"] = SAEReplacement(dataclasses.replace(other, host=weights.host))
    return found


def own_quality(random_sae: str) -> dict[str, Any] | None:
    """The random model's SAE on its own model's activations, where its store lies beside it."""
    store = Path(random_sae).parents[1] / "extract" / "activations.zarr"
    return reconstruction_on_store(load_sae(Path(random_sae)), ActivationStore(store)) if store.is_dir() else None
