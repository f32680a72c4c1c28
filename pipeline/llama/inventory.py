"""The nodes of the graph llama.cpp computes, recorded while it asks for them, and how to look through them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from .symbols import MAX_SRC, buffer_name, device_of, op_name, tensor_at, type_name

_SHAPE_ONLY = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "CONT", "CPY", "DUP"})
_COPY = re.compile(r"[^#]+#(.+)#\d+")  # an input the scheduler copied to another device: BACKEND#NAME#N


@dataclass(slots=True, eq=False)
class Node:
    """One tensor of the graph; a leaf (weight, input, cache) has index -1."""

    name: str
    op: str
    ne: tuple[int, ...]
    type: str = ""  # ggml's name of the number format
    buffer: str = ""  # the backend buffer its values lie in, as far as it is known when llama.cpp asks
    device: int = 0  # whose memory that is: symbols.device_of
    index: int = -1
    occurrence: int = 0  # how many nodes of this name came before
    op_params: tuple[int, ...] = ()
    is_dense: bool = False  # its values lie one after the other in ggml's order
    src: list[Node] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def is_leaf(self) -> bool:
        return self.index < 0

    @property
    def is_weight(self) -> bool:
        return self.is_leaf and self.name.endswith((".weight", ".bias"))


class Inventory:
    """The nodes of one graph in the order they are computed, recorded while llama.cpp asks for each."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._by_address: dict[int, Node] = {}
        self._by_name: dict[str, Node] = {}
        self._count: dict[str, int] = {}

    def record(self, address: int) -> None:
        """Add the node at this address; called in the ask phase, before it is computed."""
        tensor = tensor_at(address)
        node = self._read(tensor)
        node.index = len(self.nodes)
        node.occurrence = self._count.get(node.name, 0)
        node.op_params = tuple(tensor.op_params)
        node.src = [self._source(tensor.src[i]) for i in range(MAX_SRC) if tensor.src[i]]
        self._count[node.name] = node.occurrence + 1
        self.nodes.append(node)
        self._by_address[address] = self._by_name[node.name] = node

    @staticmethod
    def _read(tensor: Any) -> Node:
        ne, nb = tuple(tensor.ne), tuple(tensor.nb)
        return Node(
            tensor.name.decode("utf-8", "replace"),
            op_name(tensor.op).decode(),
            ne,
            type_name(tensor.type).decode(),
            buffer_name(tensor.buffer).decode("utf-8", "replace") if tensor.buffer else "",
            device_of(tensor.buffer),
            is_dense=all(ne[i] == 1 or nb[i] == nb[0] * math.prod(ne[:i]) for i in range(4)),
        )

    def _source(self, address: int) -> Node:
        if address not in self._by_address:
            leaf = self._read(tensor_at(address))
            if copied := _COPY.fullmatch(leaf.name):
                if copied[1] in self._by_name:
                    return self._by_name[copied[1]]
                leaf.name = copied[1]
            self._by_address[address] = leaf
        return self._by_address[address]


def rows_only(node: Node) -> bool:
    """A selection of rows by an input (the tokens whose logits are asked for), not of a table by token."""
    return node.op == "GET_ROWS" and not node.src[0].is_weight and node.src[1].is_leaf


def strip(node: Node, *, rows: bool = False) -> Node:
    """The tensor that holds these values, below copies and changes of shape (and, with `rows`, row selections)."""
    while not node.is_leaf and (
        (node.op in _SHAPE_ONLY and node.src and node.src[0].size == node.size) or (rows and rows_only(node))
    ):
        node = node.src[0]
    return node


def score_product(softmax: Node) -> Node | None:
    """The matrix product below a SOFT_MAX, through scaling, bias and soft-capping."""
    node = softmax.src[0]
    while not node.is_leaf and node.op != "MUL_MAT":
        if node.op not in ("SCALE", "ADD", "UNARY") and strip(node) is node:
            return None
        node = node.src[0]
    return None if node.is_leaf else node


def root(node: Node) -> Node:
    """The leaf a chain of views looks at."""
    while not node.is_leaf and node.src:
        node = node.src[0]
    return node
