"""`ggscope convert`: SAEs to one SAE GGUF, read back and verified; to other libraries' folders; a latent to a control vector.

`ggscope convert verify FILE`: a file that is there, held against what it was made from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert.control_vector import write_control_vector
from convert.interop.exporting import export_folder
from convert.sae_gguf import write_sae_gguf
from convert.verify import verify
from sae.errors import ConfigError
from sae.thresholds import to_thresholds
from sae.weights import SAEWeights

from ..llama.model import Model
from ..run import RunContext
from .convert_verify import check_file, said
from .cvector import direction
from .inputs import open_model, relative
from .sae_files import split_entry, with_labels
from .sources import open_sources, tried

GGUF_NAME = "sae.gguf"


def run(context: RunContext) -> None:
    if context.verb == "verify":
        check_file(context)
    else:
        write_file(context)


def write_file(context: RunContext) -> None:
    config = context.config.convert
    sources = open_sources(context, config, config.source or context.config.sae.path)
    if config.labels:
        weights = with_labels(sources[0].weights, Path(config.labels).expanduser())
        sources[0] = replace(sources[0], weights=weights)
        context.add_input("labels", Path(config.labels))
    out = Path(config.out).expanduser() if config.out else context.folder / GGUF_NAME
    if any(split_entry(source.path)[0].resolve() == out.resolve() for source in sources):
        raise ConfigError(f"convert.out={relative(out)} is what is read; name another file")
    with open_model(context) as model:
        made = [tried(context, model, source, config.probe_tokens) for source in sources]
        vector = control_vector(context, made[0][0].weights, model) if config.latent >= 0 else None
    written = [source.weights for source, _ in made]
    if config.thresholds != "none":
        written = [to_thresholds(one.weights, probe, config.thresholds) for one, probe in made]
    write_sae_gguf(out, written, encoder_type=config.encoder_type, decoder_type=config.decoder_type)
    reports = [verify(w, out, probe, i) for i, (w, (_, probe)) in enumerate(zip(written, made, strict=True))]
    context.outputs["sae"] = str(out)
    if config.export:
        context.outputs["export"] = str(export_folder(context.folder / config.export, written[0], config.export))
    context.metrics = reports[0] | {"bytes": out.stat().st_size}
    if made[0][0].imported is not None:
        context.metrics |= {"proof": made[0][0].proof | {"published": made[0][0].imported.published}}
    if len(reports) > 1:
        context.metrics["entries"] = [{"hook": w.hook} | found for w, found in zip(written, reports, strict=True)]
    named = f", {len(written[0].labels)} of them labelled" if written[0].labels else ""
    context.three_lines(
        "; ".join(source.named for source in sources) + named,
        f"encoder {config.encoder_type}, decoder {config.decoder_type}, {out.stat().st_size / 1e6:.1f} MB; "
        + said(reports, written, [len(probe) for _, probe in made]),
        " and ".join(relative(path) for path in (out, vector, context.outputs.get("export")) if path),
    )


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
