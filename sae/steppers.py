"""One training step: gradients and update together, so that a fused pass need never write a gradient to memory.

A stepper owns the optimizer's state. The trainer only knows `Stepper`; which one runs is `make_stepper`'s choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import ConfigError
from .kernels import FastStep, has_fast_step
from .losses import LossSettings, StepResult
from .model import SparseCoder
from .optimizers import make_optimizer
from .pages import Scratch
from .train_config import TrainConfig

FUSED = "on one hook point with unit decoder rows, Adam, no layer norm"


class Stepper(ABC):
    """Changes the model's parameters in place, batch by batch."""

    name: str  # recorded with the run: another stepper's sums round differently, so a resume must use the same one
    scratch: Scratch | None = None  # set before the first step: what steppers that take turns may share

    @abstractmethod
    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        """One update at learning rate `lr`; `dead_F` (bool) turns AuxK on where any is true."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state: tensors and plain values, what `load_state_dict` needs for the same bits."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    def evaluation(self) -> AbstractContextManager[None]:
        """While it is entered the model holds the weights to export, where those are not the ones being trained."""
        return nullcontext()

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of the model or of this stepper with the latents of all ranks, where each has only some."""
        return state

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """The reverse of `whole`: the part of this rank."""
        return state


class OptimizerStepper(Stepper):
    """Gradients from a subclass's `gradients`, left in .grad, then an optimizer of `optimizers.py`, whose state it is.

    Where `model.ranks` share the rows of a batch each has gradients and numbers of its own; every rank takes those of all.
    """

    def __init__(self, model: SparseCoder, config: TrainConfig) -> None:
        self.model = model
        self._optimizer = make_optimizer(model, config)
        if model.ranks.world > 1:
            self.name = f"{self.name}-{model.ranks.world}-ranks"

    @abstractmethod
    def gradients(self, u_ND: torch.Tensor, dead_F: torch.Tensor | None) -> StepResult:
        """Write the gradients of the loss to .grad and return the numbers, of this rank's rows."""

    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        result, ranks = self.gradients(u_ND, dead_F), self.model.ranks
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = ranks.mean(parameter.grad)
        self._optimizer.update_(lr)
        return StepResult(
            error=ranks.sum(result.error),
            auxk_loss=ranks.mean(result.auxk_loss),
            loss=ranks.mean(result.loss),
            fired_F=ranks.sum(result.fired_F),
        )

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def evaluation(self) -> AbstractContextManager[None]:
        return self._optimizer.evaluation()


class TorchStepper(OptimizerStepper):
    """The sparse gradients of `kernels.FastStep`, then torch's own fused Adam (or another optimizer). Any device, no
    compiler."""

    name = "torch"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig) -> None:
        super().__init__(model, config)
        self._gradients = FastStep(model, settings)

    def gradients(self, u_ND: torch.Tensor, dead_F: torch.Tensor | None) -> StepResult:
        return self._gradients(u_ND, dead_F)

    def state_dict(self) -> dict[str, Any]:
        guess = self._gradients.guess
        return super().state_dict() | ({} if guess is None else {"guess": guess.state()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        guess = self._gradients.guess
        if guess is not None and "guess" in state:
            guess.load(state["guess"])
        super().load_state_dict({name: part for name, part in state.items() if name != "guess"})

    @torch.no_grad()
    def chosen(self, u_ND: torch.Tensor) -> torch.Tensor:
        """idx_NK of the latents a step with these rows takes; TopK and GroupMax."""
        return self._gradients.encode(self.model.centred(self.model.prepare(u_ND).input_ND))[0].idx


def pick_kernel(model: SparseCoder, config: TrainConfig, device: torch.device) -> str:
    """ "torch", "native" or "triton". "auto": native on a CPU, triton on a GPU, where it can be had and has this model's
    step.

    Raises:
        ConfigError: native or triton was asked for and cannot be had.
    """
    wanted = config.kernel
    if wanted == "auto":
        wanted = {"cpu": "native", "cuda": "triton"}.get(device.type, "torch")
    if wanted == "torch":
        return "torch"
    why = (_no_native if wanted == "native" else _no_triton)(model, config, device)
    if why and config.kernel != "auto":
        raise ConfigError(f"kernel={wanted} {why}; use kernel=auto")
    return "torch" if why else wanted


def _no_native(model: SparseCoder, config: TrainConfig, device: torch.device) -> str:
    """Why the compiled step cannot be had; empty where it can."""
    if device.type != "cpu":
        return f"runs on a CPU, the device is {device.type}"
    if not has_fused_step(model, config, ("topk", "batchtopk")):
        return f"is for variant topk or batchtopk {FUSED}"
    from .native.library import SERIAL_THREADS, native_library  # here: the compiler starts only where they are wanted

    library = native_library()
    if library is None:
        return "needs a C compiler that works (see the warning above)"
    slow = config.kernel == "auto" and not library.has_threads and torch.get_num_threads() > SERIAL_THREADS
    return f"has one thread, torch has {torch.get_num_threads()}" if slow else ""


def _no_triton(model: SparseCoder, config: TrainConfig, device: torch.device) -> str:
    """Why the Triton kernels cannot be had; empty where they can."""
    from .gpu.check import MOST_DIMENSIONS, trouble  # it extends Stepper

    if not has_fused_step(model, config, ("topk",)) or model.d_in > MOST_DIMENSIONS:
        return f"is for variant topk {FUSED}, at most {MOST_DIMENSIONS} dimensions"
    why = trouble(model.d_in, model.num_latents, max(model.k, config.options.k_start), device)
    return why and f"cannot be had: {why}"


def has_fused_step(model: SparseCoder, config: TrainConfig, choices: tuple[str, ...]) -> bool:
    """Whether a fused step with these choices of the latents has this model's, and its loss and optimizer."""
    return (
        has_fast_step(model)
        and model.selects in choices
        and model.wiring.kind == "sae"
        and config.optimizer == "adam"
        and config.options.input_norm != "layer"
    )


def make_stepper(model: SparseCoder, settings: LossSettings, config: TrainConfig, kernel: str = "torch") -> Stepper:
    """The stepper for this model and configuration; `kernel` is what `pick_kernel` said."""
    if kernel == "native":
        from .native.library import native_library
        from .native.stepper import NativeStepper  # it is a Stepper: not before this module is there

        library = native_library()
        assert library is not None, "pick_kernel looked"
        return NativeStepper(model, settings, config, library)
    if kernel == "triton":
        from .gpu.stepper import TritonStepper

        return TritonStepper(model, settings, config)
    if has_fast_step(model):
        return TorchStepper(model, settings, config)
    from .autograd_stepper import AutogradStepper  # it extends Stepper

    return AutogradStepper(model, settings, config)
