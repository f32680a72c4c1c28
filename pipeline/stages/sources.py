"""What `convert` reads: an SAE of ours or a published one, with its hash, and rows of its hook point to try it on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from convert.interop.building import Imported
from sae.weights import SAEWeights

from ..config import ConvertConfig
from ..corpus.encoding import bos_of
from ..evaluation.evaluate import captured_rows, take_windows, window_order
from ..evaluation.proof import proof
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..run import RunContext
from .corpora import window_table
from .inputs import check_host, check_one_point, load_sae, outlier_norm, relative, sae_path, sae_sha256, session_options
from .published import (
    UNNAMED,
    check_width,
    import_published,
    is_published,
    measured,
    published_sha256,
    report_bos,
    report_notes,
    report_proof,
)
from .sae_files import located


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One SAE to be written: `imported` says how a published one came in."""

    path: Path
    sha256: str
    weights: SAEWeights
    imported: Imported | None = None
    proof: dict[str, float] = field(default_factory=dict)  # of a published one, once it was tried

    @property
    def named(self) -> str:
        kind = f"{self.imported.format}, " if self.imported else ""
        return f"{relative(self.path)} ({kind}sha256 {self.sha256[:12]}), {self.weights.num_latents} latents x {self.weights.d_in}"


def open_sources(context: RunContext, config: ConvertConfig, first: str) -> list[Source]:
    """The SAE of `first` ("": of the newest training) and those of `convert.also`, noted as inputs of the run."""
    sources = [open_source(context, first, config), *(open_source(context, name, UNNAMED) for name in config.also)]
    for i, source in enumerate(sources):
        format_ = {"format": source.imported.format} if source.imported else {}
        context.add_input(f"also_{i - 1}" if i else "sae", source.path, source.sha256, **format_)
    return sources


def open_source(context: RunContext, name: str, config: ConvertConfig) -> Source:
    """ConfigError for SAEs over several hook points."""
    if name and is_published(name, config):
        path, imported = import_published(name, config)
        report_notes(context, imported)
        source = Source(path=path, sha256=published_sha256(path), weights=imported.weights, imported=imported)
    else:
        path = located(name) if name else sae_path(context)
        source = Source(path=path, sha256=sae_sha256(path), weights=load_sae(path))
    check_one_point(source.weights, source.path, transcoders=True)
    return source


def tried(context: RunContext, model: Model, source: Source, tokens: int) -> tuple[Source, np.ndarray]:
    """The SAE with what its files left open measured on the rows of its hook point, and these rows (N, D)."""
    weights = source.weights
    check_host(context, weights, model)
    probe_ND, row_N = probe_rows(context, model, weights, tokens)
    if source.imported is None:
        return source, probe_ND
    check_width(weights, probe_ND, model)
    target_NO = probe_ND
    if weights.hook_out:
        out_NO, out_row_N = probe_rows(context, model, replace(weights, hook=weights.hook_out), tokens)
        _, here_N, there_N = np.intersect1d(row_N, out_row_N, assume_unique=True, return_indices=True)
        probe_ND, target_NO = probe_ND[here_N], out_NO[there_N]
    weights = measured(source.imported, probe_ND, target_NO, model)
    found = proof(weights, probe_ND, target_NO)
    report_proof(context, source.imported, found, model.id.name)
    report_bos(context, source.imported, bos_of(model, context.config.corpus.bos) is not None)
    return replace(source, weights=weights, proof=found), probe_ND


def probe_rows(context: RunContext, model: Model, weights: SAEWeights, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Fresh held-out activations at the SAE's hook, (N, D), and which rows of the text they are, (N,): windows spread over
    all documents."""
    table = window_table(context, model, split="held_out", max_tokens=0)
    chosen = take_windows(table, window_order(table), tokens)
    hook = HookPoint.parse(weights.hook)
    parts = list(
        captured_rows(
            model,
            table,
            chosen,
            hook,
            outlier_norm=outlier_norm(weights),
            session=session_options(context.config.model),
        )
    )
    return np.concatenate([part.x_ND for part in parts]), np.concatenate([part.row_N for part in parts])
