"""`ggscope evaluate`: how good an SAE is on held-out text, inside llama.cpp, beside its baselines."""

from __future__ import annotations

from pathlib import Path

from sae.latent_statistics import LatentStatistics

from ..evaluation.evaluate import evaluate, json_safe
from ..evaluation.fitted import fitted_baselines
from ..evaluation.latents import dictionary_summary, latent_columns
from ..evaluation.saebench import core_metrics, sparse_probing_metrics
from ..run import RunContext
from .corpora import window_table
from .evaluate_extras import measure_extras, open_extras, pool_texts
from .evaluate_files import EVALUATION_NAME, write
from .evaluate_rows import (
    documents_of_training,
    own_quality,
    say_measured,
    seen_in_training,
    training_rows,
    warn_other_corpus,
)
from .evaluate_text import numbers
from .evaluate_wired import evaluate_several
from .inputs import (
    check_host,
    counted,
    describe_model,
    load_sae,
    open_model,
    open_sae,
    open_store,
    outlier_norm,
    relative,
    session_options,
)


def run(context: RunContext) -> None:
    config = context.config.evaluate
    path, weights = open_sae(context, several=True)
    if weights.is_wired:
        evaluate_several(context, path, weights)
        return
    extras = open_extras(context, weights)
    statistics = LatentStatistics(weights.W_dec_FD)
    streamed = weights.training.get("source") == "stream" and not context.config.store.path
    store = open_store(context, weights) if config.baselines and not streamed else None
    if store is not None:
        warn_other_corpus(context, store)
    with open_model(context) as model:
        for sae in (weights, *(further.weights for further in extras.also)):
            check_host(context, sae, model)
        found = {}
        if config.baselines:
            random_model = load_sae(Path(config.random_sae)) if config.random_sae else None
            rows = training_rows(context, weights, model, store)
            found = fitted_baselines(weights, rows, config.seed, random_model)
        table = window_table(context, model, split="held_out", max_tokens=0)
        with context.progress("evaluating", say_measured(context, table)) as progress:
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
    trained_on = documents_of_training(weights) if streamed else store.iter_documents() if store is not None else None
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
