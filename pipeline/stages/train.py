"""`ggscope train`: rows to k-sparse autoencoders. torch lives here, llama.cpp does not: a stream captures in a child."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import ConfigError, DivergedError, FormatError

from ..config import ConvertConfig
from ..loggers import open_loggers
from ..run import RunContext
from ..training.lr_search import search
from ..training.memory import check_batch, check_memory
from ..training.picture import draw_training
from ..training.reporter import Reporter, result, searched_lines
from ..training.settings import sae_folder, train_configs
from ..waits import asleep
from .inputs import SAE_NAME, load_sae, relative, sae_sha256, warn_not_finite
from .published import import_published, is_published, published_sha256, report_notes
from .rows import TrainingRows, trainer_threads, training_rows

if TYPE_CHECKING:
    from sae.trainer import JointTrainer
    from sae.weights import SAEWeights

CHECKPOINTS = "checkpoints"
PICTURE = "metrics.png"
MOST_WAITING = 0.05  # share of the time; a step that waits longer for its batch is a reader too slow
LEAST_WAIT = 5.0  # seconds


def run(context: RunContext) -> None:
    check_batch(context.config.trainer)
    with training_rows(context) as rows:
        trainer, searched = fit(context, rows)
        if context.rank:  # the first rank has the same SAEs and writes them
            return
        best = {name: rows.finish(weights) for name, weights in trainer.best_weights().items()}
        found = {name: rows.finish(weights) for name, weights in trainer.weights().items()}
        given = f"{rows.describe()}, width {rows.source.d_in}"
        spoiled = rows.not_finite()
    for name, weights in found.items():
        save(context, name, weights, SAE_NAME)
        if name in best:
            save(context, name, best[name], f"{SAE_NAME}_best")
    draw_training(context.folder, list(found), context.folder / PICTURE, searched)
    context.outputs["picture"] = str(context.folder / PICTURE)
    note_metrics(context, found, searched, trainer)
    warn_not_finite(context, spoiled.rows, spoiled.windows)
    warn_waiting(context, trainer.wait_share)
    warn_useless(context, found)
    where = context.folder if len(trainer.learners) > 1 else context.folder / SAE_NAME
    context.three_lines(given, result(found, trainer.tokens_per_s), relative(where))
    if trainer.diverged:
        raise DivergedError(f"{len(found)} SAEs were trained, but {'; '.join(trainer.diverged.values())}")


def fit(context: RunContext, rows: TrainingRows) -> tuple[JointTrainer, dict[str, dict[str, Any]]]:
    """Train on the rows, after the search for a learning rate where one is wanted; the trainer and what was searched."""
    with asleep():
        import torch

    from sae.devices import pick_device
    from sae.ranks import torchrun_ranks
    from sae.trainer import JointTrainer, checkpoint_step

    torch.set_num_threads(trainer_threads(context.config))
    config, folder, configs = context.config, context.folder / CHECKPOINTS, train_configs(context.config)
    device, split = (
        pick_device(config.trainer.device),
        config.trainer.parallel == "latent" and "WORLD_SIZE" in os.environ,
    )
    check_memory(configs, rows.source.d_in, wiring=rows.wiring, stays_here=device.type == "cpu" and not split)
    open_trainer = partial(
        JointTrainer, source=rows.source, mean_D=rows.mean_D, variance=rows.variance, hook=rows.hook, host=rows.host,
        start=start_sae(context, rows), wiring=rows.wiring, variances=rows.variances,
    )  # fmt: skip
    searched: dict[str, dict[str, Any]] = {}
    if config.trainer.lr_search:
        with context.progress("learning rates", 0) as progress:
            searched = search(
                config.trainer, configs, folder=context.folder, checkpoints=folder / "lr_search",
                open_trainer=open_trainer, resume=context.resumed, progress=progress,
            )  # fmt: skip
        configs = {name: replace(c, lr=searched[name]["best"]) for name, c in configs.items()}
        for line in searched_lines(searched):
            context.console.print(line, highlight=False)
    step = checkpoint_step(folder, *configs, first=next(iter(configs.values())).first_checkpoint)
    loggers = {
        name: open_loggers(config.logger, context.folder, asdict(config) | {"sae": asdict(c)}, step, name)
        for name, c in configs.items()
        if context.rank == 0
    }
    with (
        torchrun_ranks(device) as ranks,
        context.progress("training", config.trainer.tokens) as progress,
        Reporter(loggers, progress) as reporter,
    ):
        trainer = open_trainer(configs, folder=folder, log=reporter.log, progress=reporter.step, ranks=ranks)
        trainer.fit(resume=context.resumed)
    return trainer, searched


def start_sae(context: RunContext, rows: TrainingRows) -> SAEWeights | None:
    """The SAE of `sae.init_from`: of the same hook point, and of the same model but for its quantisation."""
    from ..llama.identity import ModelId, check_same_model

    place = context.config.sae.init_from
    if not place:
        return None
    path, weights, sha256 = published_start(context, place, rows) if is_published(place) else own_start(place)
    if weights.hook != rows.hook:
        raise ConfigError(f"sae.init_from: {path} is an SAE of {weights.hook}, the rows are of {rows.hook}")
    for warning in check_same_model(weights.host, ModelId.from_dict(rows.host)):
        context.console.print(f"warning: sae.init_from: {warning}", style="yellow", highlight=False)
    context.add_input("init_from", path, sha256)
    return weights


def own_start(place: str) -> tuple[Path, SAEWeights, str]:
    """An SAE in one of our files: where it lies, the weights, the hash."""
    path = Path(place).expanduser()
    return path, load_sae(path), sae_sha256(path)


def published_start(context: RunContext, place: str, rows: TrainingRows) -> tuple[Path, SAEWeights, str]:
    """The same of somebody else's. Where its files name no hook point that is known here it is taken for the rows'."""
    try:
        path, imported = import_published(place, setting="sae.init_from")
    except FormatError:
        out = rows.wiring.outputs[0][0] if rows.wiring.outputs else ""
        path, imported = import_published(place, ConvertConfig(hook=rows.hook, hook_out=out), setting="sae.init_from")
        context.console.print(
            f"warning: sae.init_from: the files do not say for which hook point; taken as {rows.hook}",
            style="yellow", highlight=False,
        )  # fmt: skip
    report_notes(context, imported)
    return path, imported.weights, published_sha256(path)


def save(context: RunContext, name: str, weights: SAEWeights, file: str) -> None:
    from sae.checkpoint import save_weights

    folder, of = sae_folder(context.folder, name), f":{name}" if name else ""
    save_weights(folder / file, weights)
    context.outputs |= {f"{file}{of}": str(folder / file), f"metrics{of}": str(folder / "metrics.jsonl")}


def note_metrics(
    context: RunContext, found: dict[str, SAEWeights], searched: dict[str, dict[str, Any]], trainer: JointTrainer
) -> None:
    """The manifest's numbers: those of the one SAE, or under `saes` those of each; the rate of the whole training; what
    decides the bits beside the settings: the kernel that ran and the number of threads."""
    numbers: dict[str, dict[str, Any]] = {}
    for name, weights in found.items():
        last = {k: v for k, v in weights.training["metrics"].items() if isinstance(v, int | float)}
        numbers[name] = last | {
            "tokens_per_s": trainer.tokens_per_s, "sae_id": weights.training["id"],
            "kernel": trainer.learners[name].stepper.name, "threads": trainer_threads(context.config),
        }  # fmt: skip
        if name in searched:
            numbers[name]["lr_search"] = searched[name]
    context.metrics = numbers.get("", {"saes": numbers})


def warn_useless(context: RunContext, found: dict[str, SAEWeights]) -> None:
    """A line for each SAE whose reconstruction is no better than the mean of the rows."""
    for name, weights in found.items():
        fvu = weights.training["metrics"]["fvu"]
        if fvu >= 1:
            context.console.print(
                f"warning: {name or 'the SAE'} has FVU {fvu:.4g} on the last training rows, the mean alone has 1: nothing was "
                f"learned; try a lower trainer.lr than {context.config.trainer.lr:g}, or more tokens",
                style="yellow", highlight=False,
            )  # fmt: skip


def warn_waiting(context: RunContext, share: float) -> None:
    """A line where steps waited for rows for more than MOST_WAITING of the time, and long enough to matter."""
    if share > MOST_WAITING and share * (time.time() - context.started) > LEAST_WAIT:
        advice = (
            "the capture is the slower side: model.n_threads, model.n_gpu_layers, or a store for more than one epoch"
            if context.config.trainer.source == "stream"
            else "the store is the slower side: a faster disk, or a buffer (trainer.buffer_rows) that holds more of it"
        )
        context.console.print(
            f"warning: training waited for rows {share:.0%} of the time; {advice}", style="yellow", highlight=False
        )
