"""Rows of several hook points of one store, aligned: what transcoders and crosscoders train on.

Letters: B batch rows, D width of a hook point, W columns of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import StoreError

if TYPE_CHECKING:
    from .reader import ActivationStore


class SideBySide:
    """Batches (B, W) float32: row b holds the same token at every hook point, in the order of `hooks`.

    One `ShuffledBatches` for each; their order depends on seed, epoch, flags and buffer alone, never on the hook.
    Implements `sae.batches.BatchSource`. `buffer_rows` of every hook point are in memory.
    """

    def __init__(
        self, store: ActivationStore, hooks: Sequence[str], *, batch_rows: int, seed: int, buffer_rows: int
    ) -> None:
        self.hooks = tuple(hooks)
        self._sources = [
            store.batches(hook, batch_rows=batch_rows, seed=seed, buffer_rows=buffer_rows) for hook in self.hooks
        ]
        self.d_in = sum(source.d_in for source in self._sources)

    def next(self) -> np.ndarray:
        return np.concatenate([source.next() for source in self._sources], axis=1)

    def state(self) -> dict[str, Any]:
        """Where each hook point's stream is; they are all at the same row."""
        return {"hooks": [source.state() for source in self._sources]}

    def load_state(self, state: dict[str, Any]) -> None:
        states = state.get("hooks")
        if not isinstance(states, list) or len(states) != len(self._sources):
            raise StoreError(f"cannot resume the batches: their state is not of {', '.join(self.hooks)}")
        for source, part in zip(self._sources, states, strict=True):
            source.load_state(part)
