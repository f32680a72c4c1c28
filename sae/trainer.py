"""Training: batches in, SAEs out; can be killed anywhere and resumed to the same bits (same machine, CPU).

`Trainer` trains one SAE. `JointTrainer` trains several on the same batches, each to the bits it has when trained alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .batches import BatchSource, Prefetcher
from .checkpoint_torch import checkpoint_path, checkpoint_steps, checkpoints, load_checkpoint, prune, save_checkpoint
from .errors import ConfigError, DivergedError, FormatError, InterruptedRunError, ShapeError
from .learner import Learner, Subject
from .model import TopKSAE
from .signals import Signals
from .train_config import SHARED_KEYS, TrainConfig
from .weights import SAEWeights

__all__ = ["BatchSource", "JointTrainer", "TrainConfig", "Trainer", "checkpoint_step"]


class Log(Protocol):
    """Takes one dict of plain numbers per `log_steps`."""

    def __call__(self, metrics: dict[str, Any], /) -> None: ...


class NamedLog(Protocol):
    """The same for several SAEs: the name of the one, then its numbers."""

    def __call__(self, name: str, metrics: dict[str, Any], /) -> None: ...


class JointTrainer:
    """Trains the SAEs of `configs` (name to settings) on the same batches; each ends as it would alone, bit for bit.

    Checkpoints of an SAE lie in `folder/name` (`folder` itself for the name ""), in the form of a run of its own; what
    the SAEs share is read from the first's settings. `mean_D` and `variance`: E[x] and E||x - mean||^2 of the rows.
    `log` gets a name and, every log_steps: step, tokens, loss, fvu, l0, dead, revived, revived_total, auxk_loss, lr,
    tokens_per_s, wait_share, averaged over the steps since the last call. loss is in units of the variance:
    fvu + auxk_coef * auxk_loss. `progress` gets the tokens trained on so far, after every step.

    Raises:
        ConfigError: settings out of range or that the SAEs cannot differ in, an unknown device, a variance that is not
            positive.
        ShapeError: a mean that does not fit the source.
    """

    def __init__(
        self,
        configs: Mapping[str, TrainConfig],
        source: BatchSource,
        *,
        mean_D: np.ndarray,
        variance: float,
        hook: str,
        host: dict[str, Any],
        folder: Path | str,
        log: NamedLog | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.config = shared_settings(configs)
        self.source, self.folder, self.step = source, Path(folder), 0
        self.device = pick_device(self.config.device)
        subject = Subject(d_in=source.d_in, mean_D=mean_D, variance=float(variance), hook=hook, host=host)
        self.learners = {name: Learner(config, subject, self.device) for name, config in configs.items()}
        self._log = log or (lambda _name, _metrics: None)
        self._progress = progress or (lambda _tokens: None)
        self._scale = next(iter(self.learners.values())).scale
        self._mean_u_D = torch.from_numpy(mean_D.astype(np.float32) / self._scale).to(self.device)
        self._data_state: dict[str, Any] = source.state()
        self._waited = self._seconds = 0.0  # since the last report

    # ---- running ----

    def fit(self, resume: bool = False) -> dict[str, SAEWeights]:
        """Train to the end and return the SAEs in raw model units.

        With `resume`, go on from the newest step of which every SAE has a checkpoint (from the start if there is none).

        Raises:
            ConfigError: checkpoints exist and `resume` is false, or they were made with other settings.
            InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint was written.
            DivergedError: the loss is not a finite number; names the step and the last good checkpoint.
            DiskError: a checkpoint could not be written; the earlier ones are intact.
            FormatError, ShapeError: a damaged checkpoint; batches of the wrong shape.
        """
        existing = [path for name in self.learners for path in checkpoints(self.folder / name)]
        if existing and not resume:
            raise ConfigError(
                f"{existing[-1].parent} already holds {existing[-1].name}; resume it or take another folder"
            )
        if step := checkpoint_step(self.folder, *self.learners):
            self._restore(step)
        config, left = self.config, self.config.steps - self.step
        with Signals() as signals, Prefetcher(self.source, config.prefetch_batches, left) as batches:
            while self.step < config.steps:
                started = time.perf_counter()
                ready = batches.next(lambda: signals.received is not None)
                if ready is None:
                    raise self._interrupted(signals.received, self._save())
                x_BD, state = ready
                self._waited += time.perf_counter() - started
                self._train(x_BD)
                self._data_state = state
                self._seconds += time.perf_counter() - started
                self._after_step(signals.received)
        return self.weights()

    def weights(self) -> dict[str, SAEWeights]:
        """The SAEs as they are now, in raw model units."""
        return {name: learner.weights() for name, learner in self.learners.items()}

    def _train(self, x_BD: np.ndarray) -> None:
        if x_BD.ndim != 2 or x_BD.shape[1] != self.source.d_in or len(x_BD) == 0:
            raise ShapeError(f"a batch must be (rows, {self.source.d_in}), the source gave {x_BD.shape}")
        u_BD = torch.from_numpy(np.multiply(x_BD, 1 / self._scale, dtype=np.float32)).to(self.device)
        scatter = (u_BD - self._mean_u_D).pow(2).sum()
        for learner in self.learners.values():
            learner.train(u_BD, scatter)
        self.step += 1

    def _after_step(self, received: str | None) -> None:
        config, last = self.config, self.step == self.config.steps
        log_due = last or self.step % config.log_steps == 0
        save_due = last or (config.checkpoint_steps > 0 and self.step % config.checkpoint_steps == 0)
        # elsewhere than on a CPU, reading the loss waits for the step
        if self.device.type == "cpu" or log_due or save_due or received:
            self._check_finite()
        if log_due:
            for name, learner in self.learners.items():
                self._log(name, learner.report(self._seconds, self._waited))
            self._waited = self._seconds = 0.0
        self._progress(self.step * config.batch_tokens)
        if save_due or received:
            path = self._save()
            if received and not last:
                raise self._interrupted(received, path)

    def _interrupted(self, received: str | None, path: Path) -> InterruptedRunError:
        return InterruptedRunError(
            f"{received} after step {self.step} of {self.config.steps}; checkpoint {path}; resume=latest continues"
        )

    def _check_finite(self) -> None:
        for name, learner in self.learners.items():
            if not math.isfinite(loss := learner.loss()):
                good = checkpoints(self.folder / name)
                raise DivergedError(
                    f"the loss {f'of {name} ' if name else ''}is {loss} at step {self.step} "
                    f"(lr {learner.config.lr_at(self.step - 1):.3g}); last good checkpoint: "
                    f"{good[-1] if good else 'none yet'}; try a smaller lr, or check the activations"
                )

    # ---- checkpoints ----

    def _save(self) -> Path:
        """Write every SAE's checkpoint, then delete the old ones: a kill in between leaves a step that all have."""
        for learner in self.learners.values():
            learner.check_finite()
        written = self.folder
        for name, learner in self.learners.items():
            meta = json.dumps(learner.facts() | {"data_state": self._data_state})
            written = save_checkpoint(self.folder / name, self.step, learner.tensors() | {"meta": meta})
        for name in self.learners:
            prune(self.folder / name, keep_last=self.config.keep_last)
        return written if len(self.learners) == 1 else self.folder

    def _restore(self, step: int) -> None:
        for name, learner in self.learners.items():
            self._data_state = restored(learner, checkpoint_path(self.folder / name, step))
        self.step = step
        self.source.load_state(self._data_state)


class Trainer:
    """Trains one SAE: `JointTrainer` with one. `log` gets the metrics alone, and checkpoints lie in `folder` itself."""

    def __init__(
        self,
        config: TrainConfig,
        source: BatchSource,
        *,
        mean_D: np.ndarray,
        variance: float,
        hook: str,
        host: dict[str, Any],
        folder: Path | str,
        log: Log | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self._joint = JointTrainer(
            {"": config}, source, mean_D=mean_D, variance=variance, hook=hook, host=host, folder=folder,
            log=(lambda _name, metrics: log(metrics)) if log else None, progress=progress,
        )  # fmt: skip

    @property
    def learner(self) -> Learner:
        """The SAE in training."""
        return self._joint.learners[""]

    @property
    def model(self) -> TopKSAE:
        """Its module, in scaled units."""
        return self.learner.model

    @property
    def step(self) -> int:
        """Steps done."""
        return self._joint.step

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of the last report."""
        return self.learner.metrics

    def fit(self, resume: bool = False) -> SAEWeights:
        """Train to the end, from the newest checkpoint with `resume`; raises what `JointTrainer.fit` raises."""
        return self._joint.fit(resume)[""]

    def weights(self) -> SAEWeights:
        """The SAE as it is now, in raw model units."""
        return self._joint.weights()[""]


def shared_settings(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """The first settings, after a check that the others have the same batches, tokens and ways to run.

    Raises:
        ConfigError: no settings, or a difference in one of SHARED_KEYS.
    """
    if not configs:
        raise ConfigError("expected the settings of at least one SAE, got none")
    first, *others = configs.items()
    for name, config in others:
        for key in SHARED_KEYS:
            one, other = getattr(first[1], key), getattr(config, key)
            if one != other:
                raise ConfigError(f"SAEs trained together share {key}: {first[0]} has {one}, {name} has {other}")
    return first[1]


def restored(learner: Learner, path: Path) -> dict[str, Any]:
    """Put the learner where the checkpoint was made; returns the state of the data there.

    Raises:
        ConfigError: made with other settings.
        FormatError: damaged.
    """
    state = load_checkpoint(path)
    try:
        meta = json.loads(state["meta"])
        identity = meta["identity"]
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is incomplete ({error}); delete it to resume from the one before") from error
    try:
        learner.check_identity(identity)
    except ConfigError as error:
        raise ConfigError(
            f"{path} was made with other settings ({error}); resume with its own, or start a new run"
        ) from None
    try:
        learner.load(meta, state)
        return meta["data_state"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{path} does not fit ({error}); delete it to resume from the one before") from error


def checkpoint_step(folder: Path | str, *names: str) -> int:
    """The newest step of which each of `names` has a checkpoint in `folder`: where `fit(resume=True)` will start.

    0 if there is none; without names, that of `folder` itself.
    """
    common = set.intersection(*(set(checkpoint_steps(Path(folder) / name)) for name in names or ("",)))
    return max(common, default=0)


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU.

    Raises:
        ConfigError: an unknown device, or CUDA asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA GPU here; use device=cpu or auto")
    return torch.device(name)
