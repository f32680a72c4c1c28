"""Training: batches in, SAEs out; can be killed anywhere and resumed to the same bits (same machine, CPU).

`Trainer` trains one SAE. `JointTrainer` trains several on the same batches, each to the bits it has when trained alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .batches import BatchSource, Peeked, Prefetcher
from .clock import Clock
from .devices import memory_failures_named, pick_device
from .errors import ConfigError, DivergedError, InterruptedRunError, ShapeError
from .learner import Learner, Subject
from .model import SparseCoder
from .pages import Scratch
from .ranks import Ranks
from .saving import BEST, Saves, common_step, restored
from .signals import Signals
from .train_config import TrainConfig, shared_settings
from .variants.build import needs_sample
from .weights import SAEWeights
from .wiring import SAME, Wiring

__all__ = ["BatchSource", "JointTrainer", "TrainConfig", "Trainer", "checkpoint_step", "pick_device"]

PLACE_KEYS = ("seed", "epoch", "served")  # of a source's state: what says where a batch is


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
    fvu + auxk_coef * auxk_loss. `progress` gets the tokens trained on so far, after every step. `start`: an SAE to go
    on from. `wiring` and `variances`: the hook points of a batch's columns, and E||x - mean||^2 at each.
    With `ranks` each process takes its part of every batch (`ranks.py`); the first logs and writes.

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
        start: SAEWeights | None = None,
        wiring: Wiring = SAME,
        variances: tuple[float, ...] = (),
        ranks: Ranks | None = None,
    ) -> None:
        if any(map(needs_sample, configs.values())):
            source = Peeked(source)
        self.ranks = ranks = ranks or Ranks()
        self.config = shared_settings(configs)
        self.source, self.step = source, 0
        self.device = pick_device(self.config.device)
        self._subject = subject = Subject(
            d_in=source.d_in, mean_D=mean_D, variance=float(variance), hook=hook, host=host, wiring=wiring,
            variances=variances, start=start, sample_ND=source.first if isinstance(source, Peeked) else None,
        )  # fmt: skip
        self._advice = memory_advice(configs)
        with memory_failures_named(f"on {self.device.type} before the first step", self._advice):
            self.learners = {name: Learner(c, subject, self.device, ranks) for name, c in configs.items()}
        scratch = Scratch()
        for learner in self.learners.values():
            learner.stepper.scratch = scratch  # they take turns
        self.saves = Saves(
            Path(folder), self.learners, keep_last=self.config.keep_last, save_best=self.config.save_best,
            writes=ranks.first,
        )  # fmt: skip
        self._log = log or (lambda _name, _metrics: None)
        self._progress = progress or (lambda _tokens: None)
        self._data_state: dict[str, Any] = source.state()
        self._finite_step = 0  # the losses up to here were looked at
        self._clock = Clock()
        self._rows_here = 0

    # ---- running ----

    def fit(self, resume: bool = False) -> dict[str, SAEWeights]:
        """Train to the end and return the SAEs in raw model units, without those that `diverged`.

        With `resume`, go on from the newest step of which every SAE has a checkpoint (from the start if there is none).

        Raises:
            ConfigError: checkpoints exist and `resume` is false, or they were made with other settings, or there is no
                step of which every SAE has one.
            InterruptedRunError: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was written.
            DivergedError: no SAE is left whose loss is a finite number; names the step, the place in the data and the
                last good checkpoint.
            OutOfMemoryError: says what to lower.
            DiskError: a checkpoint could not be written; the earlier ones are intact.
            FormatError, ShapeError: a damaged checkpoint; batches of the wrong shape.
        """
        existing = self.saves.existing()
        if existing and not resume:
            raise ConfigError(
                f"{existing[-1].parent} already holds {existing[-1].name}; resume it or take another folder"
            )
        if step := common_step(self.saves.folder, self.learners, first=self.config.first_checkpoint):
            self._data_state = self.saves.restore(step)
            self.step = self._finite_step = step
            self.source.load_state(self._data_state)
        self.saves.forget_after(step)
        config, left = self.config, self.config.steps - self.step
        with Signals() as signals, Prefetcher(self.source, config.prefetch_batches, left) as batches:
            self._clock.start()
            while self.step < config.steps:
                with self._clock.waiting():
                    ready = batches.next(lambda: self.ranks.world == 1 and signals.received is not None)
                if ready is None:
                    self._check_finite()
                    raise self._interrupted(signals.received, self._save())
                x_BD, self._data_state = ready
                self._train(x_BD)
                stop = self.ranks.any(signals.received is not None, self.device)
                self._after_step((signals.received or "another rank was stopped") if stop else None)
        return self.weights()

    def weights(self) -> dict[str, SAEWeights]:
        """The SAEs as they are now, in raw model units, without those that diverged."""
        return {name: learner.weights() for name, learner in self._alive().items()}

    def best_weights(self) -> dict[str, SAEWeights]:
        """The SAEs as they were at their best checkpoint, of those that have one which is not the newest."""
        found = {}
        for name, learner in self._alive().items():
            path = self.saves.folder / name / BEST
            if self.config.save_best and learner.best and learner.best["step"] != learner.step and path.exists():
                then = learner.alone()
                restored(then, path, learner.check_identity)
                found[name] = then.weights()
        return found

    @property
    def diverged(self) -> dict[str, str]:
        """The SAEs that were left out while others went on, and what happened."""
        return {name: learner.diverged for name, learner in self.learners.items() if learner.diverged}

    @property
    def wait_share(self) -> float:
        """Share of this process' training time in which a step waited for its batch. On a GPU an upper bound."""
        return self._clock.wait_share

    @property
    def tokens_per_s(self) -> float:
        """Over all of this process' training time; the metrics have it row by row."""
        return self._rows_here / self._clock.seconds if self._clock.seconds else 0.0

    def _alive(self) -> dict[str, Learner]:
        return {name: learner for name, learner in self.learners.items() if not learner.diverged}

    def _train(self, x_BD: np.ndarray) -> None:
        if x_BD.ndim != 2 or x_BD.shape[1] != self.source.d_in or len(x_BD) == 0:
            raise ShapeError(f"a batch must be (rows, {self.source.d_in}), the source gave {x_BD.shape}")
        with memory_failures_named(f"on {self.device.type} at step {self.step + 1}", self._advice):
            prepared: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
            for learner in self._alive().values():
                scale = np.asarray(learner.scale).tobytes()
                if scale not in prepared:
                    prepared[scale] = learner.prepare(x_BD)
                learner.train(*prepared[scale])
        self.step += 1
        self._rows_here += len(x_BD)

    def _after_step(self, received: str | None) -> None:
        config, last = self.config, self.step == self.config.steps
        # what is left over at the end joins the rows before it: a row over a step or two says little
        log_due = last or (self.step % config.log_steps == 0 and config.steps - self.step >= config.log_steps)
        save_due = last or (config.checkpoint_steps > 0 and self.step % config.checkpoint_steps == 0)
        # elsewhere than on a CPU, reading the loss waits for the step
        if self.device.type == "cpu" or log_due or save_due or received:
            self._check_finite()
        if log_due:
            self._clock.stop()
            seconds, waited = self._clock.take()
            for name, learner in self._alive().items():
                row = learner.report(seconds, waited)
                if self.ranks.first:
                    self._log(name, row)
            self._clock.start()
        self._progress(self.step * config.batch_tokens)
        if save_due or received:
            self._clock.stop()
            path = self._save(scheduled=save_due)
            if received and not last:
                raise self._interrupted(received, path)
            self._clock.start()

    def _save(self, *, scheduled: bool = False) -> Path:
        with memory_failures_named(f"while the checkpoint of step {self.step} was written", self._advice):
            path = self.saves.save(self.step, self._data_state, scheduled=scheduled)
        self.ranks.meet()
        return path

    def _interrupted(self, received: str | None, path: Path) -> InterruptedRunError:
        return InterruptedRunError(
            f"{received} after step {self.step} of {self.config.steps}; checkpoint {path}; resume=latest continues"
        )

    def _check_finite(self) -> None:
        for name, learner in self._alive().items():
            if not math.isfinite(loss := learner.loss()):
                learner.diverged = self._divergence(name, loss)
                if not self._alive():
                    raise DivergedError(learner.diverged)
                self.saves.leave_out(name)
        self._finite_step = self.step

    def _divergence(self, name: str, loss: float) -> str:
        first, good = self._finite_step + 1, self.saves.newest(name)
        at = f"at step {self.step}" if first == self.step else f"at one of the steps {first} to {self.step}"
        place = ", ".join(f"{key} {self._data_state[key]}" for key in PLACE_KEYS if key in self._data_state)
        return (
            f"the loss {f'of {name} ' if name else ''}is {loss} {at}, whose batch of {self.config.batch_tokens} rows "
            f"ends in the data at {place or 'an unknown place'} "
            f"(lr {self.learners[name].config.lr_at(self.step - 1):.3g}); last good checkpoint: {good or 'none yet'}; "
            "try a smaller lr, or check the activations"
        )


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
        start: SAEWeights | None = None,
        wiring: Wiring = SAME,
        variances: tuple[float, ...] = (),
    ) -> None:
        self.config = config
        self._joint = JointTrainer(
            {"": config}, source, mean_D=mean_D, variance=variance, hook=hook, host=host, folder=folder,
            log=(lambda _name, metrics: log(metrics)) if log else None, progress=progress,
            start=start, wiring=wiring, variances=variances,
        )  # fmt: skip

    @property
    def learner(self) -> Learner:
        """The SAE in training."""
        return self._joint.learners[""]

    @property
    def model(self) -> SparseCoder:
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

    @property
    def wait_share(self) -> float:
        """Share of the training time in which a step waited for its batch."""
        return self._joint.wait_share

    def fit(self, resume: bool = False) -> SAEWeights:
        """Train to the end, from the newest checkpoint with `resume`; raises what `JointTrainer.fit` raises."""
        return self._joint.fit(resume)[""]

    def weights(self) -> SAEWeights:
        """The SAE as it is now, in raw model units."""
        return self._joint.weights()[""]


def memory_advice(configs: Mapping[str, TrainConfig]) -> str:
    """What to lower where memory runs out."""
    latents = ", ".join(str(number) for number in sorted({config.num_latents for config in configs.values()}))
    (first, *_) = configs.values()
    together = f", or train fewer than {len(configs)} SAEs together" if len(configs) > 1 else ""
    return f"num_latents ({latents}) or batch_tokens ({first.batch_tokens}){together}"


def checkpoint_step(folder: Path | str, *names: str, first: int = 0) -> int:
    """The newest step of which each of `names` has a checkpoint in `folder`: where `fit(resume=True)` will start.

    0 if there are no checkpoints; without names, that of `folder` itself. `first`: as `common_step` has it, which also
    says what it raises.
    """
    return common_step(Path(folder), names or ("",), first=first)
