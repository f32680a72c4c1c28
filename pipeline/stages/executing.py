"""Where `extract` captures, and what is refused before hours of tokenising."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sae.errors import ConfigError

from ..config import Config
from ..corpus.plan import Plan
from ..run import RunContext
from ..store.backends import Location
from ..store.writer import refuse_strangers
from .corpora import SPOOL_NAME

if TYPE_CHECKING:
    from ..capture.work import CaptureWork
    from ..executors import Executor
    from ..llama.model import Model


def refuse_early(config: Config, store: Location) -> None:
    """ConfigError or StoreError for settings that the plan or the store would refuse once the corpus is read."""
    batch, window = config.extract.batch_tokens, config.corpus.context_tokens
    if batch < window:
        raise ConfigError(
            f"extract.batch_tokens={batch} is less than a window of corpus.context_tokens={window}; give at least as many"
        )
    refuse_strangers(store)


def executor_of(context: RunContext) -> Executor | None:
    """The executor of the settings; None where this process captures itself."""
    config = context.config
    if config.executor.kind == "local":
        return None
    from ..executors import open_executor

    threads = config.executor.threads_per_worker or config.model.n_threads
    return open_executor(replace(config.executor, threads_per_worker=threads), context.folder)


def capture_work(context: RunContext, model: Model, plan: Plan, store: Location) -> CaptureWork:
    """What an executor's workers are told: files by absolute path, and the settings."""
    from ..capture.work import CaptureWork

    return CaptureWork(
        model_path=str(model.path.resolve()),
        spool=str(context.folder / SPOOL_NAME),
        store=str(store),
        model=context.config.model,
        extract=context.config.extract,
        layout=context.config.store,
        hooks=tuple(plan.hooks.items()),
    )
