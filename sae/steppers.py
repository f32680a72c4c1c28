"""One training step: gradients and update together, so that a fused pass need never write a gradient to memory.

A stepper owns the optimizer's state. The trainer only knows `Stepper`; which one runs is `make_stepper`'s choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .kernels import FastStep, has_fast_step
from .losses import LossSettings, StepResult
from .model import SparseCoder
from .optimizers import make_optimizer
from .train_config import TrainConfig


class Stepper(ABC):
    """Changes the model's parameters in place, batch by batch."""

    name: str  # recorded with the run: another stepper's sums round differently, so a resume must use the same one

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


class TorchStepper(Stepper):
    """The sparse gradients of `kernels.FastStep`, then torch's own fused Adam (or another optimizer). Any device, no
    compiler."""

    name = "torch"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig) -> None:
        self.model = model
        self._gradients = FastStep(model, settings)
        self._optimizer = make_optimizer(model, config)

    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        result = self._gradients(u_ND, dead_F)
        self._optimizer.update_(lr)
        return result

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def evaluation(self) -> AbstractContextManager[None]:
        return self._optimizer.evaluation()


def make_stepper(model: SparseCoder, settings: LossSettings, config: TrainConfig) -> Stepper:
    """The stepper for this model, device and configuration."""
    if has_fast_step(model):
        return TorchStepper(model, settings, config)
    from .autograd_stepper import AutogradStepper  # it extends Stepper

    return AutogradStepper(model, settings, config)
