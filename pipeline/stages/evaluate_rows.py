"""What the SAE that is evaluated was trained on: rows to fit the baselines on, documents that should not be held out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sae.errors import ConfigError, ModelMismatchError
from sae.weights import SAEWeights

from ..corpus.windows import WindowTable
from ..evaluation.evaluate import captured_rows, reconstruction_on_store, store_rows, take_windows, window_order
from ..evaluation.fitted import RowSource, first_rows
from ..evaluation.linear import PairSource
from ..evaluation.ports import ports_of, side_by_side
from ..evaluation.wired import limits_of, rows_at
from ..llama.hooks import HookPoint
from ..llama.identity import check_same_model
from ..llama.model import Model
from ..run import RunContext, runs_of
from ..store.reader import ActivationStore
from ..store.schema import DOCS_FILE
from .corpora import window_table
from .inputs import load_sae, outlier_norm, session_options

NAMED = 3  # documents in a warning
SOURCE_KEYS = (
    "kind",
    "paths",
    "dataset",
    "dataset_config",
    "dataset_split",
)  # of the corpus: where documents come from
STREAM_ROWS = 65_536  # of the training split, captured again where there was no store


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


def training_pairs(context: RunContext, weights: SAEWeights, model: Model, store: ActivationStore | None) -> PairSource:
    """`training_rows` of an SAE over several hook points: what it reads and what it reconstructs, side by side."""
    inputs, outputs = ports_of(weights)
    names = list(dict.fromkeys(name for name, _ in (*inputs, *outputs)))

    def pair(found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        acts = {HookPoint.parse(name): x_ND for name, x_ND in found.items()}
        return side_by_side(inputs, acts), side_by_side(outputs, acts)

    if store is not None:
        check_store(weights, store, model)
        return lambda rows: (
            pair(dict(zip(names, parts, strict=True)))
            for parts in zip(*(store_rows(store, name, rows) for name in names), strict=True)
        )

    def captured(_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        table = window_table(context, model, max_tokens=STREAM_ROWS)
        session, limits = session_options(context.config.model), limits_of(weights)
        with context.progress("capturing rows for the baselines", table.rows) as progress:
            done = 0
            for rows, found in rows_at(model, table, np.arange(table.n_windows), names, limits, session):
                done += rows
                progress(done)
                yield pair(found)

    return captured


def check_store(weights: SAEWeights, store: ActivationStore, model: Model) -> None:
    """Refuse a store whose rows are not those of the SAE's hook points in this model."""
    check_same_model(store.meta.model, model.id, what="this store")
    for hook, width in {port for ports in ports_of(weights) for port in ports}:
        if hook not in store.hooks:
            raise ConfigError(
                f"the store holds {', '.join(store.hooks)}, the SAE belongs to {hook}; name its store with store.path"
            )
        if store.hooks[hook].width != width:
            raise ModelMismatchError(
                f"the store's rows are {store.hooks[hook].width} wide at {hook}, the SAE's {width}"
            )


def say_measured(context: RunContext, table: WindowTable) -> int:
    """Print how many held-out tokens will be measured: whole windows, so a few more than asked for. Returns the first number."""
    config, lengths_W = context.config.evaluate, np.diff(table.window_starts)
    order_W = window_order(table, config.seed)
    rows, spliced = (
        int(lengths_W[take_windows(table, order_W, asked)].sum()) for asked in (config.tokens, config.splice_tokens)
    )
    context.console.print(
        f"measuring {rows:,} of {table.rows:,} held-out tokens (evaluate.tokens), CE on {spliced:,} (evaluate.splice_tokens)",
        style="dim", highlight=False,
    )  # fmt: skip
    return rows


def documents_of_training(weights: SAEWeights) -> Iterator[dict[str, Any]] | None:
    """The documents of a streamed training, one after another; None where its run folder is not found."""

    def read(path: Path) -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    for folder, manifest in runs_of("train"):
        path = folder / DOCS_FILE
        if manifest.get("metrics", {}).get("sae_id") == weights.training.get("id") and path.is_file():
            return read(path)
    return None


def seen_in_training(context: RunContext, documents: Iterable[dict[str, Any]] | None, table: WindowTable) -> int | None:
    """Held-out documents whose text was trained on too: none, unless the training took another split. None where it is not
    known what was trained on."""
    if documents is None:
        return None
    held_out = {document.sha256 for document in table.documents}
    trained = {document["sha256"] for document in documents if document["sha256"] in held_out}
    found = [document.name for document in table.documents if document.sha256 in trained]
    seen = len(found)
    if seen:
        names = ", ".join(found[:NAMED]) + (", ..." if seen > NAMED else "")
        context.console.print(
            f"warning: {seen} of {len(table.documents)} evaluation documents were trained on: the same text is in both ({names})",
            style="yellow",
            markup=False,
            highlight=False,
        )
    return seen


def warn_other_corpus(context: RunContext, store: ActivationStore) -> None:
    """A line where the training's rows came from other documents than those that are held out here."""
    now = asdict(context.config.corpus)
    for _, manifest in runs_of("extract"):
        if manifest.get("outputs", {}).get("store") != str(store.path):
            continue
        config = manifest.get("config")
        if not isinstance(config, dict) or not isinstance(then := config.get("corpus"), dict):
            continue
        other = [key for key in SOURCE_KEYS if then.get(key) != now[key]]
        if other:
            given = " ".join(f"corpus.{key}={then.get(key)}" for key in other)
            context.console.print(
                f"warning: measured on corpus.kind={now['kind']}, the SAE was trained on other documents: {given}",
                style="yellow", markup=False, highlight=False,
            )  # fmt: skip
        return


def own_quality(random_sae: str) -> dict[str, Any] | None:
    """The random model's SAE on its own model's activations, where its store lies beside it."""
    store = Path(random_sae).parents[1] / "extract" / "activations.zarr"
    return reconstruction_on_store(load_sae(Path(random_sae)), ActivationStore(store)) if store.is_dir() else None
