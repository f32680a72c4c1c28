"""k-sparse probing: can a label be read from a few latents? (Gurnee et al. 2023, arXiv 2305.01610; SAEBench's task)

Every text is read by the model; the activations at the SAE's hook point and the latents are averaged over the unflagged
rows of its first window. Per class, against the rest, on the training part:

    best k latents: the largest |mean over the class - mean over the rest|; a logistic regression on these k

and on the held-out part accuracy and AUC, beside the same on the best k raw dimensions, the dense probe on all raw
dimensions, and the majority's share. Inputs of every probe are standardised by the training part.

B texts, D width, F latents, K chosen.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae import runtime
from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..corpus.documents import Document
from ..corpus.windows import windows
from ..llama.hooks import HookPoint
from ..llama.model import Model
from .evaluate import captured_rows
from .optional import needed

SETTING = "evaluate.probe"
LEAST_TEXTS = 4  # of a class: two to learn from, and at least one held out
MAX_ITERATIONS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Texts and their labels, in the order of the file."""

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """Means over the rows of each text: dense activations, and latents as (latent, mean) of those that fired."""

    x_BD: np.ndarray
    latents_B: list[np.ndarray]
    values_B: list[np.ndarray]
    kept_B: np.ndarray  # index of the text

    def columns(self, latents: np.ndarray) -> np.ndarray:
        """The means of the named latents, float32 (B, K)."""
        out_BK = np.zeros((len(self.kept_B), len(latents)), np.float32)
        order = np.argsort(latents)
        for row, (found, values) in enumerate(zip(self.latents_B, self.values_B, strict=True)):
            place = np.searchsorted(latents, found, sorter=order).clip(max=len(latents) - 1)
            hit = latents[order[place]] == found
            out_BK[row, order[place[hit]]] = values[hit]
        return out_BK

    def mean_latents(self, chosen_B: np.ndarray, num_latents: int) -> np.ndarray:
        """E[a_f] over the chosen texts, float64 (F,)."""
        rows = np.flatnonzero(chosen_B)
        found = np.concatenate([self.latents_B[r] for r in rows] or [np.empty(0, np.int64)])
        values = np.concatenate([self.values_B[r] for r in rows] or [np.empty(0)])
        return np.bincount(found, weights=values, minlength=num_latents) / max(1, len(rows))


def read_labelled(path: Path, *, text_key: str, label_key: str) -> Labelled:
    """The rows of a CSV with a header. ConfigError for a file that cannot be probed, saying what it lacks."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{SETTING}={path}: cannot be read as CSV ({error})") from None
    names = list(rows[0]) if rows else []
    for setting, key in (("probe_text", text_key), ("probe_label", label_key)):
        if key not in names:
            raise ConfigError(
                f"{SETTING}={path}: expected a column {key!r} (evaluate.{setting}), found {', '.join(map(str, names)) or 'none'}"
            )
    kept = [(row[text_key], row[label_key]) for row in rows if row[text_key] and row[label_key]]
    counts = Counter(label for _, label in kept)
    few = [label for label, count in counts.items() if count < LEAST_TEXTS]
    if len(counts) < 2 or few:
        found = ", ".join(f"{label} ({count})" for label, count in counts.items()) or "none"
        raise ConfigError(f"{SETTING}={path}: expected two or more labels with {LEAST_TEXTS} texts each, found {found}")
    return Labelled(texts=[text for text, _ in kept], labels=[label for _, label in kept])


def pool(
    model: Model,
    weights: SAEWeights,
    texts: Sequence[str],
    *,
    context_tokens: int,
    outlier_norm: float = 0.0,
    session: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pooled:
    """Run the texts through the model; those without an unflagged row in their first window are left out."""
    documents = [Document(name=str(i), text=text) for i, text in enumerate(texts)]
    table = windows(model, documents, context_tokens)
    starts = table.window_starts[:-1]
    first_W = np.flatnonzero(np.r_[True, table.doc_N[starts[1:]] != table.doc_N[starts[:-1]]])
    names = [int(info.name) for info in table.documents]
    found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    done = 0
    for part in captured_rows(
        model, table, first_W, HookPoint.parse(weights.hook), outlier_norm=outlier_norm, session=session
    ):
        doc_N = table.doc_N[part.row_N]
        idx_NK, vals_NK = runtime.encode(weights, part.x_ND)
        for doc in np.unique(doc_N):
            of = doc_N == doc
            found[names[doc]] = (part.x_ND[of].mean(axis=0, dtype=np.float64), *_mean_latents(idx_NK[of], vals_NK[of]))
        done += part.rows
        if progress is not None:
            progress(done, int(np.diff(table.window_starts)[first_W].sum()))
    if not found:
        raise ConfigError(f"{SETTING}: no text has a row at {weights.hook} that is not flagged; give longer texts")
    kept = sorted(found)
    return Pooled(
        x_BD=np.stack([found[i][0] for i in kept]).astype(np.float32),
        latents_B=[found[i][1] for i in kept],
        values_B=[found[i][2] for i in kept],
        kept_B=np.array(kept),
    )


def _mean_latents(idx_NK: np.ndarray, vals_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(latents that fired, ascending; their mean over all the rows)."""
    fired = vals_NK > 0
    latents, which = np.unique(idx_NK[fired], return_inverse=True)
    sums = np.bincount(which, weights=vals_NK[fired], minlength=len(latents))
    return latents.astype(np.int64), (sums / len(idx_NK)).astype(np.float32)


def held_out_split(labels_B: np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for the texts held out: of every label a share, at least one, at most all but two."""
    rng = np.random.default_rng(seed)
    test_B = np.zeros(len(labels_B), bool)
    for label in np.unique(labels_B):
        of = rng.permutation(np.flatnonzero(labels_B == label))
        test_B[of[: min(max(1, round(share * len(of))), len(of) - 2)]] = True
    return test_B


def probe(
    pooled: Pooled, labels: Sequence[str], num_latents: int, *, ks: Sequence[int], test_share: float, seed: int
) -> dict[str, Any]:
    """The numbers of this page, averaged over the classes (of two, one is the task) and for each of them in `tasks`.

    `labels` are those of all texts, also of those left out of `pooled`.
    """
    label_B = np.array(labels)[pooled.kept_B]
    counts = Counter(label_B.tolist())
    if len(counts) < 2 or min(counts.values()) < LEAST_TEXTS:
        raise ConfigError(
            f"{SETTING}: too few texts have rows that are not flagged ({dict(counts)}); give longer texts"
        )
    test_B = held_out_split(label_B, test_share, seed)
    classes = sorted(counts)
    tasks = {
        name: _task(pooled, label_B == name, test_B, num_latents, ks)
        for name in (classes[1:] if len(classes) == 2 else classes)
    }
    parts = ("majority", "dense", *(f"{kind}_top_{k}" for k in ks for kind in ("sae", "raw")))
    mean = {
        part: {m: float(np.mean([task[part][m] for task in tasks.values()])) for m in ("accuracy", "auc")}
        for part in parts
    }
    return {
        "texts": len(label_B),
        "left_out": len(labels) - len(label_B),
        "test_texts": int(test_B.sum()),
        "labels": dict(counts),
        "ks": list(ks),
        **mean,
        "tasks": tasks,
    }


def _task(
    pooled: Pooled, is_class_B: np.ndarray, test_B: np.ndarray, num_latents: int, ks: Sequence[int]
) -> dict[str, Any]:
    train_B = ~test_B
    larger = bool(is_class_B[train_B].mean() > 0.5)
    latent_gap_F = np.abs(
        pooled.mean_latents(train_B & is_class_B, num_latents) - pooled.mean_latents(train_B & ~is_class_B, num_latents)
    )
    x_BD = pooled.x_BD
    raw_gap_D = np.abs(x_BD[train_B & is_class_B].mean(axis=0) - x_BD[train_B & ~is_class_B].mean(axis=0))
    found: dict[str, Any] = {
        "majority": {"accuracy": float((is_class_B[test_B] == larger).mean()), "auc": 0.5},
        "dense": fit(x_BD, is_class_B, test_B),
    }
    best_F, best_D = (np.argsort(-gap, kind="stable")[: max(ks)] for gap in (latent_gap_F, raw_gap_D))
    for k in ks:
        found[f"sae_top_{k}"] = fit(pooled.columns(best_F[:k]), is_class_B, test_B)
        found[f"raw_top_{k}"] = fit(x_BD[:, best_D[:k]], is_class_B, test_B)
    return found | {"latents": best_F.tolist()}


def fit(inputs_BK: np.ndarray, is_class_B: np.ndarray, test_B: np.ndarray) -> dict[str, float]:
    """Accuracy and AUC on the held-out part of a logistic regression (L2, C = 1) on standardised inputs."""
    linear_model, scores = (needed(f"sklearn.{m}", SETTING) for m in ("linear_model", "metrics"))
    train_BK = inputs_BK[~test_B].astype(np.float64)
    mean_K, std_K = train_BK.mean(axis=0), train_BK.std(axis=0)
    scaled_BK = (inputs_BK - mean_K) / np.where(std_K > 0, std_K, 1)
    model = linear_model.LogisticRegression(max_iter=MAX_ITERATIONS).fit(scaled_BK[~test_B], is_class_B[~test_B])
    margin = model.decision_function(scaled_BK[test_B])
    return {
        "accuracy": float(((margin > 0) == is_class_B[test_B]).mean()),
        "auc": float(scores.roc_auc_score(is_class_B[test_B], margin)),
    }
