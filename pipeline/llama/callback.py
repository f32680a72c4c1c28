"""The callback llama.cpp calls for every node of the graph: hooks, early stop, exceptions.

llama.cpp asks for each node before it computes it (`ask`), then hands over the nodes asked for. Returning False at
hand-over ends only the current part ("split") of the current micro-batch; later parts and micro-batches still run,
on inputs that were never written. So after a stop or an exception the first node of every later part is asked for
and refused again. An exception inside a ctypes callback would be printed and lost: it is kept and raised by the
caller after `llama_decode` has returned.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sae.errors import LlamaError

from . import native
from .graph import GraphMap, Target
from .hooks import HookPoint
from .inventory import Inventory
from .symbols import MAX_SRC, NAME_OFFSET, lc, op_name, tensor_at, tensor_get
from .tensors import TensorWindow, add_delta_, as_rows, half_apart

if TYPE_CHECKING:
    from .row_reads import RowPlace


@dataclass(slots=True)
class Rows:
    """Rows of one hook point, in the order llama.cpp computed them; `seq_N` and `pos_N` say which they are.

    `values_ND` is (N, width) float32, or (N, heads, positions) for an attention pattern. It is a view that is valid
    during the call only: copy what is kept. `index_N` are the rows' places in the arrays given to `decode`.
    """

    values_ND: np.ndarray
    seq_N: np.ndarray
    pos_N: np.ndarray
    index_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Hook:
    """Look at a point, or change it, or both: `read` sees the values before this hook's own `edit`.

    `edit` returns delta, shaped like the values: x + delta is what the forward pass goes on with; None changes nothing.
    `place`: where the row of a decode of one token may be put instead of calling `read` (row_reads.py).
    """

    point: HookPoint
    read: Callable[[Rows], None] | None = None
    edit: Callable[[Rows], np.ndarray | None] | None = None
    place: RowPlace | None = None


@dataclass(slots=True)
class Cells:
    """Which (sequence, position) each KV cell holds; one buffer, or one per sequence (`stride` cells each)."""

    unified: bool
    stride: int
    seq_C: np.ndarray
    pos_C: np.ndarray
    used: dict[int, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, total: int, *, streams: int) -> Cells:
        return cls(streams == 1, total // streams, np.full(total, -1, np.int32), np.zeros(total, np.int32))

    def append(self, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        """Cells of new tokens: the next free ones, in order of arrival (nothing is ever removed singly)."""
        if len(seq_N) == 1:  # as below, without arrays of one
            stream = 0 if self.unified else int(seq_N[0])
            start = self.used.get(stream, 0)
            self.used[stream] = start + 1
            cell = stream * self.stride + start
            self.seq_C[cell], self.pos_C[cell] = seq_N[0], pos_N[0]
            return np.array([cell])
        cells_N = np.empty(len(seq_N), np.int64)
        for stream in [0] if self.unified else np.unique(seq_N).tolist():
            rows = np.arange(len(seq_N)) if self.unified else np.flatnonzero(seq_N == stream)
            start = self.used.get(stream, 0)
            cells_N[rows] = stream * self.stride + start + np.arange(len(rows))
            self.used[stream] = start + len(rows)
        self.seq_C[cells_N], self.pos_C[cells_N] = seq_N, pos_N
        return cells_N

    def clear(self) -> None:
        self.seq_C.fill(-1)
        self.used.clear()


@dataclass(slots=True)
class DecodePlan:
    """What one `llama_decode` computes and which hooks look at it."""

    tokens_N: np.ndarray
    seq_N: np.ndarray
    pos_N: np.ndarray
    output_N: np.ndarray
    pieces: list[np.ndarray]  # batch rows of each micro-batch
    hooks: dict[Target, list[Hook]]
    stop_early: bool


class EvalCallback:
    """The state machine behind `cb_eval`. One per context, which it must outlive; not thread-safe."""

    def __init__(self) -> None:
        self._python = lc.ggml_backend_sched_eval_callback(self._entry)
        self._filter: native.AskFilter | None = None
        self.c = self._python  # what the context is given, and ...
        self.user_data: int | None = None  # ... with what
        if (compiled := native.ask_function()) is not None:
            self._filter = native.AskFilter(self._python)
            self.c = ctypes.cast(compiled, lc.ggml_backend_sched_eval_callback)
            self.user_data = ctypes.addressof(self._filter)
        self.error: BaseException | None = None
        self.inventory: Inventory | None = None
        self.cells = Cells.empty(1, streams=1)  # the context's, set once its size is known
        self._plan: DecodePlan | None = None
        self._reads: Sequence[native.RowRead] | None = None  # rows copied in the decode under way
        self._windows: dict[Target, TensorWindow] = {}

    def arm(self, plan: DecodePlan, graph: GraphMap) -> None:
        """Prepare for one decode."""
        self.error, self._reads = None, None
        self._plan = plan if plan.hooks else None
        if self._filter is not None:
            self._filter.count = self._filter.read_count = 0
            self._filter.every = native.PYTHON_EVERY if plan.hooks else 0  # without one there is nothing to end
        if plan.hooks:
            self._look_for(plan, graph)
        self._set_always()

    def _look_for(self, plan: DecodePlan, graph: GraphMap) -> None:
        self._first = graph.first.encode()
        self._by_name: dict[bytes, dict[int, Target]] = {}
        for target in plan.hooks:
            self._by_name.setdefault(target.name.encode(), {})[target.occurrence] = target
        self._cell_writers = {(t.cells[0].encode(), t.cells[1]) for t in plan.hooks if t.cells}
        self._watched = {*self._by_name, *(name for name, _ in self._cell_writers)}
        # one row is the row asked for: nothing to compare
        self._ordered = any(len(piece) > 1 for piece in plan.pieces)
        self._positions_of = _position_nodes(graph) if self._ordered else b""
        self._piece = -1
        self._stopped = False
        self._deepest = max(t.index for t in plan.hooks)
        if self._filter is not None:
            self._unfiltered = not self._filter.watch([*self._watched, self._first, self._positions_of])

    @property
    def reads_rows(self) -> bool:
        """Whether rows can be read without Python."""
        return self._filter is not None

    def read_rows(self, reads: Sequence[native.RowRead]) -> None:
        """Prepare for the decode of one token whose rows are copied as `reads` say, in place of `arm`."""
        assert self._filter is not None
        self.error, self._plan = None, None
        if self._reads is not reads:
            self._filter.read(reads)
            self._reads = reads
        self._filter.begin()
        self._set_always()

    def rows_missing(self) -> int:
        """How many rows the last decode did not give."""
        return 0 if self._filter is None else self._filter.missing

    def disarm(self, plan: DecodePlan) -> None:
        """After a decode that ended well; LlamaError when the graph did not have what was planned."""
        hooked, self._plan = self._plan, None
        if hooked is None:
            for piece in plan.pieces:
                self.cells.append(plan.seq_N[piece], plan.pos_N[piece])
        elif self._piece + 1 != len(plan.pieces):
            raise LlamaError(f"llama.cpp ran {self._piece + 1} micro-batches, expected {len(plan.pieces)}")

    def abandon(self) -> None:
        """After a decode that did not end well."""
        self._plan = None
        self.error = None

    def interrupt(self) -> None:
        """End the decode under way as an exception of a hook would; called between two callbacks."""
        self.error = self.error or KeyboardInterrupt()
        self._set_always()

    def _set_always(self) -> None:
        """Whether Python has to see every node: after a stop or an exception, and while the graph is recorded."""
        if self._filter is not None:
            wanted = self._plan is not None and (self._stopped or self._unfiltered)
            self._filter.always = wanted or self.error is not None or self.inventory is not None

    def _entry(self, address: int, ask: bool, _user_data: int | None) -> bool:
        try:
            if ask:
                return self._ask(address)
            return self._take(address)
        except BaseException as error:  # noqa: BLE001 - raised again after llama_decode
            self.error = self.error or error
            return bool(ask)  # asked: take this node to refuse it; handed over: refuse
        finally:
            self._set_always()

    def _ask(self, address: int) -> bool:
        if self._plan is None:
            if self.inventory is not None:
                self.inventory.record(address)
            return False
        if self.error is not None:
            return True
        name = ctypes.string_at(address + NAME_OFFSET)
        if name == self._first:
            self._begin(address)
        elif self._stopped:
            return True
        if self._ordered and name == self._positions_of:
            self._check_positions(address)
        if name not in self._watched:
            return False
        count = self._seen[name] = self._seen.get(name, -1) + 1
        if (name, count) in self._cell_writers:
            self._check_cells(address)
        self._current = self._by_name.get(name, {}).get(count)
        return self._current is not None

    def _take(self, address: int) -> bool:
        if self.error is not None or self._stopped or self._plan is None:
            return False
        target = self._current
        assert target is not None
        if op_name(tensor_at(address).op).decode() != target.op:
            raise LlamaError(f"the graph changed under '{target.point}': '{target.name}' is another operation now")
        self._serve(target, address)
        if self._plan.stop_early and target.index >= self._deepest:
            self._stopped = True
            return False
        return True

    def _begin(self, address: int) -> None:
        """A new micro-batch: which rows it has, checked against the graph's own token input."""
        assert self._plan is not None
        self._piece += 1
        self._stopped = False
        self._seen: dict[bytes, int] = {}
        if self._piece >= len(self._plan.pieces):
            raise LlamaError(f"llama.cpp ran more than the expected {len(self._plan.pieces)} micro-batches")
        self._rows = self._plan.pieces[self._piece]
        self._output_rows = self._rows[self._plan.output_N[self._rows] != 0]
        self._cell_N = self.cells.append(self._plan.seq_N[self._rows], self._plan.pos_N[self._rows])
        if self._ordered:
            tokens_N = _input_values(address, b"inp_tokens", len(self._rows))
            self._must_equal(tokens_N, self._plan.tokens_N[self._rows], "tokens")

    def _check_positions(self, address: int) -> None:
        assert self._plan is not None
        pos_N = _input_values(address, b"inp_pos", len(self._rows))
        self._must_equal(pos_N, self._plan.pos_N[self._rows], "positions")

    def _check_cells(self, address: int) -> None:
        cells_N = _input_values(address, b"k_idxs", len(self._rows), np.int64)
        self._must_equal(cells_N, self._cell_N, "KV cells")

    def _must_equal(self, came_N: np.ndarray | None, expected_N: np.ndarray, what: str) -> None:
        if came_N is not None and not np.array_equal(came_N, expected_N):
            raise LlamaError(
                f"llama.cpp ordered the {what} of a micro-batch differently than expected: "
                "rows cannot be told apart; use kv_unified=true or one sequence at a time"
            )

    def _serve(self, target: Target, address: int) -> None:
        """Hand one tensor to its hooks and write back what they changed."""
        assert self._plan is not None
        index_N = self._output_rows if target.outputs_only else self._rows
        if not len(index_N):  # this micro-batch has no token whose logits were asked for
            return
        label = str(target.point)
        window = self._windows.setdefault(target, TensorWindow())
        window.open(address, label)
        raw = window.read()
        rows = Rows(raw, self._plan.seq_N[index_N], self._plan.pos_N[index_N], index_N)
        order = None
        if target.point.site == "pattern":
            rows.values_ND = self._pattern(raw, rows)
        else:
            rows.values_ND = flat_ND = as_rows(raw, len(index_N), label)
            if target.heads:
                order = half_apart(flat_ND.shape[1], target.heads)
                rows.values_ND = flat_ND[:, order]
        if self._run_hooks(self._plan.hooks[target], rows, label):
            if target.point.site == "pattern":
                raise LlamaError(f"{label} can be read, not edited")
            place = as_rows(raw, len(index_N), label)
            if order is not None:
                place[:, order] = rows.values_ND
            elif not np.shares_memory(place, rows.values_ND):
                place[...] = rows.values_ND
            if not np.shares_memory(place, raw):
                raw[...] = place.reshape(raw.shape)
            window.write()

    @staticmethod
    def _run_hooks(hooks: list[Hook], rows: Rows, label: str) -> bool:
        changed = False
        for hook in hooks:
            if hook.read is not None:
                hook.read(rows)
            if hook.edit is not None and (delta := hook.edit(rows)) is not None:
                add_delta_(rows.values_ND, delta, label)
                changed = True
        return changed

    def _pattern(self, raw: np.ndarray, rows: Rows) -> np.ndarray:
        """(streams, heads, tokens, cells) to (N, heads, positions of the row's own sequence)."""
        streams, heads, tokens, cells = raw.shape
        by_row = raw.transpose(0, 2, 1, 3).reshape(streams * tokens, heads, cells)
        out = np.zeros((len(rows.seq_N), heads, int(rows.pos_N.max()) + 1), np.float32)
        for seq in np.unique(rows.seq_N).tolist():
            offset = 0 if self.cells.unified else seq * self.cells.stride
            held = np.flatnonzero(self.cells.seq_C[offset : offset + cells] == seq)
            pos = self.cells.pos_C[offset + held]
            inside = pos < out.shape[2]
            which = np.flatnonzero(rows.seq_N == seq)
            out[which[:, None], :, pos[inside]] = by_row[which[:, None], :, held[inside]]
        return out


def _position_nodes(graph: GraphMap) -> bytes:
    """Name of the first node that reads the positions."""
    for node in graph.nodes:
        if any(source.is_leaf and source.name == "inp_pos" for source in node.src):
            return node.name.encode()
    return b""


def _input_values(address: int, suffix: bytes, count: int, dtype: type = np.int32) -> np.ndarray | None:
    """The first `count` values of the input (by the end of its name) a node reads; None when it reads no such input.

    Valid in the ask phase only: the memory of an input may be used again later in the graph.
    """
    tensor = tensor_at(address)
    for i in range(MAX_SRC):
        if tensor.src[i]:
            source = tensor_at(tensor.src[i])
            name = source.name.partition(b"#")[2].rpartition(b"#")[0] or source.name
            if name.endswith(suffix):
                if source.ne[0] < count:
                    return np.empty(0, dtype)
                values = np.empty(count, dtype)
                tensor_get(tensor.src[i], values.ctypes.data, 0, values.nbytes)
                return values
    return None
