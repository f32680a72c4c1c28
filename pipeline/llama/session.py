"""One llama.cpp context: decode with hooks, rows mapped to (sequence, position), nothing stale handed out."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np

from sae.errors import ConfigError, LlamaError, ShapeError

from ..cores import usable_cores
from .arguments import between, choice, integers
from .batches import Batch, OneToken, split_equal, split_simple
from .callback import Cells, DecodePlan, EvalCallback, Hook, Rows
from .graph import GraphMap, Target
from .hooks import HookPoint
from .inventory import Inventory
from .layer_inp import LayerInputs
from .log import log_tail
from .model import Model
from .row_reads import RowReads
from .signals import deferred_signals
from .switching import quick_switching
from .symbols import lc

__all__ = ["Hook", "Rows", "Session", "capture"]

_KV_TYPES = {"f32": 0, "f16": 1}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
_unnamed_keys = itertools.count()


class Session:
    """One context on a model, for one thread at a time.

    `n_ctx` counts KV cells: shared by all sequences with `kv_unified=True`, split evenly between `n_seq_max`
    sequences otherwise (then each attends only to its own part, which is faster for many sequences). llama.cpp
    rounds it up. `n_batch` is the most tokens of one `decode` (default min(n_ctx, 2048)), `n_ubatch` of one pass
    through the graph (default min(n_batch, 512)). `kv_type="f32"` with `flash_attn="off"` is the most exact setting.

    `layer_inp` names points that are to be read without a callback (layer_inp.py): such a session reads only these,
    in batch order, edits nothing and never stops early. LlamaError or HookError where they cannot be read that way.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_seq_max: int = 1,
        n_threads: int = 0,
        kv_type: str = "f16",
        flash_attn: str = "auto",
        kv_unified: bool = True,
        layer_inp: Sequence[HookPoint] = (),
    ) -> None:
        self._handle: Any = None
        self.model = model
        self.n_seq_max = between("n_seq_max", n_seq_max, 1, _MAX_SEQUENCES)
        self.kv_unified = kv_unified or n_seq_max == 1
        n_ctx = between("n_ctx", n_ctx, 1, 1 << 30)
        # llama.cpp aborts the process where a batch cannot hold one token of each sequence
        n_ctx = between("n_ctx", n_ctx, self.n_seq_max, 1 << 30)
        n_batch = between("n_batch", n_batch or min(n_ctx, 2048), self.n_seq_max, 1 << 24)
        n_ubatch = min(n_batch, between("n_ubatch", n_ubatch or 512, 1, 1 << 24))
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq_max
        params.n_threads = params.n_threads_batch = n_threads or usable_cores()
        params.type_k = params.type_v = choice("kv_type", kv_type, _KV_TYPES)
        params.flash_attn_type = choice("flash_attn", flash_attn, _FLASH)
        params.kv_unified = self.kv_unified
        params.swa_full = True  # no cell is dropped before the context is cleared
        params.no_perf = True
        self._callback = EvalCallback()
        self._inputs: LayerInputs | None = None
        if layer_inp:
            self._inputs = LayerInputs(model, layer_inp, kv_type=kv_type, flash_attn=flash_attn)
        else:
            params.cb_eval = self._callback.c
            params.cb_eval_user_data = self._callback.user_data
        log_tail.clear()
        self._handle = lc.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise LlamaError(f"llama.cpp cannot make a context of {n_ctx} tokens: {log_tail.reason('out of memory?')}")
        model.adopt(self)
        self.n_ctx: int = lc.llama_n_ctx(self._handle)
        self.n_batch: int = lc.llama_n_batch(self._handle)
        self.n_ubatch: int = lc.llama_n_ubatch(self._handle)
        # such a model sees a whole text at once; llama.cpp aborts the process where a pass does not hold it
        self._whole = not lc.llama_get_memory(self._handle) or not lc.llama_get_causal_attn(self._handle)
        self.n_ctx_seq = self.n_ctx if self.kv_unified else self.n_ctx // self.n_seq_max
        streams = 1 if self.kv_unified else self.n_seq_max
        self._callback.cells = Cells.empty(self.n_ctx_seq * streams, streams=streams)
        self._next_pos = np.zeros(self.n_seq_max, np.int64)
        self._token = OneToken(
            self._next_pos, n_vocab=model.n_vocab, each=self.n_ctx_seq, together=self.n_ctx if self.kv_unified else 0
        )
        self._key: str | None = None
        self._rows: RowReads | None = None
        if self._inputs is None:
            self.graph = self._probe()
            self._rows = RowReads(self._callback, self.graph)
        else:
            self.graph = self._inputs.graph
            self._inputs.enable(self._handle)
            self._inputs.check(self)

    def hook_points(self) -> dict[str, str]:
        """Hook point -> ggml tensor name in this context's graph, in the order of computation."""
        return self.graph.hook_points()

    def expand(self, texts: Sequence[str]) -> list[HookPoint]:
        """Hook points of texts with wildcards and ranges (`hooks.expand`), on this context's graph."""
        return self.graph.expand(texts)

    def decode(
        self,
        tokens_N: Any,
        seq_N: Any,
        pos_N: Any,
        *,
        hooks: Sequence[Hook] = (),
        logits: Literal["none", "last", "all"] = "none",
        stop_early: bool = False,
        edits_key: str = "",
    ) -> np.ndarray | None:
        """Compute N tokens; the logits (rows, V) float32 in batch order, or None.

        `logits="last"` are those of the last token of each sequence in this batch. Positions of a sequence go on from
        what the KV holds. The last block after its attention, the final norm and the logits exist only for tokens
        whose logits are asked for: a hook there sees those rows only, and with `logits="none"` is an error.

        `stop_early` ends each pass after the deepest hook: there are no logits (`logits` then only says which rows
        the last block keeps), and the KV, incomplete, is cleared. `edits_key` names the edits in force: tokens may
        be added only under the key the KV was made with, and an edit without a key makes a KV nothing can follow.

        Raises ShapeError for arrays that do not fit, HookError for a point this graph lacks, LlamaError when
        llama.cpp fails; an exception of a hook comes out as it was raised. After any of the last two the KV is
        cleared, and the session goes on working.
        """
        if self.model.truncated and logits != "none" and not stop_early:
            raise LlamaError(f"only {self.model.blocks} blocks of this model are loaded: it has no logits")
        one = self._token.take(tokens_N, seq_N, pos_N, logits)
        batch = one or self._batch(tokens_N, seq_N, pos_N, logits)
        reads = [] if self._inputs is None else self._inputs.reads(hooks)
        single = self._rows if one is not None and not stop_early else None
        copied = single is not None and single.begin(hooks, outputs=logits != "none")
        targets = self._targets(hooks, batch) if self._inputs is None and not copied else {}
        key = edits_key
        if not key and any(hook.edit is not None for hook in hooks):
            key = f"unnamed edits {next(_unnamed_keys)}"
        if self._key is not None and self._key != key:
            raise LlamaError(
                f"the KV cache was made under the edits '{self._key}', these tokens come under '{key}': "
                "clear() the session first"
            )
        plan = DecodePlan(
            batch.tokens_N, batch.seq_N, batch.pos_N, batch.output_N, self._pieces(batch.seq_N), targets, stop_early
        )
        self._key = key
        self._run(batch, plan, reads, copied)
        if stop_early:
            self.clear(wipe=False)
            return None
        return self._logits(int(batch.output_N.sum())) if logits != "none" else None

    def clear(self, *, wipe: bool = True) -> None:
        """Forget every token of every sequence.

        Without `wipe` the old keys and values stay in memory, masked: that costs nothing, and changes nothing as long
        as they are finite (a mask of zero times infinity is not a number). Wiping writes the whole KV cache, 1 to 4 %
        of the time of a capture.
        """
        lc.llama_memory_clear(lc.llama_get_memory(self._open()), wipe)
        self._callback.cells.clear()
        if self._rows is not None:
            self._rows.forget()
        self._next_pos.fill(0)
        self._key = None

    @property
    def n_past(self) -> np.ndarray:
        """Tokens held for each sequence, (n_seq_max,)."""
        return self._next_pos.copy()

    def close(self) -> None:
        """Free the context; harmless when done before."""
        if self._handle is not None:
            lc.llama_free(self._handle)
            self._handle = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _open(self) -> Any:
        if self._handle is None:
            raise LlamaError("the session is closed")
        return self._handle

    def _probe(self) -> GraphMap:
        """Decode one token with nothing asked for, to see the graph."""
        self._callback.inventory = inventory = Inventory()
        token = np.array([self.model.bos or 0])
        batch = Batch(token, np.zeros(1), np.zeros(1), np.ones(1))
        try:
            code = lc.llama_decode(self._handle, batch.c)
            lc.llama_synchronize(self._handle)
        finally:
            self._callback.inventory = None
        if self._callback.error is not None:
            raise self._callback.error
        if code or not inventory.nodes:
            raise LlamaError(f"llama.cpp cannot run this model: {log_tail.reason(f'code {code}')}")
        self.clear()
        identity = self.model.id
        return GraphMap(
            inventory,
            n_vocab=self.model.n_vocab,
            architecture=identity.architecture,
            blocks=identity.n_layer,
            loaded=self.model.blocks if self.model.truncated else identity.n_layer,
        )

    def _batch(self, tokens: Any, seq: Any, pos: Any, logits: str) -> Batch:
        """The checked arrays: what llama.cpp would abort on, or take silently, is refused here."""
        tokens_N, seq_N, pos_N = (integers(n, a) for n, a in (("tokens", tokens), ("seq", seq), ("pos", pos)))
        if not len(tokens_N) == len(seq_N) == len(pos_N):
            raise ShapeError(f"{len(tokens_N)} tokens, {len(seq_N)} sequence ids, {len(pos_N)} positions: not as many")
        most, name = (self.n_ubatch, "n_ubatch") if self._whole else (self.n_batch, "n_batch")
        if not 0 < len(tokens_N) <= most:
            raise ShapeError(f"{len(tokens_N)} tokens in one decode; expected 1 to {most} ({name})")
        if tokens_N.min() < 0 or tokens_N.max() >= self.model.n_vocab:
            raise ShapeError(f"a token is outside the vocabulary of {self.model.n_vocab}")
        if seq_N.min() < 0 or seq_N.max() >= self.n_seq_max:
            raise ShapeError(f"a sequence id is outside 0..{self.n_seq_max - 1} (n_seq_max={self.n_seq_max})")
        self._check_positions(seq_N, pos_N)
        if logits not in ("none", "last", "all"):
            raise ConfigError(f"logits='{logits}'; expected none, last or all")
        output_N = np.full(len(tokens_N), logits == "all", np.int8)
        if logits == "last":
            for s in np.unique(seq_N):
                output_N[np.flatnonzero(seq_N == s)[-1]] = 1
        return Batch(tokens_N, seq_N, pos_N, output_N)

    def _check_positions(self, seq_N: np.ndarray, pos_N: np.ndarray) -> None:
        for s in np.unique(seq_N):
            found = pos_N[seq_N == s]
            start = self._next_pos[s]
            if not np.array_equal(found, start + np.arange(len(found))):
                raise ShapeError(
                    f"positions of sequence {s} are {found[0]}..{found[-1]}; "
                    f"expected {len(found)} consecutive ones from {start} on"
                )
            if found[-1] >= self.n_ctx_seq:
                raise LlamaError(f"sequence {s} would have {found[-1] + 1} tokens, the context holds {self.n_ctx_seq}")
        held = int(self._next_pos.sum()) + len(pos_N)
        if self.kv_unified and held > self.n_ctx:
            raise LlamaError(f"the sequences would have {held} tokens together, the context holds {self.n_ctx} (n_ctx)")

    def _targets(self, hooks: Sequence[Hook], batch: Batch) -> dict[Target, list[Hook]]:
        targets: dict[Target, list[Hook]] = {}
        for hook in hooks:
            target = self.graph.find(hook.point)
            if target.outputs_only and not batch.output_N.any():
                raise LlamaError(
                    f"'{hook.point}' has rows only for tokens whose logits are asked for: pass logits='all' or 'last'"
                )
            # one tensor may answer to two points (resid_post of a block is resid_pre of the next): one list of hooks
            known = next((t for t in targets if t.index == target.index), target)
            targets.setdefault(known, []).append(hook)
        return targets

    def _pieces(self, seq_N: np.ndarray) -> list[np.ndarray]:
        if self.kv_unified:
            return split_simple(len(seq_N), self.n_ubatch)
        return split_equal(seq_N, self.n_ubatch)

    def _run(self, batch: Batch, plan: DecodePlan, reads: list[tuple[int, Hook]], copied: bool) -> None:
        """`llama_decode`, with the KV cleared whenever it does not end well. `copied`: the rows are read by ask.c."""
        log_tail.clear()
        if not copied:
            self._callback.arm(plan, self.graph)
        try:
            quick = quick_switching() if plan.hooks else contextlib.nullcontext()
            with quick, deferred_signals(self._callback.interrupt):
                code = lc.llama_decode(self._open(), batch.c)
                lc.llama_synchronize(self._handle)
            if self._callback.error is not None:
                raise self._callback.error
            if code:
                raise LlamaError(
                    f"llama.cpp cannot decode {len(batch.tokens_N)} tokens: {log_tail.reason(f'code {code}')}"
                )
            self._callback.disarm(plan)
            if copied and self._rows is not None:
                self._rows.end(int(batch.seq_N[0]), int(batch.pos_N[0]))
            if self._inputs is not None:
                self._inputs.serve(self._handle, reads, batch.seq_N, batch.pos_N)
        except BaseException:
            self._callback.abandon()
            self.clear()
            raise
        np.add.at(self._next_pos, batch.seq_N, 1)

    def _logits(self, rows: int) -> np.ndarray:
        pointer = lc.llama_get_logits(self._handle)
        if not pointer:
            raise LlamaError("llama.cpp has no logits for this batch")
        shape = (rows, self.model.n_vocab)
        values = (ctypes.c_float * (shape[0] * shape[1])).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(values), np.float32).reshape(shape).copy()


def capture(
    session: Session, sequences: Sequence[Any], points: Sequence[HookPoint], *, stop_early: bool = True
) -> list[dict[str, np.ndarray]]:
    """Values of the points for every token of every sequence, each run by itself from position 0.

    Per sequence a dict from the point's name to (T, width) float32; an attention pattern is (T, heads, T). Sequences
    are packed into batches as they fit. A sequence longer than `n_batch` is run in parts.
    """
    for number, tokens in enumerate(sequences):
        if not 0 < len(tokens) <= session.n_ctx_seq:
            raise ShapeError(f"sequence {number} has {len(tokens)} tokens; expected 1 to {session.n_ctx_seq}")
    collected: list[dict[str, np.ndarray]] = [{} for _ in sequences]
    last_block = any(session.graph.find(point).outputs_only for point in points)
    for group in _groups(session, [len(tokens) for tokens in sequences]):
        session.clear()
        tokens_N = np.concatenate([np.asarray(sequences[i], np.int32) for i in group])
        lengths = [len(sequences[i]) for i in group]
        seq_N = np.repeat(np.arange(len(group)), lengths)
        pos_N = np.concatenate([np.arange(n) for n in lengths])
        hooks = [Hook(point, read=_collector(str(point), [collected[i] for i in group], lengths)) for point in points]
        parts = range(0, len(tokens_N), session.n_batch)
        for start in parts:
            piece = slice(start, start + session.n_batch)
            session.decode(
                tokens_N[piece],
                seq_N[piece],
                pos_N[piece],
                hooks=hooks,
                logits="all" if last_block else "none",
                stop_early=stop_early and len(parts) == 1,
            )
    session.clear()
    return collected


def _collector(name: str, into: list[dict[str, np.ndarray]], lengths: list[int]) -> Any:
    def read(rows: Rows) -> None:
        for s in np.unique(rows.seq_N):
            which = rows.seq_N == s
            values = rows.values_ND[which]
            if name not in into[s]:
                tail = values.shape[1:] if values.ndim == 2 else (values.shape[1], lengths[s])
                into[s][name] = np.zeros((lengths[s], *tail), np.float32)
            if values.ndim == 2:
                into[s][name][rows.pos_N[which]] = values
            else:
                columns = min(values.shape[2], lengths[s])
                into[s][name][rows.pos_N[which], :, :columns] = values[:, :, :columns]

    return read


def _groups(session: Session, lengths: list[int]) -> Iterator[list[int]]:
    """Consecutive sequences that fit one batch; a longer one alone."""
    group: list[int] = []
    total = 0
    for i, length in enumerate(lengths):
        room = min(session.n_batch, session.n_ctx if session.kv_unified else session.n_batch)
        if group and (total + length > room or len(group) == session.n_seq_max):
            yield group
            group, total = [], 0
        group.append(i)
        total += length
    if group:
        yield group
