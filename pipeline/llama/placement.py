"""On which device the values of a hook point are: where an encoder of them belongs."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from .graph import GraphMap
from .hooks import HookPoint
from .model import Model
from .session import Session

_graphs: WeakKeyDictionary[Model, GraphMap] = WeakKeyDictionary()


def device_at(model: Model, point: HookPoint) -> int:
    """llama.cpp's device as it placed the blocks, asked once of a small context; 0 for the CPU.

    HookError for a point the model lacks.
    """
    if not model.offloads:
        return 0
    if model not in _graphs:
        with Session(model, n_ctx=32, n_threads=1) as session:
            _graphs[model] = session.graph
    graph = _graphs[model]
    return graph.nodes[graph.find(point).index].device
