"""`ggscope train`: a store to a k-sparse autoencoder. torch lives here, llama.cpp does not."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from sae.errors import ConfigError

from ..config import Config
from ..loggers import MetricsLogger, open_loggers
from ..run import ProgressCall, RunContext
from .inputs import SAE_NAME, open_store, relative, store_sha256, threads

if TYPE_CHECKING:
    from sae.trainer import TrainConfig
    from sae.weights import SAEWeights

    from ..store.reader import ActivationStore

CHECKPOINTS = "checkpoints"


def run(context: RunContext) -> None:
    import torch

    from sae.checkpoint import save_weights
    from sae.trainer import Trainer, checkpoint_step

    config = context.config
    torch.set_num_threads(threads(config.trainer.n_threads))
    store = open_store(context)
    hook = the_hook(store, config)
    stats = store.stats(hook)
    source = store.batches(
        hook, batch_rows=config.trainer.batch_tokens, seed=config.trainer.seed, buffer_rows=config.trainer.buffer_rows
    )
    folder = context.folder / CHECKPOINTS
    resume_step = checkpoint_step(folder)
    loggers = open_loggers(config.logger, context.folder, asdict(config), resume_step)
    with context.progress("training", config.trainer.tokens) as progress:
        log = Reporter(loggers, progress)
        trainer = Trainer(
            train_config(config),
            source,
            mean_D=stats.mean_D,
            variance=stats.variance,
            hook=hook,
            host=store.meta.model,
            folder=folder,
            log=log,
            progress=log.step,
        )
        try:
            weights = trainer.fit(resume=context.resumed)
        finally:
            for logger in loggers:
                logger.close()
    weights = with_origin(weights, store, hook)
    out = context.folder / SAE_NAME
    save_weights(out, weights)
    context.outputs |= {"sae": str(out), "metrics": str(context.folder / "metrics.jsonl")}
    last = log.last or weights.training["metrics"]  # a finished run that is resumed logs nothing
    context.metrics = {key: value for key, value in last.items() if isinstance(value, int | float)}
    context.metrics["sae_id"] = weights.training["id"]
    context.three_lines(
        f"{relative(store.path)} (sha256 {store_sha256(store.path)[:12]}), {store.n_rows:,} rows at {hook}, width {weights.d_in}",
        f"{weights.num_latents} latents, k={weights.k}, {last.get('tokens', 0):,} tokens; FVU {last.get('fvu', float('nan')):.4f}, "
        f"L0 {last.get('l0', float('nan')):.1f}, {last.get('revived_total', 0)} latents revived, {last.get('tokens_per_s', 0):,.0f} tokens/s",
        relative(out),
    )


def with_origin(weights: SAEWeights, store: ActivationStore, hook: str) -> SAEWeights:
    """The SAE with what later stages check it by: an id, its store, and the norm above which rows were left out."""
    digest = hashlib.sha256(weights.W_enc_FD.tobytes() + weights.W_dec_FD.tobytes()).hexdigest()
    origin = {
        "id": digest[:16],
        "store_sha256": store_sha256(store.path),
        "outlier_threshold": store.hooks[hook].outlier_threshold,
    }
    return replace(weights, training=weights.training | origin)


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


def the_hook(store: ActivationStore, config: Config) -> str:
    """The one hook point to train on: the only one of the store, or the one `hooks.points` names."""
    names = list(store.hooks)
    if len(names) == 1:
        return names[0]
    if len(config.hooks.points) == 1 and config.hooks.points[0] in names:
        return config.hooks.points[0]
    raise ConfigError(f"the store holds {', '.join(names)}: choose one with hooks.points=[{names[0]}]")


def train_config(config: Config) -> TrainConfig:
    from sae.trainer import TrainConfig

    t = config.trainer
    return TrainConfig(
        num_latents=config.sae.num_latents,
        k=config.sae.k,
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
        checkpoint_steps=t.checkpoint_steps,
        log_steps=t.log_steps,
        keep_last=t.keep_last,
        betas=(t.beta1, t.beta2),
        eps=t.eps,
        device=t.device,
    )
