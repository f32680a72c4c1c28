"""One SAE in training: its model and stepper, dead counters, metrics, and its part of a checkpoint.

Shape letters: B rows of a batch, D d_in, F latents. u is x in the scaled units of `model.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from . import pages
from .errors import ConfigError, DivergedError
from .latent_ranks import LatentParallelStepper, shard_
from .losses import StepResult, squares
from .ranks import Ranks, with_ranks_kernel
from .steppers import Stepper, make_stepper, pick_kernel
from .train_config import FREE_KEYS, TrainConfig
from .variants.build import build
from .variants.start import start_identity
from .weights import SAEWeights
from .wiring import SAME, Wiring

CACHED_ROWS = 256  # of a batch at a time, on a CPU
FREQ_SHARE = 0.1  # freq_F counts the last tenth of the steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What the rows are and where training starts; the same for every SAE trained on them."""

    d_in: int  # columns of a batch
    mean_D: np.ndarray  # E[x]
    variance: float  # E||x - mean||^2
    hook: str
    host: dict[str, Any]
    wiring: Wiring = SAME  # the hook points of a batch's columns ...
    variances: tuple[float, ...] = ()  # ... and E||x - mean||^2 at each
    sample_ND: np.ndarray | None = None  # raw rows, where `variants.build.needs_sample`
    start: SAEWeights | None = None  # an SAE to go on from


class Learner:
    """Trains one SAE on the batches it is handed; knows neither where they come from nor where checkpoints lie.

    Raises:
        ConfigError: a variance that is not positive, an encoder dtype the device does not have.
        ShapeError: a mean that does not fit d_in.
    """

    def __init__(self, config: TrainConfig, subject: Subject, device: torch.device, ranks: Ranks | None = None) -> None:
        self.config, self.subject, self.device = config, subject, device
        self._all_ranks = ranks = ranks or Ranks()
        split = config.parallel == "latent" and ranks.world > 1
        self._ranks = Ranks() if split else ranks  # that share the rows of a batch
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.diverged = ""  # why it is trained no further
        self.judged: float | None = (
            None  # FVU over the steps before the last scheduled checkpoint, back to the one before
        )
        self.best: dict[str, Any] | None = None  # step and FVU of the best of them
        self._generator = torch.Generator().manual_seed(config.seed)
        ours = with_ranks_kernel(config, ranks)
        self.model, settings = build(
            ours,
            width=subject.d_in,
            mean_D=subject.mean_D,
            variance=subject.variance,
            generator=self._generator,
            device=device,
            sample_ND=subject.sample_ND,
            start=subject.start,
            wiring=subject.wiring,
            variances=subject.variances,
            shard_=partial(shard_, config=config, ranks=ranks) if split else None,
        )
        if split:  # its products are sparse
            settings = dataclasses.replace(settings, auxk_dtype=torch.float32)
        self.scale = self.model.scale  # one for all columns, or one for each
        self.encoder_dtype, self.auxk_dtype = settings.encoder_dtype, settings.auxk_dtype
        self.model.ranks = self._ranks
        self._stepper: Stepper
        if split:
            self._stepper = LatentParallelStepper(self.model, settings, config, ranks)
        else:
            self._stepper = make_stepper(self.model, settings, config, pick_kernel(self.model, ours, device))
        self._exported: SAEWeights | None = None
        self._target = subject.wiring.target
        mean_u_W = (subject.mean_D / self.scale)[self._target].astype(np.float32)
        self._mean_u_O = torch.from_numpy(mean_u_W).to(device)
        self._kept = pages.Scratch()
        self._idle_F = torch.zeros(config.num_latents, dtype=torch.int64, device=device)  # tokens since it fired
        self._fired_F = torch.zeros_like(self._idle_F)
        self._fired_rows = self._revived = 0
        self._window = Window(device)
        self._span_2 = torch.zeros(2, dtype=torch.float64, device=device)  # error and scatter since `judge`

    @property
    def stepper(self) -> Stepper:
        """What changes the model, batch by batch; `train` keeps the count of its steps."""
        return self._stepper

    # ---- training ----

    def prepare(self, x_BD: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the batch in scaled units, and sum_n ||u - mean||^2 of what is reconstructed, over all of
        it; SAEs of one scale share both. The rows are those of the next batch after the next call."""
        scaled = self._scaled_in_cache if self.device.type == "cpu" else self._scaled_on_device
        u_ND, scatter = scaled(self._ranks.part(x_BD))
        return u_ND, self._ranks.sum(scatter)

    def _scaled_in_cache(self, x_ND: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """In memory that is kept: new pages for every batch take longer than the arithmetic."""
        u_ND, inverse, scatters = self._kept.array("u_ND", *x_ND.shape), 1 / self.scale, []
        for start in range(0, len(x_ND), CACHED_ROWS):
            part = slice(start, start + CACHED_ROWS)
            np.multiply(x_ND[part], inverse, out=u_ND[part].numpy(), dtype=np.float32)
            scatters.append(self._scatter(u_ND[part]))
        return u_ND, torch.stack(scatters).sum()

    def _scaled_on_device(self, x_ND: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One thread of the host would take longer to scale a large batch than a GPU takes to train on it."""
        writable = x_ND if x_ND.flags.writeable else x_ND.copy()
        inverse = torch.as_tensor(1 / self.scale, dtype=torch.float32)
        u_ND = torch.from_numpy(writable).to(self.device, torch.float32) * inverse.to(self.device)
        return u_ND, self._scatter(u_ND)

    def _scatter(self, u_ND: torch.Tensor) -> torch.Tensor:
        return squares(u_ND[:, self._target] - self._mean_u_O)

    def train(self, u_BD: torch.Tensor, scatter: torch.Tensor) -> None:
        """One step on a batch (this rank's part of it) as `prepare` gives it."""
        dead_F = self._dead() if self.config.auxk_coef > 0 and self.model.uses_auxk else None
        self.model.schedule_(self.step, self.config.steps)
        rows = len(u_BD) * self._ranks.world
        result = self._stepper.step(u_BD, lr=self.config.lr_at(self.step), dead_F=dead_F)
        fired_F = result.fired_F > 0
        if dead_F is not None:
            self._window.revived += int((dead_F & fired_F).sum())
        self._idle_F += rows
        self._idle_F.masked_fill_(fired_F, 0)
        if self.step >= self.config.steps * (1 - FREQ_SHARE):
            self._fired_F += result.fired_F
            self._fired_rows += rows
        self.step += 1
        self._window.add(result, scatter, rows)
        self._span_2 += torch.stack([result.error, scatter])

    def _dead(self) -> torch.Tensor | None:
        """Mask of the latents that did not fire for dead_after_tokens; None where there is none."""
        if self.step * self.config.batch_tokens < self.config.dead_after_tokens:
            return None
        dead_F = self._idle_F >= self.config.dead_after_tokens
        return dead_F if bool(dead_F.any()) else None

    def loss(self) -> float:
        """Sum of the losses since the last report; not finite once one of them was not. Waits for the device."""
        return self._window.loss()

    def report(self, seconds: float, waited: float) -> dict[str, Any]:
        """The metrics over the steps since the last report, of which there is at least one."""
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
            "tokens_per_s": window.rows_here / seconds if seconds else 0.0,
            "wait_share": waited / seconds if seconds else 0.0,
        }
        self._window = Window(self.device)
        return dict(self.metrics)

    def judge(self) -> bool:
        """Set `judged` to the FVU over the steps since the last call, of which there is one; whether it is the best."""
        error, scatter = self._span_2.tolist()
        self._span_2.zero_()
        self.judged = error / scatter
        if self.best is not None and self.judged >= self.best["fvu"]:
            return False
        self.best = {"step": self.step, "fvu": self.judged}
        return True

    def weights(self) -> SAEWeights:
        """The SAE as it is now, in raw model units.

        Where each rank has only some latents all must ask for it; the same again needs no other rank.
        """
        if self._exported is not None and self._exported.training["step"] == self.step:
            return self._exported
        training = {
            "step": self.step,
            "tokens": self.step * self.config.batch_tokens,
            "config": plain(self.config),
            "encoder_dtype": dtype_name(self.encoder_dtype),
            "metrics": self.metrics,
        } | self._scales()
        freq_F = (self._fired_F.double() / self._fired_rows).cpu().numpy() if self._fired_rows else None
        subject = self.subject
        with self._stepper.evaluation():
            found = self.model.to_weights(
                mean_D=subject.mean_D,
                variance=subject.variance,
                hook=subject.hook,
                host=subject.host,
                training=training,
                freq_F=freq_F,
            )
        if isinstance(self._stepper, LatentParallelStepper):
            self._exported = found
        return found

    def _scales(self) -> dict[str, Any]:
        """`scale`: what rows are divided by; `scales`: each hook point's, in the order of the columns, where there are several."""
        wiring = self.subject.wiring
        if not wiring.inputs:
            return {"scale": self.scale}
        scale_W = np.broadcast_to(np.asarray(self.scale, np.float64), (wiring.width,))
        return {"scales": [float(scale_W[part.start]) for part in wiring.parts]}

    def alone(self) -> Learner:
        """A new learner of the same settings in this process alone, which takes the checkpoints of this one."""
        ranks = self._all_ranks
        if ranks.world == 1:
            return Learner(self.config, self.subject, self.device)
        device = torch.device("cpu") if self._ranks.world == 1 else self.device  # one device may not hold all latents
        found = Learner(dataclasses.replace(self.config, kernel="torch"), self.subject, device)
        found.config, found.encoder_dtype = self.config, self.encoder_dtype
        return found

    # ---- its part of a checkpoint ----

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue this run."""
        config = {key: value for key, value in plain(self.config).items() if key not in FREE_KEYS}
        mean = np.ascontiguousarray(self.subject.mean_D, np.float32).tobytes()
        return config | {
            "encoder_dtype": dtype_name(self.encoder_dtype),
            "auxk_dtype": dtype_name(self.auxk_dtype),
            "stepper": self._stepper.name,
            "d_in": self.subject.d_in,
            "hook": self.subject.hook,
            "activation_mean": hashlib.sha256(mean).hexdigest()[:16],
            "activation_variance": self.subject.variance,
        } | start_identity(self.subject.start, self.subject.wiring)  # fmt: skip

    def check_finite(self) -> None:
        """DivergedError where a parameter is not finite."""
        bad = [name for name, parameter in self.model.named_parameters() if not bool(parameter.isfinite().all())]
        if self._all_ranks.any(bool(bad), self.device):  # all stop, whoever has the latents
            where = bad[0] if bad else "a parameter on another rank"
            raise DivergedError(f"{where} holds NaN or infinity at step {self.step}; earlier checkpoints are good")

    def facts(self) -> dict[str, Any]:
        """The plain values of its state; `tensors` are the rest."""
        return {
            "identity": self.identity(),
            "metrics": self.metrics,
            "fired_rows": self._fired_rows,
            "revived": self._revived,
            "window": self._window.state(),
            "judged": self.judged,
            "best": self.best,
            "span": self._span_2.tolist(),
        }

    def tensors(self) -> dict[str, Any]:
        """Parameters, optimizer, counters and generator, as `load` takes them; views, not copies."""
        return {
            "step": self.step,
            "model": self._stepper.whole(self.model.state_dict()),
            "optimizer": self._stepper.whole(self._stepper.state_dict()),
            "idle_F": self._idle_F,
            "fired_F": self._fired_F,
            "generator": self._generator.get_state(),
        }

    def check_identity(self, identity: dict[str, Any]) -> None:
        """ConfigError that shows each difference between `identity`, read from a checkpoint's JSON, and this run's."""
        mine = json.loads(json.dumps(self.identity()))
        changed = [
            f"{name}: {identity.get(name)!r} there, {mine.get(name)!r} now"
            for name in sorted(mine.keys() | identity.keys())
            if identity.get(name) != mine.get(name)
        ]
        if changed:
            raise ConfigError("; ".join(changed))

    def load(self, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Go on from what `facts` and `tensors` gave. KeyError, RuntimeError, TypeError, ValueError: they do not fit."""
        self.step = int(tensors["step"])
        self.model.load_state_dict(self._stepper.own(tensors["model"]))
        self._stepper.load_state_dict(self._stepper.own(tensors["optimizer"]))
        self._idle_F.copy_(tensors["idle_F"])
        self._fired_F.copy_(tensors["fired_F"])
        self._generator.set_state(tensors["generator"])
        self._fired_rows, self._revived = facts["fired_rows"], facts["revived"]
        self.metrics, self.judged, self.best = facts["metrics"], facts["judged"], facts["best"]
        self._span_2.copy_(torch.tensor(facts["span"], dtype=torch.float64))
        self._window = Window(self.device)
        self._window.load(facts["window"])


class Window:
    """Sums over the steps since the last report; on the device until they are read. They go on after a resume."""

    def __init__(self, device: torch.device) -> None:
        self._sums_5 = torch.zeros(5, dtype=torch.float64, device=device)
        self.rows = self.steps = self.revived = 0
        self.rows_here = 0  # of them in this process, whose time is known

    def state(self) -> dict[str, Any]:
        """For `load`; waits for the device."""
        return {"sums": self._sums_5.tolist(), "rows": self.rows, "steps": self.steps, "revived": self.revived}

    def load(self, state: dict[str, Any]) -> None:
        self._sums_5.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.rows, self.steps, self.revived = state["rows"], state["steps"], state["revived"]

    def add(self, result: StepResult, scatter: torch.Tensor, rows: int) -> None:
        fired = result.fired_F.sum()
        self._sums_5 += torch.stack([result.error, scatter, result.auxk_loss, result.loss, fired]).double()
        self.rows += rows
        self.rows_here += rows
        self.steps += 1

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


def plain(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its name, those of the variants among them."""
    values = dataclasses.asdict(config)
    return values | values.pop("options")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
