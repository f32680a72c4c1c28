"""Small ggml graphs of our own beside the model: backends, buffers, one matrix product with a bias.

Everything goes through the libraries llama.cpp itself uses. On a CPU built with OpenMP the threads of a graph
computed between two llama.cpp calls (or inside its callback) are the model's own: as many threads as the model has
then cost no new ones.

Shape letters: N rows, D input width, F outputs.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from sae import large_pages
from sae.errors import LlamaError

from .symbols import (
    TYPE_F32,
    InitParams,
    cpu_device,
    device_name,
    function,
    is_cpu,
    op_name,
    tensor_at,
    tensor_get,
    tensor_set,
)

_P, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
AMX = "AMX"  # the kind of memory for products in tile registers
CONTEXT_BYTES = 1 << 18  # the structures of some dozens of tensors and one graph


_init = function("ggml_init", _P, InitParams)
_free = function("ggml_free", None, _P)
new_1d = function("ggml_new_tensor_1d", _P, _P, ctypes.c_int, _I64)
new_2d = function("ggml_new_tensor_2d", _P, _P, ctypes.c_int, _I64, _I64)
mul_mat = function("ggml_mul_mat", _P, _P, _P, _P)
add_inplace = function("ggml_add_inplace", _P, _P, _P, _P)
_new_graph = function("ggml_new_graph", _P, _P)
_expand = function("ggml_build_forward_expand", None, _P, _P)
_node_count = function("ggml_graph_n_nodes", ctypes.c_int, _P)
_node = function("ggml_graph_node", _P, _P, ctypes.c_int)
_compute = function("ggml_backend_graph_compute", ctypes.c_int, _P, _P)
_alloc_in = function("ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
_buffer_free = function("ggml_backend_buffer_free", None, _P)
_buffer_usage = function("ggml_backend_buffer_set_usage", None, _P, ctypes.c_int)
_new_buffer = function("ggml_backend_buft_alloc_buffer", _P, _P, _SIZE)
_buft_host = function("ggml_backend_buft_is_host", ctypes.c_bool, _P)
_buft_name = function("ggml_backend_buft_name", ctypes.c_char_p, _P)
_supports = function("ggml_backend_supports_op", ctypes.c_bool, _P, _P)
_default_buft = function("ggml_backend_get_default_buffer_type", _P, _P)
_backend_free = function("ggml_backend_free", None, _P)
_dev_init = function("ggml_backend_dev_init", _P, _P, ctypes.c_char_p)
_dev_reg = function("ggml_backend_dev_backend_reg", _P, _P)
_proc = function("ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
_row_bytes = function("ggml_row_size", _SIZE, ctypes.c_int, _I64)
_buffer_base = function("ggml_backend_buffer_get_base", _P, _P)
_bytes_in = function("ggml_backend_buft_get_alloc_size", _SIZE, _P, _P)
_place = function("ggml_backend_tensor_alloc", ctypes.c_int, _P, _P, _P)
_USAGE_WEIGHTS = 1


def _freed_with(owner: object, free: Callable[[int], None], address: int) -> None:
    """When the owner goes, not when Python ends: another thread may be reading then, and the system frees all."""
    weakref.finalize(owner, free, address).atexit = False


class Backend:
    """A second instance of one of llama.cpp's devices: the model's own cannot be had, and is busy."""

    def __init__(self, *, n_threads: int, device: int = 0) -> None:
        """`device`: 0 is the CPU, which computes with `n_threads`. LlamaError where it does not start."""
        self.device = device or cpu_device()
        self.name = device_name(self.device).decode()
        self.handle = _dev_init(self.device, None)
        if not self.handle:
            raise LlamaError(f"llama.cpp's device {self.name} does not start a second time")
        _freed_with(self, _backend_free, self.handle)
        self.is_cpu = is_cpu(self.device)
        self.default_buffers = _default_buft(self.handle)
        set_threads = _proc(_dev_reg(self.device), b"ggml_backend_set_n_threads")
        if set_threads:
            ctypes.CFUNCTYPE(None, _P, ctypes.c_int)(set_threads)(self.handle, n_threads)

    def buffer_types(self) -> list[int]:
        """Where an encoder's weights may lie, the device's rearranged layouts (faster products of some types) first.

        Not for tile registers: they gain nothing for one row, and our own products read the plain layout.
        """
        return [each for each in self.all_buffer_types() if buffer_type_name(each) != AMX]

    def all_buffer_types(self) -> list[int]:
        found = _proc(_dev_reg(self.device), b"ggml_backend_dev_get_extra_bufts")
        extra: list[int] = []
        if found:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(found)(self.device)
            while listed and listed[len(extra)]:
                extra.append(listed[len(extra)])
        return [*extra, self.default_buffers]

    def supports(self, tensor: int) -> bool:
        return bool(_supports(self.handle, tensor))


def buffer_type_name(buffer_type: int) -> str:
    return _buft_name(buffer_type).decode()


@contextmanager
def _context() -> Iterator[int]:
    """A ggml context for tensors that are only looked at."""
    context = _init(InitParams(CONTEXT_BYTES, None, True))
    try:
        yield context
    finally:
        _free(context)


class Tensors:
    """Tensors (a context) and the memory they lie in; both go with this object."""

    def __init__(self) -> None:
        self.context = _init(InitParams(CONTEXT_BYTES, None, True))
        _freed_with(self, _free, self.context)

    def allocate(self, buffer_type: int, *, weights: bool = False) -> None:
        """Memory for every tensor made so far. LlamaError where there is not enough."""
        self._own(_alloc_in(self.context, buffer_type), buffer_type, weights)

    def allocate_in_large_pages(self, tensor: int, buffer_type: int) -> None:
        """The same for weights that are this one tensor, in the machine's own memory."""
        n_bytes = large_pages.room(_bytes_in(buffer_type, tensor))
        buffer = _new_buffer(buffer_type, n_bytes)
        self._own(buffer, buffer_type, weights=True)
        address = _buffer_base(buffer)
        large_pages.expect(address, n_bytes)
        if _place(buffer, tensor, large_pages.start_in(address)):
            raise LlamaError(f"{buffer_type_name(buffer_type)} buffers do not take the encoder")

    def _own(self, buffer: int | None, buffer_type: int, weights: bool) -> None:
        if not buffer:
            raise LlamaError(f"no memory for the encoder in {buffer_type_name(buffer_type)} buffers")
        _freed_with(self, _buffer_free, buffer)
        if weights:
            _buffer_usage(buffer, _USAGE_WEIGHTS)


def row_bytes(kind: int, width: int) -> int:
    """Bytes of a row of `width` values of a ggml type."""
    return int(_row_bytes(kind, width))


def rearranged_for(backend: Backend, kind: int, D: int, F: int) -> int:
    """The first buffer type whose layout of a (F, D) matrix the device can multiply with a row."""
    for buffer_type in backend.buffer_types():
        with _context() as context:
            weight = new_2d(context, kind, D, F)
            product = mul_mat(context, weight, new_2d(context, TYPE_F32, D, 1))
            probe = _new_buffer(buffer_type, 0)  # of no bytes: supports_op asks where the weight would lie
            tensor_at(weight).buffer = probe
            try:
                if backend.supports(product):
                    return buffer_type
            finally:
                _buffer_free(probe)
    raise LlamaError(f"{backend.name} cannot multiply matrices of ggml type {kind} (width {D})")


class Affine:
    """pre_NF = x_ND W_FD^T + b_F on a backend, W in the type it is stored in.

    `raw` are the bytes of W (F rows of D values of ggml type `kind`), or pieces of them one after the other. They are
    copied once, into the layout the device multiplies fastest.
    """

    def __init__(
        self,
        backend: Backend,
        kind: int,
        raw: np.ndarray | Iterable[np.ndarray],
        D: int,
        bias_F: np.ndarray,
        *,
        place: int = 0,
    ) -> None:
        """`place`: the kind of memory, 0: the best one."""
        self.backend, self.D, self.F = backend, D, len(bias_F)
        self._matrix = Tensors()
        self._weight = new_2d(self._matrix.context, kind, D, self.F)
        self.buffer_type = place or rearranged_for(backend, kind, D, self.F)
        n_bytes = self.F * row_bytes(kind, D)
        large = backend.is_cpu and n_bytes >= large_pages.LEAST_BYTES
        if large:
            self._matrix.allocate_in_large_pages(self._weight, self.buffer_type)
        else:
            self._matrix.allocate(self.buffer_type, weights=True)
        self._fill([raw] if isinstance(raw, np.ndarray) else raw, n_bytes)
        if large:
            large_pages.settle(self.weight_address, n_bytes)
        self._bias = Constants(backend, {"b": bias_F})
        if missing := unsupported(backend, D, self._product_alone):
            raise _cannot(backend, missing)
        self._graphs = Graphs(backend, D, self._product_alone)

    def _fill(self, pieces: Iterable[np.ndarray], n_bytes: int) -> None:
        """Copy the weights in; a rearranged layout takes all of them at once only."""
        if self.buffer_type != self.backend.default_buffers:
            pieces = [np.concatenate([piece.copy() for piece in pieces])]
        done = 0
        for piece in pieces:
            if done + piece.nbytes <= n_bytes:
                tensor_set(self._weight, piece.ctypes.data, done, piece.nbytes)
            done += piece.nbytes
        if done != n_bytes:
            raise LlamaError(f"{done} bytes of weights, expected {self.F} rows of {n_bytes // self.F}")

    @property
    def layout(self) -> str:
        """Name of the kind of memory the weights lie in."""
        return buffer_type_name(self.buffer_type)

    @property
    def weight_address(self) -> int:
        """Where the matrix lies, on the CPU."""
        return tensor_at(self._weight).data

    def pre_acts(self, x_ND: np.ndarray) -> np.ndarray:
        """pre_NF float32; on the CPU a view that the next call overwrites."""
        return self._graphs.run(x_ND).values(0)

    def product(self, context: int, x: int) -> int:
        """The node W x + b, for x of any number of rows."""
        return add_inplace(context, mul_mat(context, self._weight, x), self._bias["b"])

    def _product_alone(self, context: int, x: int) -> list[int]:
        return [self.product(context, x)]


class Constants:
    """Named float32 vectors in a backend's memory."""

    def __init__(self, backend: Backend, values: Mapping[str, np.ndarray]) -> None:
        self._tensors = Tensors()
        self._by_name = {name: new_1d(self._tensors.context, TYPE_F32, len(v)) for name, v in values.items()}
        if values:
            self._tensors.allocate(backend.default_buffers, weights=True)
        for name, value_M in values.items():
            value_M = np.ascontiguousarray(value_M, np.float32)
            tensor_set(self._by_name[name], value_M.ctypes.data, 0, value_M.nbytes)

    def __getitem__(self, name: str) -> int:
        return self._by_name[name]


Nodes = Callable[[int, int], list[int]]  # (context, x) -> the outputs computed from x


class Graphs:
    """What is computed from rows of `D` values: a graph for each number of rows, the last three of which are kept."""

    def __init__(self, backend: Backend, D: int, nodes: Nodes) -> None:
        self._backend, self._D, self._nodes = backend, D, nodes
        self._kept: dict[int, Graph] = {}

    def run(self, x_ND: np.ndarray) -> Graph:
        """The graph of so many rows, computed. LlamaError where the device fails."""
        rows = len(x_ND)
        graph = self._kept.get(rows)
        if graph is None:
            if len(self._kept) > 2:  # one token, a whole block, a rest: no more are worth their memory
                del self._kept[next(iter(self._kept))]
            graph = self._kept[rows] = Graph(self._backend, rows, self._D, self._nodes)
        graph.put(x_ND)
        graph.compute()
        return graph


class Graph:
    """One graph for a number of rows, with its own memory."""

    def __init__(self, backend: Backend, rows: int, D: int, nodes: Nodes) -> None:
        """LlamaError where the device cannot compute one of the nodes, or has no memory for them."""
        self.backend = backend
        self._tensors = Tensors()
        context = self._tensors.context
        self.x = new_2d(context, TYPE_F32, D, rows)
        self._outputs = nodes(context, self.x)
        self._graph = _graph_of(context, self._outputs)
        if missing := _unsupported(backend, self._graph):
            raise _cannot(backend, missing)
        self._tensors.allocate(backend.default_buffers)
        host = bool(_buft_host(backend.default_buffers))
        self._views = [_host_view(tensor) for tensor in (self.x, *self._outputs)] if host else []

    @property
    def x_ND(self) -> np.ndarray | None:
        """The rows' own memory, where it is the host's."""
        return self._views[0] if self._views else None

    def put(self, x_ND: np.ndarray) -> None:
        if self._views:
            self._views[0][:] = x_ND
        else:
            x_ND = np.ascontiguousarray(x_ND, np.float32)
            tensor_set(self.x, x_ND.ctypes.data, 0, x_ND.nbytes)

    def compute(self) -> None:
        if code := _compute(self.backend.handle, self._graph):
            raise LlamaError(f"{self.backend.name} failed to compute the encoder (code {code})")

    def values(self, number: int) -> np.ndarray:
        """(N, width) of an output; on the host's memory a view that the next call overwrites."""
        return self._views[number + 1] if self._views else to_host(self._outputs[number])


def unsupported(backend: Backend, D: int, nodes: Nodes, sizes: Iterable[int] = (1,)) -> str:
    """The first operation of a graph over so many rows that the device cannot compute, "" where it can all."""
    for rows in sizes:
        with _context() as context:
            graph = _graph_of(context, nodes(context, new_2d(context, TYPE_F32, D, rows)))
            if missing := _unsupported(backend, graph):
                return missing
    return ""


def _cannot(backend: Backend, operation: str) -> LlamaError:
    return LlamaError(f"{backend.name} cannot compute {operation}, a node of the encoder")


def _graph_of(context: int, outputs: Iterable[int]) -> int:
    graph = _new_graph(context)
    for tensor in outputs:
        _expand(graph, tensor)
    return graph


def _unsupported(backend: Backend, graph: int) -> str:
    for i in range(_node_count(graph)):
        if not backend.supports(node := _node(graph, i)):
            return op_name(tensor_at(node).op).decode()
    return ""


def to_host(address: int) -> np.ndarray:
    """(N, width) of a tensor, copied to the host."""
    out = np.empty(*_shape(address))
    tensor_get(address, out.ctypes.data, 0, out.nbytes)
    return out


def _shape(address: int) -> tuple[tuple[int, int], type]:
    tensor = tensor_at(address)
    return (tensor.ne[1], tensor.ne[0]), np.float32 if tensor.type == TYPE_F32 else np.int32


def _host_view(address: int) -> np.ndarray:
    """The tensor's own memory as (N, width), without a copy and without a call that lets go of the interpreter."""
    shape, dtype = _shape(address)
    size = shape[0] * shape[1]
    pointer = ctypes.cast(tensor_at(address).data, ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype)))
    return np.ctypeslib.as_array(pointer, (size,)).reshape(shape)
