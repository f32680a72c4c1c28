"""Rows of a transcoder's input hook point, kept until the model computes its output hook point.

Shape letters: N rows asked for, M rows of the last callback at the input, I width of the input.
"""

from __future__ import annotations

import numpy as np

from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..llama.graph import GraphMap
from ..llama.hooks import HookPoint
from ..llama.session import Hook, Rows

_SHIFT = np.int64(1 << 32)  # positions are below


class InputRows:
    """What the last callback at `point` saw. Within one micro-batch the input comes before the output."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point
        self._values_MI = np.empty((0, 0), np.float32)
        self._key_M = np.empty(0, np.int64)

    def hook(self) -> Hook:
        return Hook(point=self.point, read=self._read)

    def _read(self, rows: Rows) -> None:
        key_M = _keys(rows.seq_N, rows.pos_N)
        order_M = np.argsort(key_M)
        # copies: the view ends with the callback
        self._values_MI, self._key_M = rows.values_ND[order_M], key_M[order_M]

    def take(self, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        """The rows of these tokens, (N, I). ConfigError for one that has not passed `point`."""
        key_N = _keys(seq_N, pos_N)
        at_N = np.searchsorted(self._key_M, key_N)
        if len(self._key_M) == 0 or not np.array_equal(self._key_M[np.minimum(at_N, len(self._key_M) - 1)], key_N):
            raise ConfigError(f"the transcoder's input '{self.point}' has no rows of the tokens at its output")
        return self._values_MI[at_N]


def _keys(seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
    return seq_N.astype(np.int64) * _SHIFT + pos_N


def input_point(w: SAEWeights) -> HookPoint | None:
    """The other hook point that the latents are read from; None for SAEs, which read what they reconstruct.

    Raises:
        ConfigError: several hook points are read or reconstructed.
    """
    if not w.is_wired:
        return None
    if not w.is_transcoder:
        points = ", ".join(name for name, _ in w.ports) or f"{w.hook}, {w.hook_out}"
        raise ConfigError(f"expected an SAE or a transcoder of one input and one output, this one is over {points}")
    return HookPoint.parse(w.hook)


def output_point(w: SAEWeights) -> HookPoint:
    """The hook point that is reconstructed."""
    return HookPoint.parse(w.hook_out or w.hook)


def check_order(graph: GraphMap, reads: HookPoint, writes: HookPoint) -> None:
    """ConfigError where `reads` is not computed before `writes`, HookError where the graph lacks one of them."""
    if graph.find(reads).index >= graph.find(writes).index:
        raise ConfigError(f"expected a transcoder's input before its output, and '{reads}' is not before '{writes}'")
