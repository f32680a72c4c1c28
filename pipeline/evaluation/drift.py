"""How far one SAE drifts over quantisations of its model, itself in each type of a file.

A form is the SAE with both matrices in types of the GGUF file, encoded as `apply` does (drift_forms.py). Of every
form on every model:

    fvu, l0        on that model's own activations
    top_k_overlap  of the form on that model with the float32 equations on the reference model, at the same tokens
    ce_recovered, delta_ce_nats, kl    of splicing the form into that model, against that model's clean run
    activation_fvu of the model: sum ||x - x_ref||^2 / sum ||x_ref - mean||^2, its activations against the reference's

N rows, D width, K slots, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.sae_gguf import matrix_bytes
from pipeline.config import DriftConfig
from pipeline.corpus.windows import WindowTable
from pipeline.llama.hooks import HookPoint
from pipeline.llama.identity import UNKNOWN_TYPE
from pipeline.llama.model import Model
from sae import runtime
from sae.errors import ConfigError
from sae.metrics import Moments, ReconstructionMetrics, mean_overlap, squared_errors, top_k_overlap
from sae.weights import SAEWeights

from .baselines import ConstantReplacement, SAEReplacement
from .drift_forms import Form, groups_of, running
from .evaluate import captured_rows, clusters_of, take_windows, window_order
from .measure import MEAN, ZERO, json_safe, quality, run_losses
from .splice import CLEAN, SpliceConfig, SpliceResult, splice, split_windows


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencePart:
    """A few windows of the reference model: rows of the table, activations, latents by the float32 equations."""

    row_N: np.ndarray
    x_ND: np.ndarray
    code: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every model: the SAE, the text, how sessions are made."""

    weights: SAEWeights
    table: WindowTable
    config: DriftConfig
    outlier_norm: float = 0.0
    session: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order_W(self) -> np.ndarray:
        return window_order(self.table, self.config.seed)

    def captured(self, model: Model) -> Iterator[Any]:
        """The unflagged rows of at most `config.tokens`, in the same parts for every model."""
        chosen_W = take_windows(self.table, self.order_W, self.config.tokens)
        hook = HookPoint.parse(self.weights.hook)
        return captured_rows(model, self.table, chosen_W, hook, outlier_norm=self.outlier_norm, session=self.session)


def capture_reference(setting: Setting, model: Model) -> list[ReferencePart]:
    """The rows every model is held against."""
    parts = [
        ReferencePart(row_N=part.row_N, x_ND=part.x_ND, code=runtime.encode(setting.weights, part.x_ND))
        for part in setting.captured(model)
    ]
    if sum(len(part.row_N) for part in parts) < 2:
        raise ConfigError(
            "every held-out row is flagged (BOS, special, first, outlier, not finite); give a longer corpus"
        )
    return parts


def measure_model(
    setting: Setting,
    model: Model,
    forms: Sequence[Form],
    reference: Sequence[ReferencePart],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`activation_fvu`, `ce_clean`, ... of the model and under `forms` the numbers of each form. JSON-able."""
    found: dict[str, Any] = {"activation_fvu": activation_fvu(reference, setting.captured(model)), "forms": []}
    for group in groups_of(forms, setting.weights, setting.config.copies_bytes):
        saes = {
            form.name: running(form, setting.weights, setting.config.encoder, model, setting.session) for form in group
        }
        rows = reconstruct(setting, model, saes, reference)
        losses = spliced(setting, model, saes, progress)
        cluster_N, kind = clusters_of(losses)
        ce = {name: float(values.mean()) if len(values) else float("nan") for name, values in losses.ce.items()}
        found |= {f"ce_{name}": ce[name] for name in (CLEAN, ZERO, MEAN)}
        found |= {"splice_rows": len(losses.document_N), "clusters": len(np.unique(cluster_N)), "cluster_kind": kind}
        found["forms"] += [
            {
                "types": form.name, "encoder_type": form.encoder_type, "decoder_type": form.decoder_type,
                "encoder": saes[form.name].encoder.name,
                "matrix_bytes": matrix_bytes(setting.weights, form.encoder_type, form.decoder_type),
                **rows[form.name], "ce_sae": ce[form.name], **run_losses(losses, form.name, cluster_N),
            }
            for form in group
        ]  # fmt: skip
    return json_safe(found)


def activation_fvu(reference: Sequence[ReferencePart], parts: Iterator[Any]) -> float:
    """sum ||x - x_ref||^2 / sum ||x_ref - mean||^2 over the rows that neither model flags."""
    moved, moments = 0.0, Moments(reference[0].x_ND.shape[1])
    for ours, theirs in zip(parts, reference, strict=True):
        _, a, b = np.intersect1d(ours.row_N, theirs.row_N, assume_unique=True, return_indices=True)
        moved += float(squared_errors(ours.x_ND[a], theirs.x_ND[b]).sum())
        moments.update(theirs.x_ND[b])
    return moved / moments.scatter if moments.scatter else float("nan")


def reconstruct(
    setting: Setting, model: Model, saes: Mapping[str, SAEReplacement], reference: Sequence[ReferencePart]
) -> dict[str, dict[str, Any]]:
    """Reconstruction on the model's own rows, and the overlap with the reference's latents, of each SAE."""
    d_in, num_latents = setting.weights.d_in, setting.weights.num_latents
    metrics = {name: ReconstructionMetrics(d_in, num_latents) for name in saes}
    overlaps: dict[str, list[np.ndarray]] = {name: [] for name in saes}
    for part, theirs in zip(setting.captured(model), reference, strict=True):
        _, a, b = np.intersect1d(part.row_N, theirs.row_N, assume_unique=True, return_indices=True)
        for name, sae in saes.items():
            idx_NK, vals_NK = sae.code(part.x_ND)
            metrics[name].update(part.x_ND, sae.decode(idx_NK, vals_NK, part.x_ND), idx_NK, vals_NK)
            same = theirs.code[0][b], theirs.code[1][b]
            overlaps[name].append(top_k_overlap((idx_NK[a], vals_NK[a]), same))
    return {
        name: quality(metrics[name])
        | {"rows": metrics[name].rows, "top_k_overlap": mean_overlap(np.concatenate(overlaps[name]))}
        for name in saes
    }


def spliced(
    setting: Setting, model: Model, saes: Mapping[str, SAEReplacement], progress: Callable[[int], None] | None
) -> SpliceResult:
    weights, table = setting.weights, setting.table
    windows = split_windows(table)
    return splice(
        model,
        [windows[i] for i in take_windows(table, setting.order_W, setting.config.splice_tokens)],
        {
            **saes,
            MEAN: ConstantReplacement(weights.mean_D),
            ZERO: ConstantReplacement(np.zeros(weights.d_in)),
        },
        HookPoint.parse(weights.hook),
        config=SpliceConfig(outlier_norm=setting.outlier_norm, session=setting.session),
        progress=progress,
    )


def with_names(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The models under the shortest name that tells them apart: quantisation, else file; the first is the reference."""
    kinds = [one["file_type"] for one in found]
    names = (
        kinds
        if len(set(kinds)) == len(kinds) and UNKNOWN_TYPE not in kinds
        else [Path(one["file"]).stem for one in found]
    )
    names = names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names)]
    return {"reference": names[0], "models": [{"name": name} | one for name, one in zip(names, found, strict=True)]}
