"""The settings of each SAE of a run: one, or every combination of the lists of `together`."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import ConfigError
from sae.options import SAEOptions

from ..config import Config, TogetherConfig

if TYPE_CHECKING:
    from sae.trainer import TrainConfig

LETTERS = {
    "variant": "",
    "num_latents": "n",
    "k": "k",
    "lr": "lr",
    "seed": "seed",
}  # key of `together` to its part of a name


def train_configs(config: Config) -> dict[str, TrainConfig]:
    """Name to settings of every SAE; a single one has the name "".

    Raises:
        ConfigError: a value twice, a learning rate both given and searched for, values out of range.
    """
    base, lists = train_config(config), given(config.together)
    if config.trainer.lr_search and "lr" in lists:
        raise ConfigError("expected together.lr or trainer.lr_search, got both: a search chooses the learning rate")
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return {name_of(values, lists): replace(base, **values) for values in combinations}


def given(together: TogetherConfig) -> dict[str, list[Any]]:
    """The lists of `together` that are not empty."""
    lists = {key: list(getattr(together, key)) for key in LETTERS if getattr(together, key)}
    for key, values in lists.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"together.{key} names a value twice: {', '.join(map(str, values))}")
    return lists


def name_of(values: dict[str, Any], lists: dict[str, list[Any]]) -> str:
    """`n4096-k32`: what the SAE differs in from the others, "" where there is no other."""
    return "-".join(f"{LETTERS[key]}{value:g}" if key == "lr" else f"{LETTERS[key]}{value}"
                    for key, value in values.items() if len(lists[key]) > 1)  # fmt: skip


def sae_folder(run: Path, name: str) -> Path:
    """Where an SAE of a run has its files: the run folder, or a folder of its name in it."""
    return run / name if name else run


def train_config(config: Config) -> TrainConfig:
    """The settings of the SAE without `together`."""
    from sae.trainer import TrainConfig

    t, s = config.trainer, config.sae
    options: dict[str, Any] = {option.name: getattr(s, option.name) for option in fields(SAEOptions)}
    return TrainConfig(
        num_latents=s.num_latents,
        k=s.k,
        init_scale=s.init_scale,
        variant=s.variant,
        options=SAEOptions(**options),
        optimizer=t.optimizer,
        momentum=t.momentum,
        batch_tokens=t.batch_tokens,
        tokens=t.tokens,
        lr=t.lr,
        warmup_steps=t.warmup_steps,
        decay_share=t.decay_share,
        seed=t.seed if s.seed < 0 else s.seed,
        auxk_coef=t.auxk_coef,
        auxk_k=t.auxk_k,
        dead_after_tokens=t.dead_after_tokens,
        encoder_dtype=t.encoder_dtype,
        auxk_dtype=t.auxk_dtype,
        kernel=t.kernel,
        parallel=t.parallel,
        checkpoint_steps=t.checkpoint_steps,
        log_steps=t.log_steps,
        keep_last=t.keep_last,
        save_best=t.save_best,
        betas=(t.beta1, t.beta2),
        eps=t.eps,
        device=t.device,
    )
