"""The real graph llama.cpp computes, and where the hook points lie in it.

Points are found by structure: operations, sources, consumers, and which weights (`blk.N.*`, fixed by the GGUF
format) a branch of the residual stream uses. The names of intermediate tensors differ by architecture and
decide nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sae.errors import HookError

from .hooks import MODEL_SITES, HookPoint, describe_tensors, described, expand
from .inventory import Inventory, Node, root, rows_only, score_product, strip

_NOT_ATTENTION = re.compile("SSM_|RWKV_|GATED_LINEAR_ATTN|GATED_DELTA|LIGHTNING")
_SITES_OF = {
    "attn": ("ln1", "attn_out", "q", "k", "v", "rot_q", "rot_k", "z", "pattern"),
    "mlp": ("ln2", "mlp_out", "mlp_post", "router", "expert_weights"),
}
NORMS = ("NORM", "RMS_NORM")
_WEIGHT = re.compile(r"blk\.(\d+)\.")
# Architectures whose GGUF has the rows of q and k as RoPE pairs beside each other where HF has them half a head apart:
# a matter of the converter, not to be seen in the graph. llama and mistral are tested, the others follow llama.cpp's
# own converter. (llama4 turns neighbours in HF too: its rows are in HF's order.)
INTERLEAVED_QK = frozenset(
    {"llama", "mistral3", "granite", "granitemoe", "granitehybrid", "deci", "arcee", "smollm3", "arctic", "baichuan"}
    | {"bailingmoe", "chameleon", "deepseek", "internlm2", "llada", "minicpm", "nanbeige", "olmo", "xverse"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a hook point's values are computed."""

    point: HookPoint
    name: str
    occurrence: int
    op: str
    index: int
    outputs_only: bool  # rows exist only for tokens whose logits are asked for
    heads: int = 0  # > 0: rows of each head are stored interleaved (RoPE pairs), HF has them half a head apart
    cells: tuple[str, int] | None = None  # pattern: the node that writes this block's keys, for its cell indices


@dataclass(frozen=True, slots=True)
class Step:
    """One addition to the residual stream: after = before + sum of branches."""

    after: Node
    branches: list[Node]
    before: Node


class Resolver:
    """Finds the hook points of an inventory."""

    def __init__(self, inventory: Inventory, *, n_vocab: int, architecture: str) -> None:
        self.nodes = inventory.nodes
        self.interleaved = architecture in INTERLEAVED_QK
        self.n_vocab = n_vocab
        self.targets: dict[HookPoint, Target] = {}
        self._ancestors: list[int] = []  # bit i of entry j: node i feeds node j
        self._outputs_only: list[bool] = []
        for node in self.nodes:
            inner = [source for source in node.src if not source.is_leaf]
            bits = 0
            for source in inner:
                bits |= self._ancestors[source.index] | (1 << source.index)
            self._ancestors.append(bits)
            self._outputs_only.append(rows_only(node) or any(self._outputs_only[s.index] for s in inner))

    def resolve(self) -> dict[HookPoint, Target]:
        """Every point this graph has; those it lacks are absent."""
        if not (unembed := self._unembed()):
            return self.targets
        self._add("logits", None, self.nodes[-1])
        normed = strip(unembed.src[1])
        self._add("ln_final", None, normed)
        if final := self._before_norm(normed):
            self._residual(list(self._steps(final)))
        return self.targets

    def _add(self, site: str, block: int | None, node: Node, **more: Any) -> None:
        if not node.is_leaf:
            point = HookPoint(site, block)
            self.targets[point] = self.target(point, node, **more)

    def target(self, point: HookPoint, node: Node, **more: Any) -> Target:
        return Target(
            point=point,
            name=node.name,
            occurrence=node.occurrence,
            op=node.op,
            index=node.index,
            outputs_only=self._outputs_only[node.index],
            **more,
        )

    def _feeds(self, node: Node, other: Node) -> bool:
        """Whether `other` is computed from `node`."""
        return not node.is_leaf and not other.is_leaf and bool(self._ancestors[other.index] >> node.index & 1)

    def _unembed(self) -> Node | None:
        """The product with the output matrix: the last matrix product on the way to the graph's last node."""
        last = self.nodes[-1] if self.nodes else None
        if last is None or last.ne[0] != self.n_vocab:
            return None
        on_path = [n for n in self.nodes if n is last or self._feeds(n, last)]
        return next((n for n in reversed(on_path) if n.op == "MUL_MAT" and n.src[0].is_weight), None)

    @staticmethod
    def _before_norm(node: Node) -> Node | None:
        """The input of the normalisation below an affine part."""
        while not node.is_leaf and node.op not in NORMS:
            if node.op not in ("MUL", "ADD", "SCALE") and strip(node) is node:
                return None
            node = node.src[0]
        return None if node.is_leaf else node.src[0]

    def _steps(self, node: Node) -> Iterator[Step]:
        """The residual stream's additions, last first."""
        node = strip(node, rows=True)
        while found := self._split_sum(node):
            before, branches = found
            yield Step(node, branches, before)
            node = before

    def _split_sum(self, node: Node) -> tuple[Node, list[Node]] | None:
        """`(stream, branches)` of a sum: the stream is the term every other term is computed from."""
        if node.op != "ADD":
            return None
        terms = [strip(source, rows=True) for source in node.src[:2]]
        while True:
            for term in terms:
                others = [t for t in terms if t is not term]
                if others and all(self._feeds(term, other) for other in others):
                    return term, others
            inner = next((t for t in terms if t.op == "ADD" and not any(s.is_leaf for s in t.src[:2])), None)
            if inner is None:
                return None
            terms = [t for t in terms if t is not inner] + [strip(s, rows=True) for s in inner.src[:2]]

    def _between(self, end: Node, start: Node) -> list[Node]:
        """Nodes and leaves `end` is computed from, back to `start` (left out), in graph order."""
        seen: dict[int, Node] = {}
        todo = [end]
        while todo:
            node = todo.pop()
            if node is start or id(node) in seen:
                continue
            seen[id(node)] = node
            todo += node.src
        return sorted(seen.values(), key=lambda n: n.index)

    def _side_by_side(self, step: Step) -> Iterator[Node]:
        """The step's branches; attention and MLP that were added to each other before the stream, as two."""
        for branch in step.branches:
            terms = [strip(source, rows=True) for source in branch.src[:2]] if branch.op == "ADD" else []
            inside = [self._between(term, step.before) for term in terms]
            kinds = [self._kind(nodes) for nodes in inside if any(_WEIGHT.match(n.name) for n in nodes if n.is_leaf)]
            if sorted(kinds) == ["attn", "mlp"] and not any(term.is_leaf for term in terms):
                yield from terms
            else:
                yield branch

    def _residual(self, steps: list[Step]) -> None:
        taken: dict[int, list[tuple[str, Step]]] = {}
        for step in reversed(steps):
            for branch in self._side_by_side(step):
                inside = self._between(branch, step.before)
                blocks = {int(m[1]) for n in inside if n.is_leaf and (m := _WEIGHT.match(n.name))}
                if not blocks:
                    continue
                block, kind = max(blocks), self._kind(inside)
                taken.setdefault(block, []).append((kind, step))
                if norm := self._norm_of(step, inside):
                    self._add("ln1" if kind == "attn" else "ln2", block, norm)
                if kind == "attn":
                    self._add("attn_out", block, branch)
                    self._attention(block, inside)
                elif kind == "mlp":
                    self._add("mlp_out", block, branch)
                    self._mlp(block, inside)
        for block, parts in taken.items():
            self._add("resid_pre", block, parts[0][1].before)
            self._add("resid_post", block, parts[-1][1].after)
            kinds = [kind for kind, _ in parts]
            if kinds == ["attn", "mlp"] and parts[0][1] is not parts[1][1]:
                self._add("resid_mid", block, parts[0][1].after)
            for kind, sites in _SITES_OF.items():
                if kinds.count(kind) > 1:  # which one is meant cannot be said
                    for site in sites:
                        self.targets.pop(HookPoint(site, block), None)

    @staticmethod
    def _norm_of(step: Step, inside: list[Node]) -> Node | None:
        """The normalisation that a branch begins with, before its gain."""
        return next((n for n in inside if n.op in NORMS and strip(n.src[0], rows=True) is step.before), None)

    def _kind(self, inside: list[Node]) -> str:
        if any(_NOT_ATTENTION.match(n.op) for n in inside):
            return "other"
        return "attn" if self._attention_node(inside) else "mlp"

    @staticmethod
    def _attention_node(inside: list[Node]) -> Node | None:
        """FLASH_ATTN_EXT, or the SOFT_MAX over products of activations (an expert router's is over a weight)."""
        for node in inside:
            if node.op == "FLASH_ATTN_EXT":
                return node
            if node.op == "SOFT_MAX" and (scores := score_product(node)) and not scores.src[0].is_weight:
                return node
        return None

    def _mlp(self, block: int, inside: list[Node]) -> None:
        if by_expert := next((n for n in inside if n.op == "MUL_MAT_ID"), None):
            self._router(block, by_expert)  # each expert has its own hidden layer: no mlp_post, one row per token
        elif products := [n for n in inside if n.op == "MUL_MAT" and n.src[0].is_weight]:
            self._add("mlp_post", block, strip(products[-1].src[1]))

    def _router(self, block: int, by_expert: Node) -> None:
        """The router's logits and what becomes of them, below the choice of experts."""
        chosen = strip(by_expert.src[2])
        below: list[Node] = []  # from the choice down to the product
        while not chosen.is_leaf and chosen.src and (not below or below[-1].op != "MUL_MAT"):
            chosen = chosen.src[0]
            below.append(chosen)
        if not below or below[-1].op != "MUL_MAT" or not below[-1].src[0].is_weight:
            return
        way = [node for node in reversed(below) if strip(node) is node]
        biases = 1 if len(way) > 1 and way[1].op == "ADD" and way[1].src[1].is_leaf else 0
        self._add("router", block, way[biases])
        if len(way) > biases + 1 and way[biases + 1].op in ("SOFT_MAX", "UNARY"):
            self._add("expert_weights", block, way[biases + 1])

    def _attention(self, block: int, inside: list[Node]) -> None:
        core = self._attention_node(inside)
        assert core is not None
        output = next((n for n in inside if n.op == "MUL_MAT" and n.src[0].is_weight and self._feeds(core, n)), None)
        if output:
            self._add("z", block, output.src[1])
        if core.op == "FLASH_ATTN_EXT":
            query, keys, values = core.src[:3]
        else:
            scores = score_product(core)
            mixed = next((n for n in inside if n.op == "MUL_MAT" and strip(n.src[1]) is core), None)
            if scores is None or mixed is None:
                return
            keys, query, values = scores.src[0], scores.src[1], mixed.src[0]
        self._rotated("q", block, query)
        write = self._cache_write(keys, core)
        if core.op == "SOFT_MAX":
            self._add("pattern", block, core, cells=(write.name, write.occurrence) if write else None)
        self._rotated("k", block, write.src[0] if write else keys)
        value = strip(written.src[0] if (written := self._cache_write(values, core)) else values)
        if value.op != "CONCAT":
            self._add("v", block, value)

    def _rotated(self, site: str, block: int, node: Node) -> None:
        node = strip(node)
        while node.op == "SCALE":
            node = strip(node.src[0])
        if node.op == "CONCAT":  # rotated and unrotated parts side by side: no single tensor before RoPE
            return
        if node.op != "ROPE":
            self._add(site, block, node)
            return
        adjacent_pairs = node.op_params[2] == 0  # the RoPE variant that rotates neighbours
        heads = node.ne[1] if adjacent_pairs and self.interleaved else 0
        self._add(f"rot_{site}", block, node, heads=heads)
        self._add(site, block, strip(node.src[0]), heads=heads)

    def _cache_write(self, read: Node, before: Node) -> Node | None:
        """The SET_ROWS that fills the cache `read` looks at."""
        cache = root(read)
        found = [
            n
            for n in self.nodes[: before.index]
            if n.op == "SET_ROWS" and root(n.src[2] if len(n.src) > 2 else n) is cache
        ]
        return found[-1] if found else None


class GraphMap:
    """The hook points of a context's graph, and any tensor of it by name.

    Of `blocks` blocks the first `loaded` are in it (truncated.py): then nothing behind them is, and no raw names.
    """

    def __init__(self, inventory: Inventory, *, n_vocab: int, architecture: str, blocks: int, loaded: int) -> None:
        self.first = inventory.nodes[0].name
        self.architecture = architecture
        self.blocks, self.loaded = blocks, loaded
        self._resolver = Resolver(inventory, n_vocab=n_vocab, architecture=architecture)
        self.targets = self._resolver.resolve()
        if self.truncated:
            for site in MODEL_SITES:
                self.targets.pop(HookPoint(site), None)
        self.nodes = inventory.nodes

    @property
    def truncated(self) -> bool:
        return self.loaded < self.blocks

    def find(self, point: HookPoint) -> Target:
        """The tensor behind a point; HookError lists what exists."""
        if point.site == "ggml":
            return self._find_raw(point)
        if point in self.targets:
            return self.targets[point]
        why = ""
        if point.site == "pattern" and any(n.op == "FLASH_ATTN_EXT" for n in self.nodes):
            why = " (flash attention never forms the pattern: set flash_attn=off)"
        if self.truncated:
            why += f" (only the first {self.loaded} blocks are loaded)"
        raise HookError(
            f"no hook point '{point}'{why}; this {self.architecture} model has blocks 0..{self.blocks - 1} and "
            f"{described(self.targets)}"
        )

    def heads(self) -> dict[int, int]:
        """Block -> number of attention heads, of the blocks whose heads' results lie side by side in `attn.hook_z`.

        Read off the pattern, so only on a graph without flash attention (`Model.graph`).
        """
        found = {}
        for point, target in self.targets.items():
            if point.site == "pattern" and point.block is not None and HookPoint("z", point.block) in self.targets:
                found[point.block] = self.nodes[target.index].ne[2]
        return dict(sorted(found.items()))

    def hook_points(self) -> dict[str, str]:
        """Hook point -> ggml tensor name, in the order of computation."""
        return {str(target.point): target.name for target in self.in_order()}

    def in_order(self) -> list[Target]:
        """The hook points in the order of computation."""
        return sorted(self.targets.values(), key=lambda target: target.index)

    def expand(self, texts: Sequence[str]) -> list[HookPoint]:
        """Hook points of texts that may hold wildcards and ranges: see `hooks.expand`."""
        return expand(texts, [target.point for target in self.in_order()], [node.name for node in self.nodes])

    def _find_raw(self, point: HookPoint) -> Target:
        if self.truncated:
            raise HookError(f"'{point}' is looked for in all blocks, and only the first {self.loaded} are loaded")
        name, _, number = point.tensor.partition("#")
        found = [n for n in self.nodes if n.name == name]
        if number:
            found = [n for n in found if str(n.occurrence) == number]
        if not found:
            names = describe_tensors(node.name for node in self.nodes)
            raise HookError(f"no tensor '{point.tensor}' in this model's graph; it has {names}")
        return self._resolver.target(point, found[-1])
