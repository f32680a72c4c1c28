"""Generation's common case: one token is decoded, its rows are only read. ask.c copies them and has them read, inside
llama.cpp's callback and without Python.

Shape letters: D width of a hook point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sae.errors import LlamaError

from .callback import EvalCallback, Hook
from .graph import GraphMap, Target
from .native import MAX_READS, NAME_BYTES, RowRead


class RowPlace(Protocol):
    """Where a hook takes single rows instead of being called: `Hook.place`."""

    width: int
    address: int  # of memory for a float32 row, or 0 and ...
    tensor: int  # ... of a ggml tensor of one row, which may lie on another device
    call: tuple[int, int]  # addresses of a C function and its argument: called when all rows with these are there

    def is_free(self) -> bool:
        """Whether the row may be written over; if not, the hook's `read` is called."""
        ...

    def written(self, seq: int, pos: int) -> None:
        """After a decode that ended well: the row is this token's."""
        ...


class RowReads:
    """The hooks of the last decode and what was made of them; generation gives the same ones for every token."""

    def __init__(self, callback: EvalCallback, graph: GraphMap) -> None:
        self._callback, self._graph = callback, graph
        self._hooks: list[Hook] = []
        self._reads: list[RowRead] = []
        self._places: list[RowPlace] = []
        self._outputs_only = False

    def begin(self, hooks: Sequence[Hook], *, outputs: bool) -> bool:
        """Have the rows of one token copied in the next decode; False where the hooks need the general way.

        `outputs`: whether the token's logits are asked for.
        """
        if len(hooks) != len(self._hooks) or not all(a is b for a, b in zip(hooks, self._hooks, strict=True)):
            self._prepare(hooks)
        if not self._reads or (self._outputs_only and not outputs):
            return False
        for place in self._places:
            if not place.is_free():
                return False
        self._callback.read_rows(self._reads)
        return True

    def end(self, seq: int, pos: int) -> None:
        """After the decode. LlamaError where the graph was not the one that was looked at."""
        if self._callback.rows_missing():
            names = ", ".join(repr(str(hook.point)) for hook in self._hooks)
            raise LlamaError(f"the graph changed: llama.cpp gave no row of {names} as it did at first")
        for place in self._places:
            place.written(seq, pos)

    def forget(self) -> None:
        """Let go of the hooks, and of the readers behind them."""
        self._hooks, self._reads, self._places = [], [], []

    def _prepare(self, hooks: Sequence[Hook]) -> None:
        self._hooks, self._reads, self._places, self._outputs_only = list(hooks), [], [], False
        if len(hooks) > MAX_READS or not self._callback.reads_rows:
            return
        reads: list[RowRead] = []
        places: list[RowPlace] = []
        for hook in hooks:
            target = self._graph.find(hook.point)
            if hook.place is None or hook.edit is not None or not self._is_plain(target, hook.place.width):
                return
            reads.append(_read(target, hook.place))
            places.append(hook.place)
            self._outputs_only |= target.outputs_only
        self._reads, self._places = reads, places

    def _is_plain(self, target: Target, width: int) -> bool:
        """Whether a row is the tensor's own memory: other points are put in order by the general way."""
        node = self._graph.nodes[target.index]
        plain = node.type == "f32" and node.is_dense and node.size == width
        return plain and not target.heads and target.cells is None and len(target.name.encode()) < NAME_BYTES


def _read(target: Target, place: RowPlace) -> RowRead:
    return RowRead(
        name=target.name.encode(),
        op=target.op.encode(),
        width=place.width,
        into=place.address,
        tensor=place.tensor,
        then=place.call[0],
        argument=place.call[1],
        occurrence=target.occurrence,
    )
