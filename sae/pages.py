"""Tensors in large pages, for what is read in rows from everywhere: a page's address costs more to look up than a row to
read once the arrays are larger than what the processor remembers of them."""

from __future__ import annotations

import math

import torch

from . import large_pages

LEAST_BYTES = 4 << 20  # smaller arrays gain nothing


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of zeros on the CPU, in large pages where the system has them and it is large enough."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(large_pages.array(size)).view(dtype).view(shape)


class Scratch:
    """Arrays that are kept, for what a step leaves behind and the next one overwrites: steppers that never step at once may
    share one."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def array(self, name: str, *shape: int) -> torch.Tensor:
        """float32 of this shape, with what was last in it."""
        found = self._held.get(name)
        if found is None or found.shape != shape:
            found = self._held[name] = zeros(*shape)
        return found


def move_(parameter: torch.Tensor) -> None:
    """The same values at another address, as `zeros` has it."""
    if parameter.nbytes >= LEAST_BYTES:
        parameter.data = zeros(*parameter.shape, dtype=parameter.dtype).copy_(parameter.data)
