"""Training: batches in, an SAE out; can be killed anywhere and resumed to the same bits (same machine, CPU)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from .batches import BatchSource, Prefetcher
from .checkpoint_torch import checkpoints, load_checkpoint, save_checkpoint
from .errors import ConfigError, DivergedError, FormatError, InterruptedRunError, ShapeError
from .initial import scale_encoder_
from .kernels import encoder_dtype
from .losses import LossSettings, StepResult
from .model import TopKSAE, input_scale
from .native.library import selects_in_int8
from .steppers import Stepper, make_stepper, pick_kernel
from .train_config import FREE_KEYS, TrainConfig
from .weights import SAEWeights

__all__ = ["BatchSource", "TrainConfig", "Trainer", "checkpoint_step"]

FREQ_SHARE = 0.1  # freq_F counts the last tenth of the steps


class Log(Protocol):
    """Takes one dict of plain numbers per `log_steps`."""

    def __call__(self, metrics: dict[str, Any], /) -> None: ...


class Trainer:
    """Trains one SAE on the rows of `source`, whose mean and E||x - mean||^2 are `mean_D` and `variance`.

    Checkpoints lie in `folder`. `log` gets, every log_steps: step, tokens, loss, fvu, l0, dead, revived, revived_total,
    auxk_loss, lr, tokens_per_s, wait_share, averaged over the steps since the last call. loss is in units of the
    variance: fvu + auxk_coef * auxk_loss. `progress` gets the tokens trained on so far, after every step.

    Raises:
        ConfigError: settings out of range, an unknown device, a variance that is not positive.
        ShapeError: a mean that does not fit the source.
    """

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
        self.config, self.source, self.folder = config, source, Path(folder)
        self.mean_D, self.variance, self.hook, self.host = mean_D, float(variance), hook, host
        self.device = pick_device(config.device)
        kernel = pick_kernel(config, self.device)
        exact = kernel == "native" and selects_in_int8(source.d_in, config.num_latents, config.k)
        self.encoder_dtype = encoder_dtype(config.encoder_dtype, self.device, float32_is_fast=exact)
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self._log = log or (lambda _metrics: None)
        self._progress = progress or (lambda _tokens: None)
        self._generator = torch.Generator().manual_seed(config.seed)
        scale = input_scale(self.variance, source.d_in)
        self.model = TopKSAE(
            d_in=source.d_in,
            num_latents=config.num_latents,
            k=config.k,
            mean_D=mean_D,
            scale=scale,
            generator=self._generator,
        ).to(self.device)
        scale_encoder_(self.model, config.init_scale)
        self._settings = LossSettings(
            variance=self.variance / scale**2,
            auxk_k=config.auxk_k or max(1, source.d_in // 2),
            auxk_coef=config.auxk_coef,
            encoder_dtype=self.encoder_dtype,
        )
        self._stepper = make_stepper(self.model, self._settings, config, kernel)
        self._mean_u_D = torch.from_numpy(mean_D.astype(np.float32) / scale).to(self.device)
        self._idle_F = torch.zeros(config.num_latents, dtype=torch.int64, device=self.device)  # tokens since it fired
        self._fired_F = torch.zeros_like(self._idle_F)
        self._fired_rows = self._revived = 0
        self._data_state: dict[str, Any] = source.state()
        self._window = _Window(self.device)

    @property
    def stepper(self) -> Stepper:
        """What changes the model, batch by batch; `fit` keeps the count of its steps."""
        return self._stepper

    # ---- running ----

    def fit(self, resume: bool = False) -> SAEWeights:
        """Train to the end and return the SAE in raw model units.

        With `resume`, go on from the newest checkpoint in the folder (from the start if there is none).

        Raises:
            ConfigError: checkpoints exist and `resume` is false, or they were made with other settings.
            InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint was written.
            DivergedError: the loss is not a finite number; names the step and the last good checkpoint.
            DiskError: a checkpoint could not be written; the earlier ones are intact.
            FormatError, ShapeError: a damaged checkpoint; batches of the wrong shape.
        """
        existing = checkpoints(self.folder)
        if existing and not resume:
            raise ConfigError(f"{self.folder} already holds {existing[-1].name}; resume it or take another folder")
        if existing:
            self._restore(existing[-1])
        config, left = self.config, self.config.steps - self.step
        with _Signals() as signals, Prefetcher(self.source, config.prefetch_batches, left) as batches:
            while self.step < config.steps:
                started = time.perf_counter()
                ready = batches.next(lambda: signals.received is not None)
                if ready is None:
                    raise self._interrupted(signals.received, self._save())
                x_BD, state = ready
                waited = time.perf_counter() - started
                self._train(x_BD)
                self._data_state = state
                self._window.time(waited, time.perf_counter() - started)
                self._after_step(signals.received)
        return self.weights()

    def weights(self) -> SAEWeights:
        """The SAE as it is now, in raw model units."""
        config = self.config
        training = {
            "step": self.step,
            "tokens": self.step * config.batch_tokens,
            "config": _plain(config),
            "encoder_dtype": _dtype_name(self.encoder_dtype),
            "scale": self.model.scale,
            "metrics": self.metrics,
        }
        freq_F = (self._fired_F.double() / self._fired_rows).cpu().numpy() if self._fired_rows else None
        return self.model.to_weights(
            mean_D=self.mean_D, variance=self.variance, hook=self.hook, host=self.host, training=training, freq_F=freq_F
        )

    def _train(self, x_BD: np.ndarray) -> None:
        if x_BD.ndim != 2 or x_BD.shape[1] != self.model.d_in or len(x_BD) == 0:
            raise ShapeError(f"a batch must be (rows, {self.model.d_in}), the source gave {x_BD.shape}")
        u_BD = torch.from_numpy(np.multiply(x_BD, 1 / self.model.scale, dtype=np.float32)).to(self.device)
        dead_F = self._dead() if self.config.auxk_coef > 0 else None
        result = self._stepper.step(u_BD, lr=self.config.lr_at(self.step), dead_F=dead_F)
        fired_F = result.fired_F > 0
        if dead_F is not None:
            self._window.revived += int((dead_F & fired_F).sum())
        self._idle_F += len(u_BD)
        self._idle_F.masked_fill_(fired_F, 0)
        if self.step >= self.config.steps * (1 - FREQ_SHARE):
            self._fired_F += result.fired_F
            self._fired_rows += len(u_BD)
        self.step += 1
        self._window.add(result, (u_BD - self._mean_u_D).pow(2).sum(), len(u_BD))

    def _dead(self) -> torch.Tensor | None:
        """Mask of the latents that did not fire for dead_after_tokens; None where there is none."""
        if self.step * self.config.batch_tokens < self.config.dead_after_tokens:
            return None
        dead_F = self._idle_F >= self.config.dead_after_tokens
        return dead_F if bool(dead_F.any()) else None

    def _after_step(self, received: str | None) -> None:
        config, last = self.config, self.step == self.config.steps
        log_due = last or self.step % config.log_steps == 0
        save_due = last or (config.checkpoint_steps > 0 and self.step % config.checkpoint_steps == 0)
        if (
            self.device.type == "cpu" or log_due or save_due or received
        ):  # elsewhere reading the loss waits for the step
            self._check_finite()
        if log_due:
            self._report()
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
        if not math.isfinite(loss := self._window.loss()):
            good = checkpoints(self.folder)
            raise DivergedError(
                f"the loss is {loss} at step {self.step} (lr {self.config.lr_at(self.step - 1):.3g}); "
                f"last good checkpoint: {good[-1] if good else 'none yet'}; try a smaller lr, or check the activations"
            )

    def _report(self) -> None:
        window = self._window
        self._revived += window.revived
        dead = int((self._idle_F >= self.config.dead_after_tokens).sum())
        fvu, auxk_loss = window.error() / window.scatter(), window.auxk()
        self.metrics = {
            "step": self.step,
            "tokens": self.step * self.config.batch_tokens,
            "loss": fvu + self.config.auxk_coef * auxk_loss,
            "fvu": fvu,
            "l0": window.l0(),
            "dead": dead,
            "revived": window.revived,
            "revived_total": self._revived,
            "auxk_loss": auxk_loss,
            "lr": self.config.lr_at(self.step - 1),
            "tokens_per_s": window.rows / window.seconds if window.seconds else 0.0,
            "wait_share": window.waited / window.seconds if window.seconds else 0.0,
        }
        self._window = _Window(self.device)
        self._log(dict(self.metrics))

    # ---- checkpoints ----

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue this run."""
        config = {name: value for name, value in _plain(self.config).items() if name not in FREE_KEYS}
        mean = np.ascontiguousarray(self.mean_D, np.float32).tobytes()
        return config | {
            "encoder_dtype": _dtype_name(self.encoder_dtype),
            "stepper": self._stepper.name,
            "d_in": self.model.d_in,
            "hook": self.hook,
            "activation_mean": hashlib.sha256(mean).hexdigest()[:16],
            "activation_variance": self.variance,
        }

    def _save(self) -> Path:
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise DivergedError(f"{name} holds NaN or infinity at step {self.step}; earlier checkpoints are good")
        meta = {
            "identity": self._identity(),
            "data_state": self._data_state,
            "metrics": self.metrics,
            "fired_rows": self._fired_rows,
            "revived": self._revived + self._window.revived,
        }
        state = {
            "step": self.step,
            "meta": json.dumps(meta),
            "model": self.model.state_dict(),
            "optimizer": self._stepper.state_dict(),
            "idle_F": self._idle_F,
            "fired_F": self._fired_F,
            "generator": self._generator.get_state(),
        }
        return save_checkpoint(self.folder, self.step, state, keep_last=self.config.keep_last)

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        try:
            meta = json.loads(state["meta"])
            identity = meta["identity"]
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{path} is incomplete ({error}); delete it to resume from the one before") from error
        mine = json.loads(json.dumps(self._identity()))
        changed = [
            f"{name}: {identity.get(name)!r} there, {mine.get(name)!r} now"
            for name in sorted(mine.keys() | identity.keys())
            if identity.get(name) != mine.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{path} was made with other settings ({'; '.join(changed)}); resume with its own, or start a new run"
            )
        try:
            self.step = int(state["step"])
            self.model.load_state_dict(state["model"])
            self._stepper.load_state_dict(state["optimizer"])
            self._idle_F.copy_(state["idle_F"])
            self._fired_F.copy_(state["fired_F"])
            self._generator.set_state(state["generator"])
            self._fired_rows, self._revived = meta["fired_rows"], meta["revived"]
            self.metrics, self._data_state = meta["metrics"], meta["data_state"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(f"{path} does not fit ({error}); delete it to resume from the one before") from error
        self.source.load_state(self._data_state)


def checkpoint_step(folder: Path | str) -> int:
    """The step of the newest checkpoint in `folder`, 0 if there is none: where `fit(resume=True)` will start."""
    found = checkpoints(Path(folder))
    return int(found[-1].stem.removeprefix("step_")) if found else 0


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


def _plain(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Window:
    """Sums over the steps since the last log line; on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums_5 = torch.zeros(5, dtype=torch.float64, device=device)
        self.rows = self.steps = self.revived = 0
        self.waited = self.seconds = 0.0

    def add(self, result: StepResult, scatter: torch.Tensor, rows: int) -> None:
        fired = result.fired_F.sum()
        self._sums_5 += torch.stack([result.error, scatter, result.auxk_loss, result.loss, fired]).double()
        self.rows += rows
        self.steps += 1

    def time(self, waited: float, seconds: float) -> None:
        self.waited += waited
        self.seconds += seconds

    def error(self) -> float:
        return float(self._sums_5[0])

    def scatter(self) -> float:
        return float(self._sums_5[1])

    def auxk(self) -> float:
        return float(self._sums_5[2]) / self.steps

    def loss(self) -> float:
        return float(self._sums_5[3])

    def l0(self) -> float:
        return float(self._sums_5[4]) / self.rows


class _Signals:
    """While it is entered, SIGINT and SIGTERM are noted instead of acted on; a second SIGINT raises at once.

    Only the main thread can take signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
