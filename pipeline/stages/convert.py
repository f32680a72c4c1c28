"""`ggscope convert`: SAEs to one SAE GGUF, read back and verified; to other libraries' folders; a latent to a control vector.

`ggscope convert verify FILE`: a file that is there, held against what it was made from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.control_vector import write_control_vector
from convert.interop.exporting import Windows, check_export, export_folder
from convert.sae_gguf import write_sae_gguf
from convert.verify import verify
from sae.errors import CheckFailedError, ConfigError
from sae.runtime import decode, encode
from sae.thresholds import to_thresholds
from sae.weights import SAEWeights

from ..corpus.encoding import bos_of
from ..evaluation.proof import proof
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
    if config.export and len(sources) > 1:
        raise ConfigError(f"convert.export={config.export} writes one SAE; leave convert.also out")
    if config.labels:
        weights = with_labels(sources[0].weights, Path(config.labels).expanduser())
        sources[0] = replace(sources[0], weights=weights)
        context.add_input("labels", Path(config.labels))
    out = Path(config.out).expanduser() if config.out else context.folder / GGUF_NAME
    if any(split_entry(source.path)[0].resolve() == out.resolve() for source in sources):
        raise ConfigError(f"convert.out={relative(out)} is what is read; name another file")
    with open_model(context) as model:
        made = [tried(context, model, source, config.probe_tokens) for source in sources]
        corpus = context.config.corpus
        windows = Windows(bos_of(model, corpus.bos) is not None, corpus.context_tokens)
        vector = control_vector(context, made[0][0].weights, model) if config.latent >= 0 else None
    written = [with_thresholds(context, source.weights, probe) for source, probe in made]
    if config.export:
        check_export(written[0], config.export)
    reports: list[dict[str, float]] = []

    def check(partial: Path) -> None:
        try:
            for i, (w, (_, probe_ND)) in enumerate(zip(written, made, strict=True)):
                reports.append(verify(w, partial, probe_ND, i))
        except CheckFailedError as error:
            raise CheckFailedError(f"{str(error).replace(str(partial), relative(out))}; it was not written") from None

    write_sae_gguf(out, written, encoder_type=config.encoder_type, decoder_type=config.decoder_type, check=check)
    context.outputs["sae"] = str(out)
    if config.export:
        folder = export_folder(context.folder / config.export, written[0], config.export, windows)
        context.outputs["export"] = str(folder)
    context.metrics = reports[0] | {"bytes": out.stat().st_size}
    if made[0][0].imported is not None:
        context.metrics |= {"proof": made[0][0].proof | {"published": made[0][0].imported.published}}
    if len(reports) > 1:
        context.metrics["entries"] = [{"hook": w.hook} | found for w, found in zip(written, reports, strict=True)]
    context.three_lines(
        "; ".join(
            source.named + (f", {len(w.labels)} of them labelled" if w.labels else "")
            for source, w in zip(sources, written, strict=True)
        ),
        f"encoder {config.encoder_type}, decoder {config.decoder_type}, {out.stat().st_size / 1e6:.1f} MB; "
        + said(reports, written, [len(probe) for _, probe in made]),
        " and ".join(relative(path) for path in (out, vector, context.outputs.get("export")) if path),
    )


def with_thresholds(context: RunContext, weights: SAEWeights, probe_ND: np.ndarray) -> SAEWeights:
    """With `convert.thresholds` the SAE with these, and a line of what it does before and after."""
    mode = context.config.convert.thresholds
    if mode == "none":
        return weights
    found = to_thresholds(weights, probe_ND, mode)
    # of a transcoder what it should give is not among the rows: its output before
    target_NO = decode(weights, *encode(weights, probe_ND), probe_ND) if weights.hook_out else probe_ND
    before, after = (proof(one, probe_ND, target_NO) for one in (weights, found))
    what = "FVU of its output against the one before" if weights.hook_out else f"FVU {before['fvu']:.4f} ->"
    context.console.print(
        f"thresholds ({mode}), fitted on {len(probe_ND):,} held-out rows: {what} {after['fvu']:.4f}, "
        f"L0 {before['l0']:.2f} -> {after['l0']:.2f}", highlight=False,
    )  # fmt: skip
    return found


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
