"""`ggscope convert verify FILE`: the SAEs of a GGUF file against what they were made from, on fresh rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.sae_gguf import entry_hooks, read_sae_gguf, sae_file_info
from convert.verify import allowed, verify
from sae.errors import ConfigError
from sae.thresholds import MODES, to_thresholds
from sae.weights import SAEWeights

from ..config import ConvertConfig
from ..run import RunContext, file_sha256, read_manifest
from .inputs import newest_output, open_model, relative, run_of_sae
from .sae_files import GGUF, entry_number, located, split_entry
from .sources import Source, open_sources, tried

FROM_THE_RUN = ("format", "hook", "hook_out", "thresholds", "probe_tokens")


def check_file(context: RunContext) -> None:
    """Raises CheckFailedError (exit code 3) where an SAE of the file is further from its source than its types allow."""
    path = located(context.config.sae.path or newest_output(context, "convert", "sae", "SAE GGUF"))
    file, named = split_entry(path)
    if file.suffix != GGUF:
        raise ConfigError(f"{relative(path)} is no SAE GGUF; verify a file that `ggscope convert` wrote")
    entries = [entry_number(file, named)] if named else list(range(len(entry_hooks(file))))
    config, first = origin(context, file, entries)
    sources = open_sources(context, config, first)
    if len(sources) != len(entries):
        raise ConfigError(
            f"{relative(path)} holds {len(entries)} SAEs, got {len(sources)} to compare them with; name them in its order "
            "with convert.source= and convert.also=[...]"
        )
    sha256 = file_sha256(file)
    context.add_input("file", path, sha256)
    reports, rows = [], []
    with open_model(context) as model:
        for entry, source in zip(entries, sources, strict=True):
            stored = read_sae_gguf(file, entry)
            source, probe_ND = tried(context, model, source, config.probe_tokens)
            weights = source.weights
            if config.thresholds != "none":
                weights = to_thresholds(weights, probe_ND, config.thresholds)
            reports.append(verify(as_written(weights, source, stored), file, probe_ND, entry))
            rows.append(len(probe_ND))
    context.metrics = reports[0] | {"entries": reports, "verified": True}
    info = sae_file_info(file, entries[0])
    limit = allowed(info.encoder_type, info.decoder_type)
    context.three_lines(
        f"{relative(path)} (sha256 {sha256[:12]}) against {'; '.join(source.named for source in sources)}",
        f"encoder {info.encoder_type}, decoder {info.decoder_type}; {said(reports, [s.weights for s in sources], rows)}; "
        f"allowed: FVU +-{limit.fvu:g}, overlap {limit.overlap:g} or more",
        "they match; nothing was written",
    )


def origin(context: RunContext, file: Path, entries: list[int]) -> tuple[ConvertConfig, str]:
    """The settings to read the sources with, and the first of them: those named, of the run that wrote `file`, of its training."""
    config = context.config.convert
    if config.source:
        return config, config.source
    manifest = read_manifest(file.parent) or {}
    inputs = manifest.get("inputs")
    if manifest.get("command") == "convert" and isinstance(inputs, dict):
        paths = [place(inputs, "sae" if i == 0 else f"also_{i - 1}") for i in entries]
        if all(paths):
            return replace(config, also=paths[1:], **settings_of_run(manifest)), paths[0]
    if len(entries) > 1:
        raise ConfigError(f"name what {relative(file)} was made from: convert.source=SAE convert.also=[SAE,...]")
    weights = read_sae_gguf(file, entries[0])
    if weights.training.get("id") is None:
        raise ConfigError(f"name what {relative(file)} was made from: convert.source=SAE")
    return config, run_of_sae("train", weights)["sae"]


def place(inputs: Mapping[str, Any], name: str) -> str:
    found = inputs.get(name)
    return str(found.get("path", "")) if isinstance(found, dict) else ""


def settings_of_run(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the run that wrote the file read its source."""
    found = manifest.get("config", {}).get("convert", {})
    kept = {key: found[key] for key in FROM_THE_RUN if type(found.get(key)) is type(getattr(ConvertConfig(), key))}
    if kept.get("thresholds", "none") not in ("none", *MODES):
        del kept["thresholds"]
    return kept


def as_written(weights: SAEWeights, source: Source, stored: SAEWeights) -> SAEWeights:
    """The source with what a file adds to it: labels; of a published SAE also what was measured when it was written."""
    weights = replace(weights, labels=stored.labels)
    if source.imported is None or stored.mean_D.shape != weights.mean_D.shape:
        return weights
    k = weights.k if source.imported.k_known else stored.k
    return replace(weights, mean_D=stored.mean_D, variance=stored.variance, k=k)


def said(reports: Sequence[Mapping[str, float]], weights: Sequence[SAEWeights], rows: Sequence[int]) -> str:
    """The numbers of a comparison, by hook point where there are several. What a transcoder should reconstruct is not
    among the rows: of it, how far its output moved."""
    return "; ".join(
        f"{f'{w.hook}: ' if len(reports) > 1 else ''}on {n:,} probe rows {_fvu_said(r, w)}, "
        f"L0 {r['l0_source']:.1f} -> {r['l0']:.1f}, top-k overlap {r['topk_overlap']:.4f}"
        for r, w, n in zip(reports, weights, rows, strict=True)
    )


def _fvu_said(report: Mapping[str, float], weights: SAEWeights) -> str:
    if weights.hook_out:
        return f"its output has FVU {report['fvu_file']:.1e} against the source's output"
    return f"FVU {report['fvu_source']:.4f} -> {report['fvu_file']:.4f}"
