"""The step that works for every variant: dense autograd over all latents (`losses.dense_step`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, final

import torch

from .losses import LossSettings, StepResult, dense_step
from .model import SparseCoder
from .optimizers import make_optimizer
from .steppers import Stepper
from .train_config import TrainConfig


@final
class AutogradStepper(Stepper):
    """Gradients by autograd, then the optimizer. Pre-activations, latents and their gradients are (N, F) in memory."""

    name = "autograd"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig) -> None:
        self.model, self.settings = model, settings
        self._optimizer = make_optimizer(model, config)

    def step(self, u_ND: torch.Tensor, *, lr: float, dead_F: torch.Tensor | None = None) -> StepResult:
        result = dense_step(self.model, u_ND, self.settings, dead_F)
        self._optimizer.update_(lr)
        return result

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def evaluation(self) -> AbstractContextManager[None]:
        return self._optimizer.evaluation()
