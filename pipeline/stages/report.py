"""`ggscope report`: one HTML file of what was trained, how good it is, what its latents are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, FormatError
from sae.weights import SAEWeights

from ..config import CorpusConfig
from ..corpus.stdlib import stdlib_root
from ..corpus.windows import WindowTable
from ..llama.model import Model
from ..report.collect import ReportInputs, build_report, read_training_curve
from ..report.figures import summary_figure
from ..run import RunContext, versions
from ..store.reader import ActivationStore
from .corpora import window_table
from .inputs import (
    check_host,
    describe_model,
    open_model,
    open_sae,
    outlier_norm,
    own_store,
    relative,
    run_of_sae,
    session_options,
)

REPORT_NAME = "report.html"
PICTURE_NAME = "summary.png"
EVALUATION_PICTURE = "evaluation.png"


def run(context: RunContext) -> None:
    config = context.config.report
    path, weights = open_sae(context)
    check_steered(config.steer_latent, weights)
    evaluation = read_evaluation(context, weights)
    metrics = Path(config.metrics or run_of_sae("train", weights)["metrics"])
    if not metrics.is_file():
        raise ConfigError(f"report.metrics={metrics}: no such file; name the metrics.jsonl of the training")
    dead_after = weights.training.get("config", {}).get("dead_after_tokens", 0)
    context.add_input("metrics", metrics)
    captured = rows_captured(weights)
    out, picture = context.folder / REPORT_NAME, context.folder / PICTURE_NAME
    with open_model(context) as model:
        check_host(context, weights, model)
        if weights.d_in != model.n_embd:
            raise ConfigError(
                f"report shows what a latent adds to the residual stream of width {model.n_embd}; {weights.hook} has width "
                f"{weights.d_in}, so its latents have no place there: `ggscope evaluate` and `apply` work on it"
            )
        if weights.norm_mode != "none":
            raise ConfigError(
                "report steers by one direction for all tokens; this SAE's latents are in units of each token's sigma "
                "(layer norm): `ggscope evaluate` and `apply` work on it"
            )
        table = window_table(context, model, split="held_out", max_tokens=0)
        inputs = ReportInputs(
            model=model,
            weights=weights,
            windows=table,
            evaluation=evaluation,
            evaluation_picture=picture_beside(Path(context.inputs["evaluation"]["path"])),
            config=config,
            metrics_path=metrics,
            dead_after_tokens=dead_after,
            rows_captured=captured,
            outlier_norm=outlier_norm(weights),
            corpus_name=corpus_name(context.config.corpus),
            sources=sources(context.config.corpus, table),
            provenance=provenance(context, model, weights, path, captured),
            session=session_options(context.config.model),
        )
        with context.progress("report", config.tokens, "rows") as progress:
            data = build_report(out, inputs, progress=lambda what, done, total: progress(done, total, note=what))
        given = f"{relative(path)} at {weights.hook} of {describe_model(model)}"
    curve = read_training_curve(metrics, weights.num_latents, dead_after)
    summary_figure(picture, curve, evaluation, data.title)
    context.outputs |= {"report": str(out), "picture": str(picture)}
    context.metrics = {"latents_shown": len(data.latents), "bytes": out.stat().st_size}
    context.three_lines(
        given,
        f"{len(data.latents)} latents with their strongest contexts in {data.latent_rows:,} held-out rows, {out.stat().st_size / 1e6:.1f} MB",
        f"{relative(out)} and {relative(picture)}",
    )


def check_steered(latent: int, weights: SAEWeights) -> None:
    """ConfigError for a latent that the SAE lacks; -1 stands for none."""
    if latent >= weights.num_latents:
        raise ConfigError(f"report.steer_latent={latent}: this SAE has latents 0..{weights.num_latents - 1}")


def read_evaluation(context: RunContext, weights: SAEWeights) -> dict[str, Any]:
    """The evaluation of this SAE: `report.evaluation`, or the newest one. FormatError, ConfigError for another's."""
    path = Path(context.config.report.evaluation or run_of_sae("evaluate", weights)["evaluation"])
    context.add_input("evaluation", path)
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: expected the evaluation.json of `ggscope evaluate` ({error})") from None
    if not isinstance(evaluation, dict) or "fvu" not in evaluation:
        raise FormatError(f"{path}: expected the evaluation.json of `ggscope evaluate`, got another JSON file")
    if evaluation.get("sae_id") != weights.training.get("id"):
        raise ConfigError(f"{path} is the evaluation of another SAE; run `ggscope evaluate` on this one")
    return evaluation


def picture_beside(evaluation: Path) -> bytes:
    """The picture of the evaluation; nothing where there is none."""
    picture = evaluation.with_name(EVALUATION_PICTURE)
    return picture.read_bytes() if picture.is_file() else b""


def corpus_name(config: CorpusConfig) -> str:
    if config.kind == "stdlib":
        return "the Python standard library"
    dataset = [config.dataset] if config.kind == "datasets" else []
    return ", ".join(dataset + [Path(p).name for p in config.paths])


def sources(config: CorpusConfig, table: WindowTable) -> dict[str, bytes] | None:
    """The bytes of Python documents, for comparing latents with the syntax tree."""
    if config.kind != "stdlib":
        return None
    return {d.name: (stdlib_root() / d.name).read_bytes() for d in table.documents}


def rows_captured(weights: SAEWeights) -> int:
    """Rows of the store or the stream that the SAE was trained on; 0 where they are not known here."""
    training = weights.training
    if training.get("source") == "stream":
        return int(training.get("statistics", {}).get("rows", 0))
    store = own_store(training.get("store_sha256", ""))
    return ActivationStore(store).n_rows if store is not None else 0


def provenance(
    context: RunContext, model: Model, weights: SAEWeights, path: Path, captured: int
) -> list[tuple[str, str]]:
    training, settings = weights.training, weights.training.get("config", {})
    of = f" ({captured} captured)" if captured else ""
    facts = [
        ("model", f"{Path(model.path).name}, sha256 {model.id.sha256}"),
        ("SAE", f"{relative(path)}, sha256 {context.inputs['sae']['sha256']}"),
        (
            "trained on",
            f"{training.get('tokens', '?')} rows{of}, lr {settings.get('lr', '?')}, seed {settings.get('seed', '?')}",
        ),
    ]
    return facts + [(name, value) for name, value in versions().items() if name != "platform"]
