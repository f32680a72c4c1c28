"""Our side of `bench.train`: a stepper of `sae.steppers` with the counters the trainer keeps, the whole trainer, the floor."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

import numpy as np
import torch

from bench.common import BenchError
from bench.superposition import Superposition
from bench.train_together import fit_from_store
from bench.train_worker import RING, Problem, Served, TrainSide, serve_sides
from sae.errors import ConfigError
from sae.kernels import encoder_dtype
from sae.native.stepper import NativeStepper
from sae.steppers import TorchStepper
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.variants.build import build

CPU = torch.device("cpu")
ADAM_BYTES = 26  # a parameter: weight and two moments read and written, two bytes for the encoder's bfloat16 copy
DEAD_AFTER = 10_000_000


def train_config(problem: Problem, **settings: Any) -> TrainConfig:
    """The settings; without a learning rate our defaults, schedule included, else a constant one like the peers'.

    Raises:
        BenchError: this version does not have one of `settings`.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if missing := sorted(settings.keys() - known):
        raise BenchError(f"this ggscope has no {', '.join(missing)}")
    if problem.lr is not None:
        settings |= {"lr": problem.lr, "warmup_steps": 0, "decay_share": 0.0}
    return TrainConfig(
        num_latents=problem.num_latents,
        k=problem.k,
        batch_tokens=problem.batch,
        tokens=problem.steps * problem.batch,
        seed=problem.seed,
        dead_after_tokens=DEAD_AFTER,
        device=problem.device,
        **settings,
    )


class InMemory:
    """A `BatchSource` over given batches, again and again."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches, self.d_in, self.served = batches, batches[0].shape[1], 0

    def next(self) -> np.ndarray:
        self.served += 1
        return self.batches[self.served % len(self.batches)]

    def state(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def trainer_of(problem: Problem, source: InMemory, folder: str, **more: Any) -> Trainer:
    """Our trainer on this problem; `more`: `progress`, and fields of TrainConfig."""
    progress = more.pop("progress", None)
    return Trainer(
        train_config(problem, **more),
        source,
        mean_D=problem.mean_D.numpy(),
        variance=problem.variance,
        hook="blocks.0.hook_resid_post",
        host={},
        folder=folder,
        progress=progress,
    )


class Ours(TrainSide):
    """The trainer's stepper, and the counters that decide which latents count as dead.

    `dead`: None leaves AuxK out; else this share of the latents (0: none, but looked for) counts as dead.
    """

    def __init__(self, problem: Problem, dead: float | None = None, **settings: Any) -> None:
        nothing = InMemory([np.empty((0, problem.d_in), np.float32)])
        trainer = trainer_of(problem, nothing, "unused", **settings)
        self.config, self.model, self.stepper = trainer.config, trainer.model, trainer.learner.stepper
        self._seed, self.done = problem.seed, 0
        self.idle_F = torch.zeros(problem.num_latents, dtype=torch.int64, device=problem.device)
        self.count_dead(dead)

    def count_dead(self, share: float | None) -> None:
        """From the next step on; as `dead`."""
        drawn_F = torch.rand(len(self.idle_F), generator=torch.Generator().manual_seed(self._seed))
        self.dead, self.forced_F = share, (drawn_F < (share or 0.0)).to(self.idle_F.device)

    def step(self, x_ND: torch.Tensor) -> None:
        u_ND = x_ND * torch.as_tensor(1 / self.model.scale, dtype=torch.float32)
        result = self.stepper.step(u_ND, lr=self.config.lr_at(self.done), dead_F=self._dead_F())
        self.idle_F += len(x_ND)
        self.idle_F.masked_fill_(result.fired_F > 0, 0)
        self.done = min(self.done + 1, self.config.steps - 1)  # timed runs may be longer than the schedule

    @torch.no_grad()
    def agreement(self, x_ND: torch.Tensor) -> float:
        """Share of the k largest of every row, by float64 pre-activations, among the latents that a step takes."""
        stepper = self.stepper
        assert isinstance(stepper, TorchStepper | NativeStepper)
        u_ND = x_ND * torch.as_tensor(1 / self.model.scale, dtype=torch.float32)
        taken_NK = stepper.chosen(u_ND)
        centred_ND = u_ND.double() - self.model.b_dec_D.double()
        pre_NF = torch.addmm(self.model.b_enc_F.double(), centred_ND, self.model.W_enc_FD.double().t())
        largest_NF = torch.zeros_like(pre_NF, dtype=torch.bool).scatter_(1, pre_NF.topk(self.model.k).indices, True)
        return float(largest_NF.gather(1, taken_NK).double().mean())

    def _dead_F(self) -> torch.Tensor | None:
        if self.dead is None:
            return None
        dead_F = (self.idle_F >= DEAD_AFTER) | self.forced_F
        return dead_F if bool(dead_F.any()) else None

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.model(x_ND)


class Floor(TrainSide):
    """The encoder's matrix product in its dtype, into memory that exists; the bytes of the rest come on top.

    Bytes: pre-activations written and read; N k rows of W_dec and N k rows of x or of the gradient, float32; Adam in
    one pass. They take as long as a copy of as many bytes, measured in the same request.
    """

    def __init__(self, problem: Problem) -> None:
        dtype = encoder_dtype("auto", CPU)
        self.weight_DF = torch.randn(problem.num_latents, problem.d_in).to(dtype).t()
        self.out_NF = torch.empty(problem.batch, problem.num_latents, dtype=dtype)
        gathered = 2 * problem.batch * problem.k * problem.d_in * 4
        parameters = 2 * problem.num_latents * problem.d_in
        self.bytes = 2 * self.out_NF.nbytes + gathered + ADAM_BYTES * parameters
        self.from_, self.to = torch.zeros(1 << 26), torch.zeros(1 << 26)  # 256 MiB each: past every cache

    def step(self, x_ND: torch.Tensor) -> None:
        torch.mm(x_ND.to(self.weight_DF.dtype), self.weight_DF, out=self.out_NF)

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written ones both counted."""
        started = time.perf_counter()
        self.to.copy_(self.from_)
        return 2 * self.from_.nbytes / (time.perf_counter() - started)

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        raise BenchError("the floor reconstructs nothing")


def fit(shape: dict[str, Any], threads: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """The whole trainer on rows in memory: tokens/s between the end of its first and of its last step."""
    torch.set_num_threads(threads)
    rows = Superposition(shape["d_in"], shape["num_latents"])
    source = InMemory([rows.batch(number, shape["batch"]) for number in range(RING)])
    mean_D = source.batches[0].mean(0)
    variance = float(((source.batches[0] - mean_D) ** 2).sum(1).mean())
    problem = Problem(**shape, steps=steps, lr=None, seed=0, mean_D=torch.from_numpy(mean_D), variance=variance)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        note = lambda _tokens: times.append(time.perf_counter())  # noqa: E731
        trainer_of(problem, source, folder, checkpoint_steps=0, progress=note, **options).fit()
    return {"tokens_per_s": (steps - 1) * shape["batch"] / (times[-1] - times[0])}


def accepts(settings: dict[str, Any]) -> dict[str, Any]:
    """Whether these settings can be had here, and if not, why."""
    try:
        build(
            TrainConfig(num_latents=8, k=1, **settings), width=4, mean_D=np.zeros(4), variance=1.0,
            generator=torch.Generator(), device=CPU,
        )  # fmt: skip
    except (TypeError, ConfigError) as error:
        return {"accepted": False, "why": str(error)}
    return {"accepted": True}


def main() -> None:
    """Answer requests until the input ends."""
    served = Served({"ours": Ours, "floor": Floor})

    def floor(steps: int) -> dict[str, Any]:
        side = served.loaded()
        if not isinstance(side, Floor):
            raise BenchError("load the floor first")
        bandwidth = max(side.copy_bandwidth() for _ in range(3))
        run = served.run(steps)
        seconds = run["seconds"] / steps + side.bytes / bandwidth
        return {"tokens_per_s": served.batch / seconds, "gb_per_s": bandwidth / 1e9}

    def agreement(rows: int) -> dict[str, Any]:
        side = served.loaded()
        if not isinstance(side, Ours):
            raise BenchError("load our side first")
        return {"share": side.agreement(served.held_out(rows))}

    def count_dead(share: float | None) -> dict[str, Any]:
        side = served.loaded()
        if not isinstance(side, Ours):
            raise BenchError("load our side first")
        side.count_dead(share)
        return {}

    serve_sides(
        served, floor=floor, agreement=agreement, count_dead=count_dead, fit=fit, fit_from_store=fit_from_store,
        accepts=accepts,
    )  # fmt: skip


if __name__ == "__main__":
    main()
