"""What llama.cpp's questions to the callback cost, in nanoseconds a node of a generated token.

llama.cpp asks about every node of a part of the graph before it computes that part. Here nobody wants one, so on a CPU
all questions of a token come one after the other, and are timed together. Every side answers a token in turns, each on
the caches that computing a token has left.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import BenchError, Row
from pipeline.llama import native
from pipeline.llama.batches import Batch
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.symbols import NAME_OFFSET, lc
from sae.native.build import build

_P = ctypes.c_void_p
WARM_TURNS = 3
NOBODY, PYTHON, FILTER = "no question answered", "Python", "compiled"


class Meter(ctypes.Structure):
    """`struct meter` of ask_meter.c."""

    _fields_ = (
        ("inner", _P), ("inner_data", _P), ("nodes", ctypes.c_int), ("asked", ctypes.c_int), ("started", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """Who answers: a function of C and its user data. `keep`: what must outlive it."""

    function: int
    data: int = 0
    keep: tuple[Any, ...] = ()


def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build("ask_meter", [Path(__file__).with_name("ask_meter.c")], [("-O2",)])))


def sides(model: Model, found: ctypes.CDLL) -> dict[str, Side]:
    """Nobody; Python asked about every node; `ask.c` as a hook at the middle block has it, which answers "no" here."""
    names = watched_names(model, f"blocks.{model.n_layer // 2}.hook_resid_post")
    python = python_side(names)
    return {
        NOBODY: Side(_address(found.ggscope_bench_no)),
        PYTHON: python,
        FILTER: filter_side(names, python.function, every=native.PYTHON_EVERY),
    }


def watched_names(model: Model, hook: str) -> set[bytes]:
    """What the callback looks for where this point is hooked: its node and the graph's first, for one row."""
    return {model.graph.first.encode(), model.graph.find(HookPoint.parse(hook)).name.encode()}


def python_side(names: set[bytes]) -> Side:
    """The least that Python can do: look up the name, and say no."""

    def asked(address: int, ask: bool, _user_data: int | None) -> bool:
        return ctypes.string_at(address + NAME_OFFSET) in names and False

    callback = lc.ggml_backend_sched_eval_callback(asked)
    return Side(_address(callback), keep=(callback,))


def filter_side(names: set[bytes], python: int, *, every: int) -> Side:
    compiled = native.ask_function()
    assert compiled is not None
    own = native.AskFilter(ctypes.cast(python, _P))
    own.always, own.every = 0, every
    own.watch(names)
    return Side(_address(compiled), ctypes.addressof(own), (own,))


def nanoseconds(
    model: Model, who: Mapping[str, Side], found: ctypes.CDLL, *, turns: int, threads: int, prompt: int = 4
) -> tuple[dict[str, float], int]:
    """Median over the tokens of the nanoseconds a node, of each side; nodes of a token."""
    meter = Meter(inner=who[NOBODY].function)
    params = lc.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = prompt + 1 + (WARM_TURNS + turns) * len(who)
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    params.cb_eval = ctypes.cast(found.ggscope_bench_meter, lc.ggml_backend_sched_eval_callback)
    params.cb_eval_user_data = ctypes.addressof(meter)
    context = lc.llama_init_from_model(model.handle, params)
    if not context:
        raise BenchError("no context")
    token = _token_step(context, meter)
    spent: dict[str, list[float]] = {name: [] for name in who}
    try:
        for pos in range(prompt):
            token(pos)
        pos, nodes = prompt, token(prompt)
        meter.nodes = nodes
        for turn in range(WARM_TURNS + turns):
            names = list(who)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                meter.inner, meter.inner_data, pos = who[name].function, who[name].data, pos + 1
                if token(pos) != nodes:
                    raise BenchError("the graph changed between two tokens")
                if turn >= WARM_TURNS:
                    spent[name].append(meter.nanoseconds / nodes)
    finally:
        lc.llama_free(context)
    return {name: statistics.median(each) for name, each in spent.items()}, nodes


def _token_step(context: Any, meter: Meter) -> Callable[[int], int]:
    def step(pos: int) -> int:
        meter.asked = 0
        batch = Batch(np.array([3 + pos % 400]), np.zeros(1), np.array([pos]), np.ones(1))
        if code := lc.llama_decode(context, batch.c):
            raise BenchError(f"llama_decode gave {code}")
        lc.llama_synchronize(context)
        return int(meter.asked)

    return step


def rows(name: str, model: Model, *, turns: int, threads: int, token_ms: float) -> list[Row]:
    """A node answered by `ask.c` beside one answered by Python, both less the call that leads there. None without ask.c."""
    if native.ask_function() is None:
        return []
    found = library()
    spent, nodes = nanoseconds(model, sides(model, found), found, turns=turns, threads=threads)
    ours, theirs = (max(spent[side] - spent[NOBODY], 0.1) for side in (FILTER, PYTHON))
    share = 100 * 1e-6 * nodes / token_ms
    return [
        Row(
            case=f"{name} asked node", peer="Python asked about each", unit="ns", ours=ours, theirs=theirs, ratio=theirs / ours,
            note=f"{nodes} nodes: {share * ours:.2f} and {share * theirs:.2f} % of the token",
        )
    ]  # fmt: skip


def _address(function: Any) -> int:
    return ctypes.cast(function, _P).value or 0
