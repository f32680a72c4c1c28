"""`ggscope inspect`: a model's card, and what its real graph offers to hooks. Writes nothing."""

from __future__ import annotations

import json

from rich.console import Console

from ..llama.card import graph_facts, graph_tensors, hook_point_table, model_card
from ..llama.hooks import describe_tensors
from ..llama.session import Session
from ..run import RunContext
from .inputs import describe_model, open_model, print_wide, session_options
from .inspect_text import card_table, point_table, tensor_table

PROBE_TOKENS = 64  # room in the context; the graph looked at is that of one token


def run(context: RunContext) -> None:
    config = context.config.inspect
    with open_model(context) as model:
        with Session(model, n_ctx=PROBE_TOKENS, **session_options(context.config.model)) as session:
            used = session.graph
        card, graph = model_card(model), graph_facts(used)
        tensors, points = graph_tensors(used), hook_point_table(used, model.graph)
        given = describe_model(model)
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if config.format == "json":
        out.print(json.dumps({"model": card, "graph": graph, "hook_points": points, "tensors": tensors}, indent=1))
    else:
        print_wide(card_table(card, graph))
        out.print()
        if points:
            print_wide(point_table(points))
        else:
            out.print(
                "no hook points by name: this graph's structure is not understood; its tensors work as ggml:NAME:"
            )
            out.print(describe_tensors(tensor["name"] for tensor in tensors))
        if config.tensors:
            out.print()
            print_wide(tensor_table(tensors))
        out.print()
    context.three_lines(
        given,
        f"{len(points)} hook points, {len(tensors)} tensors in the graph of one token",
        "nothing is written; inspect.tensors=true lists every tensor, format=json is for programs",
        stderr=config.format == "json",
    )
