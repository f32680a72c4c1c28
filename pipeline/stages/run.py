"""`ggscope run`: every stage after the other, each in a process of its own (torch and llama.cpp never share one)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from sae.errors import ConfigError, FormatError, InterruptedRunError, SAEError

from ..config import SAEConfig
from ..llama.hooks import is_pattern
from ..llama.identity import file_vocabulary
from ..run import RunContext, read_manifest
from ..training.memory import check_batch
from ..training.settings import given
from .corpora import check_held_out, check_settings
from .inputs import LABELS, SAE_NAME, STORE_NAME, model_path, number, print_wide, relative

EXPERIMENT = "this_run"
PATIENCE_SECONDS = 2.0  # a Ctrl-C reaches the child by itself; only a signal to us alone is passed on


def run(context: RunContext) -> None:
    folder, config = context.folder, context.config
    if config.trainer.source != "store":
        raise ConfigError(
            f"`ggscope run` captures a store first, got trainer.source={config.trainer.source}; "
            "stream with `ggscope train trainer.source=stream`, then evaluate, convert and report"
        )
    if config.extract.plan_only:
        raise ConfigError(
            "extract.plan_only=true captures nothing that the later stages could use; plan with "
            "`ggscope extract extract.plan_only=true`, then run without it"
        )
    if given(config.together):
        raise ConfigError(
            "`ggscope run` takes one SAE from text to report; train several with `ggscope train together.k=[16,32]`, "
            "then evaluate, convert and report each"
        )
    check_sae(config.sae)
    check_batch(config.trainer)  # before hours of capture, as the next
    check_hook(config.hook.points)
    check_settings(config.corpus)
    check_held_out(config.corpus, file_vocabulary(model_path(config.model)) if config.corpus.kind == "tokens" else None)
    save_settings(context)
    random_model = random_copy(context) if config.evaluate.baselines else None
    # relative where the run lies in the project: moved, it is resumed with the settings that its stages noted
    sae = relative(folder / "train" / SAE_NAME)
    store = config.store.path or relative(folder / "extract" / STORE_NAME)
    stage(context, "extract", "extract", f"store.path={store}")
    stage(context, "train", "train", f"store.path={store}")
    random_sae = random_baseline(context, random_model) if random_model else ""
    rows = [f"store.path={store}"] if config.evaluate.baselines else []
    stage(context, "evaluate", "evaluate", *rows, f"sae.path={sae}", f"evaluate.random_sae={random_sae}")
    stage(context, "convert", "convert", f"convert.source={sae}")
    stage(
        context, "report", "report", f"sae.path={relative(folder / 'convert' / 'sae.gguf')}",
        f"report.evaluation={relative(folder / 'evaluate' / 'evaluation.json')}",
        f"report.metrics={relative(folder / 'train' / 'metrics.jsonl')}",
    )  # fmt: skip
    finish(context)


def check_sae(config: SAEConfig) -> None:
    """ConfigError for what `run` cannot take through evaluate and report."""
    for key, wanted in (("kind", ("sae",)), ("input_norm", ("dataset", "none"))):
        if (value := getattr(config, key)) not in wanted:
            raise ConfigError(
                f"sae.{key}={value} cannot go through evaluate and report; use `ggscope extract` and `ggscope train`"
            )


def check_hook(points: Sequence[str]) -> None:
    """ConfigError for anything but one hook point, named without a pattern: the training takes no other."""
    if len(points) != 1 or is_pattern(points[0]):
        found = ", ".join(points) or "none"
        raise ConfigError(
            "`ggscope run` trains at one hook point: give hook.points=[blocks.3.hook_resid_post], got "
            f"{found}; capture several with `ggscope extract`"
        )


def save_settings(context: RunContext) -> None:
    """The whole settings as an experiment file of this run, which every stage loads."""
    values = {k: v for k, v in asdict(context.config).items() if k not in ("run_dir", "resume")}
    path = context.folder / "conf" / "experiment" / f"{EXPERIMENT}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# @package _global_\n" + json.dumps(values, indent=1) + "\n", encoding="utf-8")  # JSON is YAML


def stage(context: RunContext, name: str, subfolder: str, *overrides: str) -> None:
    """Run one stage into `<run>/<subfolder>`; a finished one is kept, an unfinished one continued."""
    folder = context.folder / subfolder
    manifest = read_manifest(folder)
    if manifest is not None and manifest.get("status") == "finished":
        context.console.print(f"{subfolder}: already finished, kept", highlight=False)
    else:
        where = f"resume={folder}" if manifest is not None else f"run_dir={folder}"
        context.console.print(
            f"{subfolder}: {'continued' if manifest else 'started'}, {datetime.now():%H:%M:%S}", highlight=False
        )
        settings = ["--config-dir", str(context.folder / "conf"), f"experiment={EXPERIMENT}"]
        code = child([sys.executable, "-m", "pipeline.cli", name, *settings, *overrides, where])
        if code == 130:
            raise InterruptedRunError(
                f"interrupted during {subfolder}; continue with `ggscope run resume={context.folder}`"
            )
        if code:
            error = SAEError(
                f"{subfolder} failed (its message is above); mend it and continue with `ggscope run resume={context.folder}`"
            )
            error.exit_code = code
            raise error
    context.outputs[subfolder] = str(folder)


def child(command: list[str]) -> int:
    """Run a command; an interrupt waits for it, so that it can save its state."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise


def random_copy(context: RunContext) -> Path | None:
    """The model with its matrices redrawn, or None (with a warning) where its types cannot be written."""
    from ..llama.random_weights import write_random_copy

    config = context.config
    model = context.folder / "random" / "model.gguf"
    if not model.exists():
        model.parent.mkdir(exist_ok=True)
        try:
            write_random_copy(model_path(config.model), model, seed=config.evaluate.seed)
        except FormatError as error:
            context.console.print(
                f"warning: no random-weights baseline for this model: {error}", style="yellow", highlight=False
            )
            return None
    return model


def random_baseline(context: RunContext, model: Path) -> str:
    """An SAE trained the same way on the same architecture with re-drawn weights; returns its folder.

    Its store stays in the run folder, wherever `store.path` has that of the model.
    """
    config, folder = context.config, context.folder / "random"
    rows = config.evaluate.random_model_tokens
    limit = config.corpus.max_tokens
    share = min(1.0, rows / limit) if limit else 1.0
    searched = metrics_of(context, "train").get("lr_search")
    store = relative(folder / "extract" / STORE_NAME)
    source = [
        f"model.path={relative(model)}",
        "model.repo=",
        "model.file=",
        f"corpus.max_tokens={min(rows, limit) if limit else rows}",
    ]
    stage(context, "extract", "random/extract", *source, f"store.path={store}")
    stage(
        context,
        "train",
        "random/train",
        f"store.path={store}",
        f"trainer.tokens={max(config.trainer.batch_tokens, int(config.trainer.tokens * share))}",
        f"trainer.warmup_steps={int(config.trainer.warmup_steps * share)}",
        f"trainer.lr={searched['best'] if searched else config.trainer.lr}",
        "trainer.lr_search=[]",
    )
    return relative(folder / "train" / SAE_NAME)


def metrics_of(context: RunContext, name: str) -> dict[str, Any]:
    return (read_manifest(context.folder / name) or {}).get("metrics", {})


def finish(context: RunContext) -> None:
    """The short table of numbers, and where the report lies."""
    evaluation = metrics_of(context, "evaluate")
    title = f"SAE beside its baselines, held-out text ({evaluation.get('splice_rows', 0):,} rows, dead over "
    table = Table(title=f"{title}{evaluation.get('rows', 0):,})", title_justify="left")
    columns = {
        "fvu": "FVU",
        "l0": "L0",
        "dead_share": "dead",
        "ce_recovered": "CE recovered",
        "delta_ce_nats": "delta CE (nats)",
        "kl": "KL (nats)",
    }
    table.add_column("")
    for title in columns.values():
        table.add_column(title, justify="right")
    own = evaluation | evaluation.get("same_rows", {})  # FVU and L0 on the rows the baselines have
    for name, values in {"sae": own, **evaluation.get("baselines", {})}.items():
        cells = [values.get(key) for key in columns]
        table.add_row(
            LABELS.get(name, name),
            *(
                "" if c is None else f"{c:.2%}" if key == "dead_share" else f"{c:.1f}" if key == "l0" else f"{c:.4f}"
                for key, c in zip(columns, cells, strict=True)
            ),
        )
    print_wide(table)
    context.metrics = {key: evaluation.get(key) for key in columns}
    extract, train = metrics_of(context, "extract"), metrics_of(context, "train")
    speed = extract.get("tokens_per_s", 0)
    captured = f"{speed:,.0f} tokens/s captured" if speed else "rows captured before"
    report = context.folder / "report" / "report.html"
    context.outputs["report"] = str(report)
    path = model_path(context.config.model)
    sha256 = (read_manifest(context.folder / "extract") or {}).get("inputs", {}).get("model", {}).get("sha256", "")
    context.add_input("model", path, sha256)
    context.three_lines(
        f"{relative(path)} (sha256 {sha256[:12]}), {extract.get('rows', 0):,} rows captured at {', '.join(context.config.hook.points)}",
        f"{captured}, {train.get('tokens_per_s', 0):,.0f} tokens/s trained; "
        f"FVU {number(evaluation.get('fvu'))}, CE recovered {number(evaluation.get('ce_recovered'))}",
        f"open {relative(report)}",
    )
