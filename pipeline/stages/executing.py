"""With what and where `extract` captures, and what is refused before hours of tokenising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sae.errors import ConfigError, HookError

from ..capture.work import CaptureWork, blocks_needed
from ..config import Config
from ..corpus.plan import Plan
from ..extract import hook_widths
from ..llama.hooks import HookPoint
from ..llama.layer_inp import choose_backend
from ..llama.model import Model
from ..run import RunContext
from ..store.backends import Location
from ..store.writer import refuse_strangers
from .corpora import SPOOL_NAME
from .inputs import model_path, open_model

if TYPE_CHECKING:
    from ..executors import Executor


@contextmanager
def capture_model(context: RunContext) -> Iterator[tuple[Model, dict[str, int]]]:
    """The model of the settings and the width of every hook point. With `extract.load=auto` it has only the blocks that
    the points need; all of them where the corpus is generated, which takes logits.

    HookError, ConfigError, LlamaError for points that cannot be had, or not by `extract.backend`.
    """
    config = context.config
    generates = bool(config.corpus.generate_tokens)
    blocks = 0 if generates else blocks_needed(model_path(config.model), config.hook.points, config.extract)
    model = open_model(context, blocks=blocks)
    try:
        try:
            widths = _checked_widths(model, config)
        except HookError:
            if not model.truncated:
                raise
            model.close()
            model = open_model(context)  # its message names what all the model has
            widths = _checked_widths(model, config)
        yield model, widths
    finally:
        model.close()


def _checked_widths(model: Model, config: Config) -> dict[str, int]:
    widths = hook_widths(model, config.hook.points, config.model)
    choose_backend(config.extract.backend, model, [HookPoint.parse(name) for name in widths])
    return widths


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
    """What an executor's workers are told: files by absolute path, and the settings.

    Workers of a pool that map the file share its pages, so several of them need less memory with the whole of it.
    """
    extract, run = context.config.extract, context.config.model
    if context.config.executor.kind == "pool" and run.mmap and not run.n_gpu_layers:
        extract = replace(extract, load="whole")
    return CaptureWork(
        model_path=str(model.path.resolve()),
        spool=str(context.folder / SPOOL_NAME),
        store=str(store),
        model=run,
        extract=extract,
        layout=context.config.store,
        hooks=tuple(plan.hooks.items()),
    )
