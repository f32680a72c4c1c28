"""`ggscope drift`: the same SAE over its model in several quantisations, and itself in several types, as a table and a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sae.errors import ConfigError

from ..evaluation.drift import ReferencePart, Setting, capture_reference, measure_model, with_names
from ..evaluation.drift_forms import Form, forms_of
from ..evaluation.drift_picture import draw_drift
from ..llama.identity import check_same_model
from ..llama.model import Model
from ..llama.requantise import KINDS, write_requantised
from ..run import RunContext, write_json
from .corpora import window_table
from .drift_text import describe, numbers, table_of
from .inputs import (
    check_host,
    counted,
    model_path,
    open_model,
    open_sae,
    outlier_norm,
    print_wide,
    relative,
    session_options,
    threads,
)

TABLE_NAME, PICTURE_NAME = "drift.json", "drift.png"


def run(context: RunContext) -> None:
    config = context.config.drift
    forms = forms_of(config.types)
    path, weights = open_sae(context)
    files = model_files(context)
    found: list[dict[str, Any]] = []
    reference: list[ReferencePart] = []
    with open_model(context) as model:
        check_host(context, weights, model)
        table = window_table(context, model, split="held_out", max_tokens=0)
        setting = Setting(
            weights=weights, table=table, config=config, outlier_norm=outlier_norm(weights),
            session=session_options(context.config.model),
        )  # fmt: skip
        reference = capture_reference(setting, model)
        found.append(measured_model(context, setting, model, forms, reference))
    for i, file in enumerate(files):
        with Model(file, n_gpu_layers=context.config.model.n_gpu_layers, use_mmap=context.config.model.mmap) as model:
            check_same_model(weights.host, model.id)  # its warnings are what this report measures
            context.add_input(f"model_{i}", model.path, model.id.sha256, architecture=model.id.architecture)
            found.append(measured_model(context, setting, model, forms, reference))
    result = with_names(found) | {"sae_id": weights.training.get("id"), "hook": weights.hook, "sae": describe(weights)}
    write(context, result)
    context.three_lines(
        f"{relative(path)} at {weights.hook} in {counted(len(found), 'file')} of {found[0]['architecture']}, "
        f"{counted(len(forms), 'type')} of the SAE, {found[0]['forms'][0]['rows']:,} held-out rows",
        numbers(result),
        f"{relative(context.folder / PICTURE_NAME)} and {relative(context.folder / TABLE_NAME)}",
        stderr=config.format == "json",
    )


def model_files(context: RunContext) -> list[Path]:
    """The files beside the reference: those made here, those of `drift.models`. ConfigError for what cannot be used."""
    config = context.config.drift
    unknown = [kind for kind in config.requantise if kind not in KINDS]
    if unknown:
        raise ConfigError(f"drift.requantise: expected {', '.join(KINDS)}, got {', '.join(unknown)}")
    given = [Path(name).expanduser() for name in config.models]
    for file in given:
        if not file.is_file():
            raise ConfigError(f"drift.models: {file} does not exist; name GGUF files of this model")
    source, made = model_path(context.config.model), []
    for kind in dict.fromkeys(config.requantise):
        file = context.folder / "models" / f"{source.stem}-{kind}.gguf"
        context.console.print(f"writing {relative(file)}", highlight=False)
        write_requantised(source, file, kind, n_threads=threads(context.config.model.n_threads))
        context.outputs[f"model:{kind}"] = str(file)
        made.append(file)
    return [*made, *given]


def measured_model(
    context: RunContext, setting: Setting, model: Model, forms: list[Form], reference: list[ReferencePart]
) -> dict[str, Any]:
    total, done = setting.config.splice_tokens, 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, note="splice")

    facts = {
        "file": Path(model.path).name, "file_type": model.id.file_type, "sha256": model.id.sha256,
        "bytes": model.path.stat().st_size, "architecture": model.id.architecture,
    }  # fmt: skip
    with context.progress(f"drift {facts['file']}", total) as progress:
        return facts | measure_model(setting, model, forms, reference, advance)


def write(context: RunContext, result: dict[str, Any]) -> None:
    """The numbers as JSON and on the terminal, and a picture of them."""
    write_json(context.folder / TABLE_NAME, result)
    draw_drift(context.folder / PICTURE_NAME, result)
    context.outputs |= {"drift": str(context.folder / TABLE_NAME), "picture": str(context.folder / PICTURE_NAME)}
    context.metrics = result
    if context.config.drift.format == "json":
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    else:
        print_wide(table_of(result))
