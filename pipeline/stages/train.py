"""`ggscope train`: rows to a k-sparse autoencoder. torch lives here, llama.cpp does not: a stream captures in a child."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..config import Config
from ..loggers import MetricsLogger, open_loggers
from ..run import ProgressCall, RunContext
from .inputs import SAE_NAME, relative, warn_not_finite
from .rows import TrainingRows, trainer_threads, training_rows

if TYPE_CHECKING:
    from sae.trainer import TrainConfig
    from sae.weights import SAEWeights

CHECKPOINTS = "checkpoints"


def run(context: RunContext) -> None:
    from sae.checkpoint import save_weights

    with training_rows(context) as rows:
        weights, last = fit(context, rows)
        weights = rows.finish(weights)
        given = f"{rows.describe()}, width {weights.d_in}"
        spoiled = rows.not_finite()
    out = context.folder / SAE_NAME
    save_weights(out, weights)
    context.outputs |= {"sae": str(out), "metrics": str(context.folder / "metrics.jsonl")}
    last = last or weights.training["metrics"]  # a finished run that is resumed logs nothing
    context.metrics = {key: value for key, value in last.items() if isinstance(value, int | float)}
    warn_not_finite(context, spoiled.rows, spoiled.windows)
    context.metrics["sae_id"] = weights.training["id"]
    context.three_lines(
        given,
        f"{weights.num_latents} latents, k={weights.k}, {last.get('tokens', 0):,} tokens; FVU {last.get('fvu', float('nan')):.4f}, "
        f"L0 {last.get('l0', float('nan')):.1f}, {last.get('revived_total', 0)} latents revived, {last.get('tokens_per_s', 0):,.0f} tokens/s",
        relative(out),
    )


def fit(context: RunContext, rows: TrainingRows) -> tuple[SAEWeights, dict[str, float]]:
    """Train on the rows; the SAE, and the last row of metrics."""
    import torch

    from sae.trainer import Trainer, checkpoint_step

    torch.set_num_threads(trainer_threads(context.config))
    config, folder = context.config, context.folder / CHECKPOINTS
    loggers = open_loggers(config.logger, context.folder, asdict(config), checkpoint_step(folder))
    with context.progress("training", config.trainer.tokens) as progress:
        log = Reporter(loggers, progress)
        trainer = Trainer(
            train_config(config),
            rows.source,
            mean_D=rows.mean_D,
            variance=rows.variance,
            hook=rows.hook,
            host=rows.host,
            folder=folder,
            log=log,
            progress=log.step,
        )
        try:
            return trainer.fit(resume=context.resumed), log.last
        finally:
            for logger in loggers:
                logger.close()


class Reporter:
    """Passes metric rows to the loggers and the progress bar, and keeps the last one."""

    def __init__(self, loggers: list[MetricsLogger], progress: ProgressCall) -> None:
        self.loggers, self.progress = loggers, progress
        self.last: dict[str, float] = {}

    def __call__(self, row: dict[str, float]) -> None:
        self.last = row
        for logger in self.loggers:
            logger.log(row)

    def step(self, tokens: int) -> None:
        note = ""
        if self.last:
            row = self.last
            note = f"{row['tokens_per_s']:,.0f}/s  FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}  dead {row['dead']:.0f}"
        self.progress(tokens, note=note)


def train_config(config: Config) -> TrainConfig:
    from sae.trainer import TrainConfig

    t = config.trainer
    return TrainConfig(
        num_latents=config.sae.num_latents,
        k=config.sae.k,
        init_scale=config.sae.init_scale,
        batch_tokens=t.batch_tokens,
        tokens=t.tokens,
        lr=t.lr,
        warmup_steps=t.warmup_steps,
        decay_share=t.decay_share,
        seed=t.seed,
        auxk_coef=t.auxk_coef,
        auxk_k=t.auxk_k,
        dead_after_tokens=t.dead_after_tokens,
        encoder_dtype=t.encoder_dtype,
        kernel=t.kernel,
        checkpoint_steps=t.checkpoint_steps,
        log_steps=t.log_steps,
        keep_last=t.keep_last,
        betas=(t.beta1, t.beta2),
        eps=t.eps,
        device=t.device,
    )
