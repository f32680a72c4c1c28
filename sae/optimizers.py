"""The optimizers of the pure torch steppers: gradients in .grad, parameters changed in place.

Every one of them takes the part along W_dec[i] out of the decoder's gradient before the step and renormalises the
rows after it, where the variant has unit rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch

from .errors import ConfigError
from .model import SparseCoder, apply_update_
from .options import OPTIMIZERS
from .train_config import TrainConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: Jordan et al. 2024
NEWTON_SCHULZ_ROUNDS = 5


class Optimizer(ABC):
    """Owns its state; `update_` applies the gradients present."""

    @abstractmethod
    def update_(self, lr: float) -> None:
        """One step at learning rate `lr`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, what `load_state_dict` needs for the same bits."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    def evaluation(self) -> AbstractContextManager[None]:
        """While it is entered the model holds the weights to use, where those are not the ones being trained."""
        return nullcontext()


def _adam(parameters: list[torch.Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@final
class Adam(Optimizer):
    """torch's fused Adam (Kingma and Ba 2015)."""

    def __init__(self, model: SparseCoder, config: TrainConfig) -> None:
        self.model, self._adam = model, _adam(list(model.parameters()), config)

    def update_(self, lr: float) -> None:
        _set_lr(self._adam, lr)
        apply_update_(self.model, self._adam)

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state)


@final
class Muon(Optimizer):
    """Matrices along the orthogonal factor of their momentum (Jordan et al. 2024), vectors by Adam.

        m' = momentum m + (1 - momentum) g,    W' = W - lr * 0.2 sqrt(max(rows, columns)) * orth((1 - momentum) g + momentum m')

    The factor gives the step the length of Adam's, so learning rates carry over (Liu et al. 2025). torch.optim.Muon
    iterates in bfloat16, which takes seconds a step on a CPU without its instructions; here it is float32 there.
    """

    def __init__(self, model: SparseCoder, config: TrainConfig) -> None:
        self.model, self.momentum = model, config.momentum
        self._matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        self._m = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._adam = _adam([p for p in model.parameters() if p.ndim != 2], config)

    @torch.no_grad()
    def update_(self, lr: float) -> None:
        _set_lr(self._adam, lr)
        self.model.project_decoder_grad_()
        for name, matrix in self._matrices.items():
            if matrix.grad is None:
                continue
            self._m[name].lerp_(matrix.grad, 1 - self.momentum)
            direction = orthogonal_factor(torch.lerp(matrix.grad, self._m[name], self.momentum))
            matrix.add_(direction, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)
        self._adam.step()
        self.model.normalise_decoder_()

    def state_dict(self) -> dict[str, Any]:
        return {"m": self._m, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self._m.items():
            tensor.copy_(state["m"][name])
        self._adam.load_state_dict(state["adam"])


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition, roughly: five Newton-Schulz rounds, singular values within 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = (wide / wide.norm().clamp_min(1e-7)).to(torch.bfloat16 if matrix.is_cuda else matrix.dtype)
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


@final
class ScheduleFreeSignum(Optimizer):
    """The sign of the gradient, averaged without a schedule (Defazio et al. 2024, Algorithm 1 with sign steps).

        z' = z - lr sign(g(y))        x' = (1 - c) x + c z'        y' = (1 - momentum) z' + momentum x'

    c = w_t / sum_s w_s with w = (largest lr so far)^2. Gradients are taken at y, the model's parameters while it
    trains; x are the weights to use. Renormalising y divides the rows of x and z by the same norms.
    """

    def __init__(self, model: SparseCoder, config: TrainConfig) -> None:
        self.model, self.momentum = model, config.momentum
        self._x = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._z = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._largest = self._weights = 0.0

    @torch.no_grad()
    def update_(self, lr: float) -> None:
        self.model.project_decoder_grad_()
        self._largest = max(self._largest, lr)
        self._weights += self._largest**2
        share = self._largest**2 / self._weights if self._weights else 1.0
        for name, y in self.model.named_parameters():
            x, z = self._x[name], self._z[name]
            if y.grad is not None:
                z.add_(y.grad.sign(), alpha=-lr)
            x.lerp_(z, share)
            y.copy_(torch.lerp(z, x, self.momentum))
        if self.model.unit_rows:
            norm_F1 = self.model.decoder_norms()
            self._x["W_dec_FD"].div_(norm_F1)
            self._z["W_dec_FD"].div_(norm_F1)
            self.model.normalise_decoder_()

    def state_dict(self) -> dict[str, Any]:
        return {"x": self._x, "z": self._z, "largest": self._largest, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, theirs in ((self._x, state["x"]), (self._z, state["z"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self._largest, self._weights = state["largest"], state["weights"]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._put(self._x)
        self.model.normalise_decoder_()
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(model: SparseCoder, config: TrainConfig) -> Optimizer:
    """The optimizer of the settings.

    Raises:
        ConfigError: an unknown one.
    """
    makers = dict(zip(OPTIMIZERS, (Adam, ScheduleFreeSignum, Muon), strict=True))
    if config.optimizer not in makers:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {config.optimizer!r}")
    return makers[config.optimizer](model, config)
