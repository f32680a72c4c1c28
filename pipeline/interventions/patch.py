"""Putting another run's rows in place of this run's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sae.errors import ConfigError, ShapeError

from .base import Intervention, check_width, digest


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(Intervention):
    """x'[where.positions[p]] = source_PD[p], exactly.

    `where.positions` names the positions, BOS included when it is named. `targets` puts row p in one sequence only
    (several patched variants side by side in one batch); None puts it in every sequence of `where`. `columns`: only
    these dimensions of the rows, such as those of a head. The K and V of this block and those before stay as they were:
    prompt logits equal the source run's, a continuation's do not.
    """

    source_PD: np.ndarray
    targets: tuple[int, ...] | None = None
    columns: np.ndarray | None = None
    sets_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.where.positions is None:
            raise ConfigError("a patch needs positions: which rows of the source go where")
        count = len(self.where.positions)
        if self.source_PD.ndim != 2 or len(self.source_PD) != count:
            raise ShapeError(f"a patch of {count} positions needs {count} source rows, got {self.source_PD.shape}")
        if self.targets is not None and len(self.targets) != count:
            raise ShapeError(f"a patch of {count} positions needs {count} target sequences, got {len(self.targets)}")
        pairs = self._pairs()
        if len(set(pairs)) != len(pairs):
            raise ConfigError("a patch names the same position of the same sequence twice")

    def _pairs(self) -> list[tuple[int | None, int]]:
        assert self.where.positions is not None
        targets = self.targets if self.targets is not None else (None,) * len(self.where.positions)
        return list(zip(targets, self.where.positions, strict=True))

    def key(self) -> str:
        source = digest(np.asarray(self.source_PD, np.float32), self.columns)
        return f"patch({self.point};{source};targets={self.targets};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        check_width(x_ND, self.source_PD.shape[1], "the source")
        row_of = {pair: row for row, pair in enumerate(self._pairs())}
        delta_ND = np.zeros_like(x_ND)
        for n, (seq, pos) in enumerate(zip(seq_N.tolist(), pos_N.tolist(), strict=True)):
            row = row_of.get((seq if self.targets is not None else None, pos))
            if row is not None:
                delta_ND[n] = self.source_PD[row] - x_ND[n]
        if self.columns is not None:
            delta_ND[:, np.setdiff1d(np.arange(x_ND.shape[1]), self.columns)] = 0
        return delta_ND
