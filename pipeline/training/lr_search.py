"""Learning rates tried on a share of the tokens, all on the same batches; the best by FVU, the smallest of those that
are close, trains the SAE.

The rates are trained together, each with a whole schedule of its own on the first rows of the run; then the data goes
back to its start, so the training that follows is, to the bit, the one with that rate given.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import ConfigError, DivergedError, FormatError

from ..config import TrainerConfig
from ..run import ProgressCall, write_json

if TYPE_CHECKING:
    from sae.trainer import JointTrainer, TrainConfig

RESULT = "lr_search.json"
MIN_STEPS = 8  # fewer say nothing about a rate
JUDGED_SHARE = 0.25  # the FVU is the mean over the last quarter of the steps, which no late step decides alone
# a short training flatters large rates, whose latents die later: on the demo model, k = 16, 1.6e-2 was ahead of 8e-3 by
# 0.8 % after a fifth of the tokens and behind by 13 % at the end
CLOSE = 0.02

Open = Callable[..., "JointTrainer"]  # a trainer of these settings on the run's rows: configs, folder, log, progress


def search(
    settings: TrainerConfig,
    configs: dict[str, TrainConfig],
    *,
    folder: Path,
    checkpoints: Path,
    open_trainer: Open,
    resume: bool,
    progress: ProgressCall,
) -> dict[str, dict[str, Any]]:
    """For each SAE `{"best": lr, "tokens": N, "fvu": {"0.001": FVU, ...}}`; a rate that diverged has FVU None.

    Written to `folder/lr_search.json`; found there, it is only read. An interrupted search goes on from `checkpoints`.

    Raises:
        ConfigError: fewer than two rates, one out of range, a share that gives too few steps.
        DivergedError: every rate diverged.
    """
    done = read_result(folder / RESULT)
    if done is not None:
        return done
    tries = candidates(settings, configs)
    tokens = next(iter(tries.values())).tokens
    trainer = open_trainer(
        tries, folder=checkpoints, progress=lambda done: progress(done, tokens, "learning-rate search")
    )  # fmt: skip
    start = trainer.source.state()
    trainer.fit(resume=resume)
    trainer.source.load_state(start)
    found = {name: judged(trainer, name, settings.lr_search) | {"tokens": tokens} for name in configs}
    write_json(folder / RESULT, found)
    shutil.rmtree(checkpoints)
    return found


def candidates(settings: TrainerConfig, configs: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
    """Every SAE with every rate, on `lr_search_share` of the tokens."""
    rates, share = settings.lr_search, settings.lr_search_share
    if len(set(rates)) < len(rates) or len(rates) < 2:
        raise ConfigError(f"trainer.lr_search: expected at least two different learning rates, got {rates}")
    if not 0 < share <= 1:
        raise ConfigError(f"trainer.lr_search_share={share}: expected a share above 0 and at most 1")
    first = next(iter(configs.values()))
    steps = math.ceil(first.steps * share)
    if steps < MIN_STEPS:
        raise ConfigError(
            f"trainer.lr_search_share={share} of {first.steps} steps are {steps}, too few to compare learning rates: "
            f"raise trainer.tokens or the share until there are {MIN_STEPS}"
        )
    judged_from = math.ceil(steps * (1 - JUDGED_SHARE))
    return {
        joined(name, lr): replace(
            config,
            lr=lr,
            tokens=steps * config.batch_tokens,
            checkpoint_steps=judged_from,  # the last quarter is what the trainer judges at the end
            log_steps=steps,
            save_best=False,
        )
        for name, config in configs.items()
        for lr in rates
    }


def judged(trainer: JointTrainer, name: str, rates: list[float]) -> dict[str, Any]:
    """The best rate of one SAE, and the FVU of each."""
    fvu = {lr: None if (key := joined(name, lr)) in trainer.diverged else trainer.learners[key].judged for lr in rates}
    finite = {lr: value for lr, value in fvu.items() if value is not None}
    if not finite:
        raise DivergedError(f"every learning rate of the search diverged: {trainer.diverged[joined(name, min(rates))]}")
    return {"best": smallest_good(finite), "fvu": {str(lr): value for lr, value in fvu.items()}}


def smallest_good(fvu: dict[float, float]) -> float:
    """The smallest rate whose FVU is within CLOSE of the lowest."""
    lowest = min(fvu.values())
    return min(lr for lr, value in fvu.items() if value <= lowest * (1 + CLOSE))


def joined(name: str, lr: float) -> str:
    return f"{name}-lr{lr}" if name else f"lr{lr}"


def read_result(path: Path) -> dict[str, dict[str, Any]] | None:
    """The result of a search that is over; None where there is none.

    Raises:
        FormatError: damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormatError(f"{path} is damaged ({error}); delete it to search again") from None
