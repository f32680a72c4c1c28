"""Reading the residual stream without a callback: llama.cpp's own copies of the input of a block.

`llama_set_embeddings_layer_inp` makes a context keep the input of chosen blocks for every token of a batch,
`llama_get_embeddings_layer_inp` waits for the copies and puts the rows into batch order, however the batch was cut
into micro-batches (llama.cpp, `llama_context::output_reorder`). A context has n_batch x n_embd floats for each block.
Both are C++ symbols outside the public header, and llama.cpp ends the process where an architecture's graph does not
name the tensors. So they are used only with the build whose source was read, only for architectures found in it, and
a new context is compared with the callback on a few tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sae.errors import ConfigError, HookError, LlamaError

from .callback import Hook, Rows
from .graph import GraphMap
from .hooks import HookPoint, describe
from .symbols import function, ggml_version

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

READ_BUILD = ("0.3.36", "0.25.3")  # llama-cpp-python and the ggml it was read with
# Architectures whose graph names the input of every block, as one row of n_embd values for each token. Not among
# them although they name one: deepseek4 and qwen4exp (several streams), llama-embed and gemma4-assistant (another
# graph), minimax-01 (normed after the addition), nanbeige (blocks run more than once), hunyuan_vl (images).
ARCHITECTURES = frozenset(
    {"llama", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "gemma4", "gpt-oss", "lfm2", "lfm2moe"}
    | {"hunyuan-dense", "minimax-m2", "nemotron_h", "nemotron_h_moe", "mimo2", "bailingmoe3", "muse-glimmer"}
)
_PROBE_TOKENS = 4
_PROBE_TOLERANCE = 1e-3  # another tensor is off by far more


def _optional(name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A C++ function by its Itanium-mangled name; None where the build lacks it."""
    try:
        return function(name, result, *arguments)
    except LlamaError:
        return None


_P, _U32, _FLOATS = ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER(ctypes.c_float)
_set = _optional("_Z30llama_set_embeddings_layer_inpP13llama_contextjb", None, _P, _U32, ctypes.c_bool)
_get = _optional("_Z30llama_get_embeddings_layer_inpP13llama_contextj", _FLOATS, _P, _U32)


def other_build() -> str:
    """That this is not the build whose source was read, in a clause; empty when it is."""
    build = (version("llama-cpp-python"), ggml_version().decode())
    if build == READ_BUILD:
        return ""
    return f"it is known for llama-cpp-python {READ_BUILD[0]} (ggml {READ_BUILD[1]}), this is {' (ggml '.join(build)})"


def unavailable(architecture: str) -> str:
    """Why layer inputs cannot be read here, in a clause; empty when they can."""
    if why := other_build():
        return why
    if _set is None or _get is None:
        return "this build of llama.cpp has no llama_get_embeddings_layer_inp"
    if architecture not in ARCHITECTURES:
        return f"not known for architecture '{architecture}' (known: {', '.join(sorted(ARCHITECTURES))})"
    return ""


def points_for(graph: GraphMap, n_layer: int) -> dict[HookPoint, int]:
    """The named points of a graph that are the input of a block, and that block.

    `resid_pre` of block b is input b, `resid_post` of b is input b + 1: the last block's output is not among them.
    """
    inputs = _inputs(graph, n_layer)
    return {point: inputs[target.index] for point, target in graph.targets.items() if target.index in inputs}


def _inputs(graph: GraphMap, n_layer: int) -> dict[int, int]:
    """Index of the node that is the input of a block -> the block."""
    points = [HookPoint("resid_pre", block) for block in range(n_layer)]
    return {graph.targets[point].index: block for block, point in enumerate(points) if point in graph.targets}


def _blocks(points: Sequence[HookPoint], graph: GraphMap, n_layer: int) -> dict[HookPoint, int]:
    """The block whose input each point is, raw ggml names too. HookError for a point that is none, or is not there."""
    inputs = _inputs(graph, n_layer)
    found = {point: inputs.get(graph.find(point).index, -1) for point in points}
    for point, block in found.items():
        if block < 0:
            raise HookError(
                f"'{point}' is not the input of a block, which is all that can be read without a callback "
                f"({describe(points_for(graph, n_layer))}); use extract.backend=callback"
            )
    return found


def choose_backend(requested: str, model: Model, points: Sequence[HookPoint]) -> Literal["callback", "layer_inp"]:
    """The way to read `points` that `extract.backend` asks for; `auto` takes the faster one.

    Layer inputs cost no callback, and on a GPU no wait of the host for each point, but nothing can stop early.
    `auto` takes them for a model on a GPU whose deepest point is the input of the last block, where an early stop
    would save that block's attention only; on a CPU the callback costs nothing that can be measured and stops early.

    ConfigError for an unknown name; with `layer_inp`, LlamaError or HookError where it cannot be had. Never an abort.
    """
    if requested not in ("auto", "callback", "layer_inp"):
        raise ConfigError(f"extract.backend='{requested}'; expected auto, callback or layer_inp")
    if requested == "callback" or (requested == "auto" and (not model.offloads or unavailable(model.id.architecture))):
        return "callback"
    _refuse(model)
    try:
        deepest = max(_blocks(points, _graph(model), model.n_layer).values(), default=-1)
    except HookError:
        if requested == "layer_inp":
            raise
        return "callback"
    return "layer_inp" if requested == "layer_inp" or deepest == model.n_layer - 1 else "callback"


class LayerInputs:
    """What one context reads without a callback: `points`, each the input of a block.

    LlamaError where this build or architecture cannot, HookError for a point that is no block's input: both before
    llama.cpp is asked for anything.
    """

    def __init__(self, model: Model, points: Sequence[HookPoint], **options: Any) -> None:
        _refuse(model)
        self._model = model
        length = min(_PROBE_TOKENS, model.n_ctx_train)
        self._probe_N = np.r_[model.bos or 0, np.arange(1, length) % model.n_vocab].astype(np.int32)
        with _small_session(model, n_ctx=8, **options) as session:
            self.graph = session.graph
            self._blocks = _blocks(points, session.graph, model.n_layer)
            self._expected = _read(session, self._probe_N, points)

    def enable(self, handle: Any) -> None:
        """Make a context keep the inputs; before its first decode."""
        assert _set is not None
        for block in sorted(set(self._blocks.values())):
            _set(handle, block, True)

    def check(self, session: Session) -> None:
        """LlamaError when the context gives other values than the callback does for the same tokens."""
        tokens_N = self._probe_N[: min(session.n_batch, session.n_ubatch, session.n_ctx_seq)]
        for name, x_ND in _read(session, tokens_N, list(self._blocks)).items():
            expected_ND = np.nan_to_num(self._expected[name][: len(tokens_N)])
            off = np.linalg.norm(np.nan_to_num(x_ND) - expected_ND)
            if off > _PROBE_TOLERANCE * np.linalg.norm(expected_ND):
                raise LlamaError(
                    f"llama.cpp gives other values for {name} as a layer input: use extract.backend=callback"
                )

    def reads(self, hooks: Sequence[Hook]) -> list[tuple[int, Hook]]:
        """The block each hook reads. LlamaError for an edit, HookError for a point the context does not keep."""
        found = []
        for hook in hooks:
            if hook.edit is not None:
                raise LlamaError(f"'{hook.point}' is read without a callback here and cannot be edited")
            if hook.point not in self._blocks:
                raise HookError(f"'{hook.point}' is not read in this session (read: {describe(self._blocks)})")
            found.append((self._blocks[hook.point], hook))
        return found

    def serve(self, handle: Any, reads: Sequence[tuple[int, Hook]], seq_N: np.ndarray, pos_N: np.ndarray) -> None:
        """Hand the rows of the last decode, in batch order, to their hooks."""
        assert _get is not None
        n = len(seq_N)
        for block, hook in reads:
            values_ND = np.ctypeslib.as_array(_get(handle, block), (n, self._model.n_embd))
            if hook.read is not None:
                hook.read(Rows(values_ND, seq_N, pos_N, np.arange(n)))


def _refuse(model: Model) -> None:
    if why := unavailable(model.id.architecture):
        raise LlamaError(f"layer inputs cannot be read: {why}; use extract.backend=callback")


def _small_session(model: Model, **options: Any) -> Session:
    from .session import Session

    return Session(model, n_threads=1, **options)


def _graph(model: Model) -> GraphMap:
    with _small_session(model, n_ctx=8) as session:
        return session.graph


def _read(session: Session, tokens_N: np.ndarray, points: Sequence[HookPoint]) -> dict[str, np.ndarray]:
    """Rows of one short sequence, by point."""
    from .session import capture

    return capture(session, [tokens_N], points, stop_early=False)[0]
