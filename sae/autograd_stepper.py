"""The step that works for every variant: dense autograd over all latents (`losses.dense_step`)."""

from __future__ import annotations

from typing import final

import torch

from .losses import LossSettings, StepResult, dense_step
from .model import SparseCoder
from .steppers import OptimizerStepper
from .train_config import TrainConfig


@final
class AutogradStepper(OptimizerStepper):
    """Gradients by autograd, then the optimizer. Pre-activations, latents and their gradients are (N, F) in memory."""

    name = "autograd"

    def __init__(self, model: SparseCoder, settings: LossSettings, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.settings = settings

    def gradients(self, u_ND: torch.Tensor, dead_F: torch.Tensor | None) -> StepResult:
        return dense_step(self.model, u_ND, self.settings, dead_F)
