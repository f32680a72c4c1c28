"""The evaluation of an SAE on held-out windows: reconstruction, and what the model loses on it, beside baselines.

N rows, D width, F latents, K active.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig
from pipeline.corpus.windows import FLAGS_ALL, WindowTable
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from pipeline.store.reader import ActivationStore
from sae import runtime
from sae.errors import ConfigError
from sae.latent_statistics import LatentStatistics
from sae.metrics import ReconstructionMetrics, density_histogram
from sae.weights import SAEWeights

from .baselines import ConstantReplacement, Replacement, SAEReplacement
from .joint import Further, JointRuns
from .measure import MEAN, RUN_KEYS, SAE, ZERO, json_safe, measured, quality, recovered, run_losses
from .splice import CLEAN, SpliceConfig, SpliceResult, TokenWindow, batches, splice, split_windows

__all__ = [
    "CapturedRows",
    "captured_rows",
    "clusters_of",
    "evaluate",
    "json_safe",
    "reconstruction_on_store",
    "recovered",
    "store_rows",
    "take_windows",
    "window_order",
]

FEW_DOCUMENTS = 10  # below, a t interval over documents says little: windows are the clusters
STORE_CHUNK_ROWS = 16_384

Progress = Callable[[str, int, int], None]  # what, rows done, rows in all


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedRows:
    """The unflagged rows of a few windows: activations, and where they stand in the table."""

    x_ND: np.ndarray
    row_N: np.ndarray  # index into the table's columns
    rows: int  # flagged ones included


def evaluate(
    model: Model,
    weights: SAEWeights,
    windows: WindowTable,
    *,
    config: EvaluateConfig,
    baselines: Mapping[str, Replacement],
    also: Sequence[Further] = (),
    statistics: LatentStatistics | None = None,
    outlier_norm: float = 0.0,
    session: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every number of the evaluation, as JSON-able values (None where a number cannot be had).

    At most `config.tokens` rows give the reconstruction metrics (`fvu`, `l0`, `dead_share`, `cosine`, `rows`,
    `density_histogram`, ...); at most `config.splice_tokens` rows give

        ce_recovered  = (CE_zero - CE_sae) / (CE_zero - CE_clean)      with its 95 % interval `ce_recovered_ci95`;
                                                                       ce_recovered_mean: CE_mean for CE_zero
        delta_ce_nats = CE_sae - CE_clean per token                    with its 95 % interval `delta_ce_ci95`
        kl            = mean KL(clean || sae) per token, nats          with `kl_ci95`

    and the same for each of `baselines` and for mean and zero ablation under `baselines`. `also` are SAEs at other
    hook points: `joint` holds the numbers of the model running on all reconstructions at once (joint.py).
    `statistics` is filled with what each latent does on the reconstruction rows. `same_rows` holds the SAE's
    reconstruction metrics on the spliced rows, comparable with the baselines'. Intervals cluster by document, or by
    window where there are fewer than ten documents (`cluster_kind`). Windows are taken in an order drawn from
    `config.seed`. Rows whose norm exceeds `outlier_norm` (the store's outlier threshold) and rows that are not finite
    are flagged beside those the table flags; `session` holds further arguments of Session.
    """
    hook = HookPoint.parse(weights.hook)
    order_W = window_order(windows, config.seed)
    chosen_W = take_windows(windows, order_W, config.tokens)
    together = JointRuns(weights, also) if also else None
    result = _reconstruction(model, weights, windows, chosen_W, statistics, outlier_norm, session or {}, progress)

    spliced = spliced_windows(windows, order_W, config.splice_tokens)
    width = weights.d_in
    runs: dict[str, Replacement] = {
        SAE: SAEReplacement(weights),
        **baselines,
        MEAN: ConstantReplacement(weights.mean_D),
        ZERO: ConstantReplacement(np.zeros(width)),
    }
    metrics = {name: ReconstructionMetrics(width, max(1, run.num_latents)) for name, run in runs.items()}
    losses = splice(
        model,
        spliced,
        {name: measured(run, metrics[name]) for name, run in runs.items()},
        hook,
        joint=together.runs if together else {},
        config=SpliceConfig(
            outlier_norm=outlier_norm,
            outlier_norms=together.outlier_norms if together else {},
            session=session or {},
        ),
        progress=counted(progress, "splice", sum(len(w.tokens) for w in spliced)),
    )
    result |= spliced_numbers(losses, metrics)
    if together:
        own = {key: result[key] for key in RUN_KEYS} | result["same_rows"]
        result["joint"] = together.result(losses, clusters_of(losses)[0], own)
    return json_safe(result)


def window_order(table: WindowTable, seed: int = 0) -> np.ndarray:
    """The windows in the order in which they are taken until there are enough rows: spread over all documents."""
    return np.random.default_rng(seed).permutation(table.n_windows)


def take_windows(table: WindowTable, order_W: np.ndarray, rows: int) -> np.ndarray:
    """Windows in the given order until `rows` rows are reached (0: all), then sorted."""
    lengths_W = np.diff(table.window_starts)[order_W]
    n = len(order_W) if rows <= 0 else int(np.searchsorted(np.cumsum(lengths_W), rows, side="left")) + 1
    return np.sort(order_W[:n])


def spliced_windows(table: WindowTable, order_W: np.ndarray, rows: int) -> list[TokenWindow]:
    """The windows that CE is measured on."""
    every = split_windows(table)
    return [every[i] for i in take_windows(table, order_W, rows)]


def counted(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """Calls `progress` with the sum of the rows it is given."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(what, done, total)

    return advance


def captured_rows(
    model: Model,
    table: WindowTable,
    chosen_W: np.ndarray,
    hook: HookPoint,
    *,
    outlier_norm: float = 0.0,
    batch_tokens: int = 1024,
    session: Mapping[str, Any] | None = None,
) -> Iterator[CapturedRows]:
    """The unflagged, finite rows of the chosen windows at `hook`, captured through llama.cpp a few windows at a time."""
    lengths_W = np.diff(table.window_starts)[chosen_W]
    rows = max(batch_tokens, int(lengths_W.max(initial=1)))
    cut = [TokenWindow(tokens=table.window_tokens(w), flags=np.empty(0), document=int(w)) for w in chosen_W]
    groups = list(batches(cut, rows))
    if not groups:
        return
    together = max(map(len, groups))
    llama = Session(
        model,
        n_ctx=together * int(lengths_W.max()),
        n_batch=rows,
        n_seq_max=together,
        kv_unified=False,
        **dict(session or {}),
    )
    try:
        for group in groups:
            captured = capture(llama, [w.tokens for w in group], [hook])
            x_ND = np.concatenate([c[str(hook)] for c in captured])
            row_N = np.concatenate([np.arange(*table.window_starts[w.document : w.document + 2]) for w in group])
            keep_N = ((table.flags_N[row_N] & FLAGS_ALL) == 0) & np.isfinite(x_ND).all(axis=1)
            if outlier_norm > 0:
                keep_N &= np.linalg.norm(x_ND, axis=1) <= outlier_norm
            yield CapturedRows(x_ND=x_ND[keep_N], row_N=row_N[keep_N], rows=len(row_N))
    finally:
        llama.close()


def store_rows(store: ActivationStore, hook: str, max_rows: int = 0) -> Iterator[np.ndarray]:
    """Unflagged rows of a store, chunk by chunk, spread evenly over it where `max_rows` (0: all) cuts them."""
    chunks = range(0, store.n_rows, STORE_CHUNK_ROWS)
    step = max(1, math.ceil(store.n_rows / max_rows)) if max_rows > 0 else 1
    flags_N = store.column("flags")
    for start in list(chunks)[::step]:
        stop = min(start + STORE_CHUNK_ROWS, store.n_rows)
        yield store.rows(hook, start, stop)[(flags_N[start:stop] & FLAGS_ALL) == 0]


def reconstruction_on_store(weights: SAEWeights, store: ActivationStore, max_rows: int = 100_000) -> dict[str, Any]:
    """Reconstruction metrics of an SAE on a store's own rows (for the random model's SAE: on its own model)."""
    metrics = ReconstructionMetrics(weights.d_in, weights.num_latents)
    run = measured(SAEReplacement(weights), metrics)
    for x_ND in store_rows(store, weights.hook, max_rows):
        run(x_ND)
    return {key: value for key, value in metrics.result().items() if key != "density_F"}


def _reconstruction(
    model: Model,
    weights: SAEWeights,
    table: WindowTable,
    chosen_W: np.ndarray,
    statistics: LatentStatistics | None,
    outlier_norm: float,
    session: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    metrics = ReconstructionMetrics(weights.d_in, weights.num_latents)
    hook = HookPoint.parse(weights.hook)
    captured = int(np.diff(table.window_starts)[chosen_W].sum())
    advance = counted(progress, "reconstruct", captured)
    for part in captured_rows(model, table, chosen_W, hook, outlier_norm=outlier_norm, session=session):
        if len(part.x_ND):
            idx_NK, vals_NK = runtime.encode(weights, part.x_ND)
            x_hat_ND = runtime.decode(weights, idx_NK, vals_NK, part.x_ND)
            metrics.update(part.x_ND, x_hat_ND, idx_NK, vals_NK)
            if statistics is not None:
                statistics.update(part.x_ND, x_hat_ND, idx_NK, vals_NK, runtime.sigma(weights, part.x_ND))
        advance(part.rows)
    if metrics.rows == 0:
        raise ConfigError(
            "every held-out row is flagged (BOS, special, first, outlier, not finite); give a longer corpus"
        )
    result = metrics.result()
    return split_numbers(result, weights.num_latents, captured) | {"scatter": metrics.moments.scatter}


def split_numbers(result: Mapping[str, Any], num_latents: int, captured: int) -> dict[str, Any]:
    """Reconstruction metrics as they are reported; `captured`: rows, flagged ones included."""
    counts_B, edges_B1, dead = density_histogram(result["density_F"])
    histogram = {"log10_edges": np.log10(edges_B1).tolist(), "counts": counts_B.tolist(), "dead": dead}
    return {key: value for key, value in result.items() if key != "density_F"} | {
        "num_latents": num_latents,
        "captured_rows": captured,
        "flagged_share": 1 - result["rows"] / captured,
        "density_histogram": histogram,
    }


def clusters_of(losses: SpliceResult) -> tuple[np.ndarray, str]:
    """Which rows an interval takes as one, (N,), and what that is: documents, or windows where those are few."""
    by_document = len(np.unique(losses.document_N)) >= FEW_DOCUMENTS
    return (losses.document_N, "document") if by_document else (losses.window_N, "window")


def spliced_numbers(losses: SpliceResult, metrics: Mapping[str, ReconstructionMetrics]) -> dict[str, Any]:
    """What the model loses in the runs of `metrics`, SAE, MEAN and ZERO among them, beside the clean run."""
    cluster_N, kind = clusters_of(losses)
    ce = {name: float(values.mean()) if len(values) else math.nan for name, values in losses.ce.items()}
    rows = {name: run_losses(losses, name, cluster_N) | quality(metrics[name]) for name in metrics}
    return {
        **{key: rows[SAE][key] for key in RUN_KEYS},
        **{f"ce_{name}": ce[name] for name in (CLEAN, SAE, MEAN, ZERO)},
        "same_rows": quality(metrics[SAE]),
        "splice_rows": len(losses.document_N),
        "splice_flagged_share": losses.flagged_rows / losses.rows,
        "documents": len(np.unique(losses.document_N)),
        "clusters": len(np.unique(cluster_N)),
        "cluster_kind": kind,
        "baselines": {name: row for name, row in rows.items() if name != SAE},
    }
