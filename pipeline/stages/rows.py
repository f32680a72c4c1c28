"""Where a training's rows come from: a store, or a capture that runs beside the training. No llama.cpp here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.batches import BatchSource
from sae.errors import ConfigError, FormatError
from sae.weights import SAEWeights
from sae.wiring import SAME, Wiring

from ..config import Config
from ..llama.hooks import HookPoint, is_pattern
from ..run import RunContext, write_json
from ..store.reader import ActivationStore
from ..store.shuffle import MIN_BLOCKS_IN_BUFFER
from ..store.side_by_side import SideBySide
from ..stream.batches import StreamBatches
from ..stream.messages import Calibration, NotFinite
from ..stream.process import CaptureProcess
from .inputs import counted, open_store, relative, store_sha256, threads

STREAM_FILE = "stream.json"  # in the run folder: what the first start measured
SOURCES = ("store", "stream")
MOST_PASSES = 10  # over the rows of a store, without a word


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Rows to train on, and what is known of them before the first step."""

    source: BatchSource
    hook: str
    host: dict[str, Any]  # ModelId.as_dict()
    mean_D: np.ndarray
    variance: float
    describe: Callable[[], str]
    finish: Callable[[SAEWeights], SAEWeights]  # adds the origin, which later stages check an SAE by
    wiring: Wiring = SAME  # where there are several hook points: which are read, which reconstructed ...
    variances: tuple[float, ...] = ()  # ... and E||x - mean||^2 at each
    not_finite: Callable[[], NotFinite] = NotFinite  # left out meanwhile; what a store left out, extract said


def training_rows(context: RunContext) -> AbstractContextManager[TrainingRows]:
    """The rows of the settings' `trainer.source`. ConfigError for an unknown one."""
    source = context.config.trainer.source
    if source not in SOURCES:
        raise ConfigError(f"trainer.source={source!r} is unknown; use one of {', '.join(SOURCES)}")
    return stream_rows(context) if source == "stream" else store_rows(context)


@contextmanager
def store_rows(context: RunContext) -> Iterator[TrainingRows]:
    trainer = context.config.trainer
    store = open_store(context)
    warn_passes(context, store.n_rows)
    if context.config.sae.kind != "sae":
        yield joint_rows(context, store)
        return
    hook = the_hook(store, context.config)
    stats = store.stats(hook)
    source = store.batches(
        hook, batch_rows=trainer.batch_tokens, seed=trainer.seed, buffer_rows=trainer.buffer_rows
    )  # fmt: skip
    digest = store_sha256(store.path)
    origin = {"store_sha256": digest, "outlier_threshold": store.hooks[hook].outlier_threshold}
    yield TrainingRows(
        source=source,
        hook=hook,
        host=store.meta.model,
        mean_D=stats.mean_D,
        variance=stats.variance,
        describe=lambda: f"{relative(store.path)} (sha256 {digest[:12]}), {store.n_rows:,} rows at {hook}",
        finish=lambda weights: with_origin(weights, origin),
    )


def warn_passes(context: RunContext, rows: int) -> None:
    """A line where the same rows come so often that the SAE will know them rather than the model."""
    tokens = context.config.trainer.tokens
    if tokens > MOST_PASSES * rows and not context.rank:
        context.console.print(
            f"warning: {tokens:,} tokens are {tokens / max(1, rows):,.0f} passes over the store's {rows:,} rows: on other text "
            "FVU will be higher than the training says; capture more rows, or lower trainer.tokens",
            style="yellow", highlight=False,
        )  # fmt: skip


def joint_rows(context: RunContext, store: ActivationStore) -> TrainingRows:
    """Rows of several hook points side by side: those of `sae.inputs`, then those of `sae.outputs`."""
    trainer, wiring = context.config.trainer, wiring_of(store, context.config)
    names = [name for name, _ in (*wiring.inputs, *wiring.outputs)]
    stats = [store.stats(name) for name in names]
    digest = store_sha256(store.path)
    origin = {
        "store_sha256": digest,
        "outlier_thresholds": {name: store.hooks[name].outlier_threshold for name in names},
    }
    written = stats[len(wiring.inputs) :] if wiring.two_sided else stats
    return TrainingRows(
        source=SideBySide(
            store, names, batch_rows=trainer.batch_tokens, seed=trainer.seed, buffer_rows=trainer.buffer_rows
        ),
        hook=names[0],
        host=store.meta.model,
        mean_D=np.concatenate([s.mean_D for s in stats]),
        variance=sum(s.variance for s in written),
        describe=lambda: f"{relative(store.path)} (sha256 {digest[:12]}), {store.n_rows:,} rows at {', '.join(names)}",
        finish=lambda weights: with_origin(weights, origin),
        wiring=wiring,
        variances=tuple(s.variance for s in stats),
    )


def wiring_of(store: ActivationStore, config: Config) -> Wiring:
    """`sae.kind`, `sae.inputs` and `sae.outputs` with the widths that the store has. ConfigError for a point it lacks."""

    def ports(texts: list[str], key: str) -> tuple[tuple[str, int], ...]:
        found = []
        for text in texts:
            name = "" if is_pattern(text) else str(HookPoint.parse(text))
            if name not in store.hooks:
                raise ConfigError(f"{key}: the store has no {text}; it holds {', '.join(store.hooks)}")
            found.append((name, store.hooks[name].width))
        return tuple(found)

    sae = config.sae
    return Wiring(
        kind=sae.kind,
        inputs=ports(sae.inputs, "sae.inputs"),
        outputs=ports(sae.outputs, "sae.outputs"),
        skip=sae.skip,
    )


@contextmanager
def stream_rows(context: RunContext) -> Iterator[TrainingRows]:
    """Rows of a capture in a child process, which ends with the context."""
    config = context.config
    if config.sae.kind != "sae":
        raise ConfigError(f"sae.kind={config.sae.kind} needs several hook points of a store; use trainer.source=store")
    if len(config.hook.points) != 1:
        points = ", ".join(config.hook.points) or "none"
        raise ConfigError(f"trainer.source=stream trains at one hook point, hook.points names {points}; give one")
    path = context.folder / STREAM_FILE
    known = read_calibration(path) if context.resumed and path.exists() else None
    with CaptureProcess(with_threads(config), context.folder, known) as capture:
        header, calibration = capture.header, capture.header.calibration
        if known is None:
            write_json(path, calibration.as_dict())
        context.inputs |= header.inputs
        source = StreamBatches(
            capture, batch_rows=config.trainer.batch_tokens, seed=config.trainer.seed,
            buffer_rows=config.trainer.buffer_rows,
        )  # fmt: skip
        if header.unflagged_rows > config.trainer.buffer_rows and source.blocks_in_buffer < MIN_BLOCKS_IN_BUFFER:
            context.console.print(
                f"warning: trainer.buffer_rows={config.trainer.buffer_rows} holds {source.blocks_in_buffer:.1f} batches of the "
                f"capture, so neighbouring rows are trained on together; give {MIN_BLOCKS_IN_BUFFER} times extract.batch_tokens",
                style="yellow", highlight=False,
            )  # fmt: skip
        yield TrainingRows(
            source=source,
            hook=calibration.hook.name,
            host=header.model,
            mean_D=calibration.pilot.mean_D,
            variance=calibration.pilot.variance,
            describe=lambda: described(source, capture),
            finish=lambda weights: finished(weights, source, capture),
            not_finite=source.not_finite,
        )


def described(source: StreamBatches, capture: CaptureProcess) -> str:
    stats, calibration = source.statistics(), capture.header.calibration
    part = "the whole corpus" if stats.whole else "a part of the corpus"
    return (
        f"{counted(capture.header.documents, 'document')} (corpus {calibration.corpus_hash[:12]}), "
        f"{stats.rows:,} unflagged rows captured ({part}) at {calibration.hook.name}"
    )


def finished(weights: SAEWeights, source: StreamBatches, capture: CaptureProcess) -> SAEWeights:
    """The SAE with the statistics of the rows that were captured in place of the pilot's, and its origin."""
    stats, calibration = source.statistics(), capture.header.calibration
    weights = dataclasses.replace(weights, mean_D=stats.mean_D.astype(np.float32), variance=stats.variance)
    origin = {
        "source": "stream",
        "corpus_hash": calibration.corpus_hash,
        "outlier_threshold": calibration.hook.outlier_threshold,
        "dtype": calibration.hook.dtype,
        "statistics": {"rows": stats.rows, "of": "corpus" if stats.whole else "rows captured"},
        "not_finite_rows": source.not_finite().rows,
        "pilot_rows": calibration.pilot.rows,
    }
    return with_origin(weights, origin)


def with_origin(weights: SAEWeights, origin: dict[str, Any]) -> SAEWeights:
    digest = hashlib.sha256(weights.W_enc_FD.tobytes() + weights.W_dec_FD.tobytes()).hexdigest()
    return dataclasses.replace(weights, training=weights.training | {"id": digest[:16]} | origin)


def read_calibration(path: Path) -> dict[str, Any]:
    try:
        return Calibration.from_dict(json.loads(path.read_bytes())).as_dict()
    except (LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); start a new run") from None


def with_threads(config: Config) -> Config:
    """The settings with the capture's share of the cores: those the trainer does not use, a half by default."""
    if config.model.n_threads:
        return config
    capture = max(1, threads(0) - trainer_threads(config))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, n_threads=capture))


def trainer_threads(config: Config) -> int:
    """Threads of torch. Beside a capture that shares the cores: those it leaves, a half by default."""
    if config.trainer.n_threads or config.trainer.source != "stream":
        return threads(config.trainer.n_threads)
    cores = threads(0)
    return max(1, cores - config.model.n_threads if config.model.n_threads else cores // 2)


def the_hook(store: ActivationStore, config: Config) -> str:
    """The one hook point to train on: the only one of the store, or the one `hook.points` names by any of its names."""
    names, points = list(store.hooks), config.hook.points
    if len(names) == 1 and (not points or any(map(is_pattern, points))):
        return names[0]
    found = [
        name for name in (str(HookPoint.parse(point)) for point in points if not is_pattern(point)) if name in names
    ]
    if len(found) == 1 and (len(points) == 1 or len(names) == 1):
        return found[0]
    wanted = f", not {', '.join(points)}" if points and not found else ""
    raise ConfigError(f"the store holds {', '.join(names)}{wanted}: train on one with hook.points=[{names[0]}]")
