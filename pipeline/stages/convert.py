"""`ggscope convert`: a checkpoint or a published SAE to SAE GGUF, read back and verified; to other libraries' folders; a latent to a control vector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.control_vector import write_control_vector
from convert.interop.exporting import export_folder
from convert.sae_gguf import write_sae_gguf
from convert.verify import verify
from sae.errors import ConfigError
from sae.thresholds import to_thresholds
from sae.weights import SAEWeights

from ..evaluation.evaluate import captured_rows, take_windows
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..run import RunContext
from .corpora import window_table
from .cvector import direction
from .inputs import check_host, load_sae, open_model, outlier_norm, relative, sae_path, sae_sha256, session_options
from .published import check_width, import_published, is_published, measured, published_sha256, report_notes

GGUF_NAME = "sae.gguf"


def run(context: RunContext) -> None:
    config = context.config.convert
    imported = None
    if is_published(config):
        source, imported = import_published(config)
        weights = imported.weights
        report_notes(context, imported)
    else:
        source = Path(config.source).expanduser() if config.source else sae_path(context)
        weights = load_sae(source)
    if len(weights.ports) > 2 or (weights.ports and not weights.hook_out):
        raise ConfigError(f"convert verifies on rows of one hook point, {relative(source)} reads several")
    sha256 = published_sha256(source) if imported else sae_sha256(source)
    context.add_input("sae", source, sha256, **({"format": imported.format} if imported else {}))
    out = Path(config.out).expanduser() if config.out else context.folder / GGUF_NAME
    with open_model(context) as model:
        check_host(context, weights, model)
        probe = probe_rows(context, model, weights, config.probe_tokens)
        if imported:
            check_width(weights, probe, model)
            target = probe
            if weights.hook_out:
                target = probe_rows(context, model, replace(weights, hook=weights.hook_out), config.probe_tokens)
            weights = measured(imported, probe, target, model)
        vector = control_vector(context, weights, model) if config.latent >= 0 else None
    if config.thresholds != "none":
        weights = to_thresholds(weights, probe, config.thresholds)
    write_sae_gguf(out, weights, encoder_type=config.encoder_type, decoder_type=config.decoder_type)
    checked = verify(weights, out, probe)
    context.outputs["sae"] = str(out)
    if config.export:
        context.outputs["export"] = str(export_folder(context.folder / config.export, weights, config.export))
    context.metrics = checked | {"bytes": out.stat().st_size}
    context.three_lines(
        f"{relative(source)} ({f'{imported.format}, ' if imported else ''}sha256 {sha256[:12]}), {weights.num_latents} latents x {weights.d_in}",
        f"encoder {config.encoder_type}, decoder {config.decoder_type}, {out.stat().st_size / 1e6:.1f} MB; on {len(probe):,} rows FVU "
        f"{checked['fvu_source']:.4f} -> {checked['fvu_file']:.4f}, L0 {checked['l0']:.1f}, top-k overlap {checked['topk_overlap']:.4f}",
        " and ".join(relative(path) for path in (out, vector, context.outputs.get("export")) if path),
    )


def probe_rows(context: RunContext, model: Model, weights: SAEWeights, tokens: int) -> np.ndarray:
    """Fresh held-out activations at the SAE's hook, (N, D)."""
    table = window_table(context, model, split="held_out", max_tokens=0)
    chosen = take_windows(table, np.arange(table.n_windows), tokens)
    hook = HookPoint.parse(weights.hook)
    parts = captured_rows(
        model, table, chosen, hook, outlier_norm=outlier_norm(weights), session=session_options(context.config.model)
    )
    return np.concatenate([part.x_ND for part in parts])


def control_vector(context: RunContext, weights: SAEWeights, model: Model) -> Path:
    """`coeff * W_dec[latent]` as a stock control vector for the block of the SAE's hook."""
    config = context.config.convert
    if config.latent >= weights.num_latents:
        raise ConfigError(f"convert.latent={config.latent}: this SAE has latents 0..{weights.num_latents - 1}")
    block, direction_D = direction(weights, [config.latent], [config.coeff])
    path = context.folder / f"latent_{config.latent}.gguf"
    write_control_vector(path, {block: direction_D}, model_hint=model.id.architecture, n_layer=model.n_layer)
    context.outputs["control_vector"] = str(path)
    return path
