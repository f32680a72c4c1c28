"""What a model file is and what its graph offers, as plain values: the JSON of `ggscope inspect`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import gguf

from sae.errors import ConfigError

from .graph import GraphMap, Target
from .hooks import RAW_PREFIX
from .identity import field_value, open_gguf
from .inventory import Node
from .model import Model


def model_card(model: Model) -> dict[str, Any]:
    """File, sizes, weights, vocabulary and chat template of a model; None for what its file does not say."""
    reader = open_gguf(model.path)
    return {
        "file": {
            "path": str(model.path),
            "bytes": model.path.stat().st_size,
            "sha256": model.id.sha256,
        },
        "name": model.id.name,
        "architecture": model.id.architecture,
        "sizes": _sizes(reader, model),
        "weights": _weights(reader, model),
        "vocabulary": _vocabulary(reader, model),
        "chat_template": _chat_template(model),
    }


def _sizes(reader: gguf.GGUFReader, model: Model) -> dict[str, Any]:
    """Numbers of the architecture. A list is one number per block."""

    def value(key: str, default: Any = None) -> Any:
        return field_value(reader, f"{model.id.architecture}.{key}", default)

    heads = value("attention.head_count")
    head_width = value("attention.key_length")
    if head_width is None and isinstance(heads, int) and heads:
        head_width = model.n_embd // heads
    return {
        "blocks": model.n_layer,
        "width": model.n_embd,
        "heads": heads,
        "kv_heads": value("attention.head_count_kv", heads),
        "head_width": head_width,
        "feed_forward": value("feed_forward_length"),
        "experts": value("expert_count"),
        "experts_used": value("expert_used_count"),
        "expert_feed_forward": value("expert_feed_forward_length"),
        "context_tokens": model.n_ctx_train,
        "sliding_window": value("attention.sliding_window"),
        "rope_dimensions": value("rope.dimension_count"),
        "rope_freq_base": value("rope.freq_base"),
        "rope_scaling": value("rope.scaling.type"),
    }


def _weights(reader: gguf.GGUFReader, model: Model) -> dict[str, Any]:
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return {
        "file_type": model.id.file_type,
        "parameters": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "bytes": sum(int(tensor.n_bytes) for tensor in reader.tensors),
        "tensors": dict(types.most_common()),
    }


def _vocabulary(reader: gguf.GGUFReader, model: Model) -> dict[str, Any]:
    def token(index: int | None) -> dict[str, Any] | None:
        return None if index is None else {"id": index, "text": model.piece(index).decode("utf-8", "replace")}

    return {
        "tokens": model.n_vocab,
        "type": field_value(reader, "tokenizer.ggml.model"),
        "pre_tokenizer": field_value(reader, "tokenizer.ggml.pre"),
        "sha256": model.id.vocab_sha256,
        "bos": token(model.bos),
        "eos": token(model.eos),
        "add_bos": model.add_bos,
    }


def _chat_template(model: Model) -> dict[str, Any] | None:
    """The template's text, and whether a user's message can be rendered by it."""
    if (text := model.chat_template) is None:
        return None
    try:
        model.chat([{"role": "user", "content": "?"}])
    except ConfigError:
        return {"usable": False, "text": text}
    return {"usable": True, "text": text}


def graph_facts(graph: GraphMap) -> dict[str, Any]:
    """What is alike for all tensors of a graph."""
    return {
        "tokens": 1,
        "flash_attention": any(node.op == "FLASH_ATTN_EXT" for node in graph.nodes),
        "buffers": list(dict.fromkeys(node.buffer for node in graph.nodes if node.buffer)),
    }


def graph_tensors(graph: GraphMap) -> list[dict[str, Any]]:
    """Every node in the order it is computed; `buffer` is the backend buffer its values lie in, where known."""
    points: dict[int, list[str]] = {}
    for target in graph.in_order():
        points.setdefault(target.index, []).append(str(target.point))
    raw = _raw_names(graph)
    return [_tensor(node, raw) | {"hook_points": points.get(node.index, [])} for node in graph.nodes]


def _raw_names(graph: GraphMap) -> list[str]:
    """The hook point each node is by its ggml name."""
    last = {node.name: node.occurrence for node in graph.nodes}
    return [RAW_PREFIX + n.name + (f"#{n.occurrence}" if n.occurrence < last[n.name] else "") for n in graph.nodes]


def _tensor(node: Node, raw: list[str]) -> dict[str, Any]:
    return {
        "index": node.index,
        "name": node.name,
        "raw": raw[node.index],
        "op": node.op,
        "type": node.type,
        "ne": list(node.ne),
        "buffer": node.buffer,
        "inputs": [source.name if source.is_leaf else raw[source.index] for source in node.src],
    }


def hook_point_table(used: GraphMap, whole: GraphMap) -> list[dict[str, Any]]:
    """Every hook point of a model, from the graph in use where that has it, else from the one without flash attention.

    `flash_attn_off` marks the latter.
    """
    raw = {id(graph): _raw_names(graph) for graph in (used, whole)}
    found = []
    for point in (target.point for target in whole.in_order()):
        graph = used if point in used.targets else whole
        target = graph.targets[point]
        row = _point(graph.nodes[target.index], target, raw[id(graph)])
        found.append(row | {"flash_attn_off": graph is not used})
    return found


def _point(node: Node, target: Target, raw: list[str]) -> dict[str, Any]:
    return {
        "point": str(target.point),
        "site": target.point.site,
        "block": target.point.block,
        "raw": raw[node.index],
        "op": node.op,
        "type": node.type,
        "ne": list(node.ne),
        "width": math.prod(node.ne) if target.point.site != "pattern" else None,
        "buffer": node.buffer,
        "rows": "tokens with logits" if target.outputs_only else "all tokens",
    }
