"""The batches of a plan, decoded: values of every hook, with what is wrong with a row in its flags.

Letters: N rows, D width of a hook.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np

from ..config import ExtractConfig, ModelConfig
from ..corpus.plan import Plan
from ..corpus.windows import FLAG_NOT_FINITE, WindowTable
from ..llama.hooks import HookPoint
from ..llama.layer_inp import choose_backend
from ..llama.model import Model
from ..llama.session import Hook, Rows, Session

LOGIT_BYTES = 256 << 20  # llama.cpp allocates them for every token of a decode that asks, read or not


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows `start : stop` of the table: per hook values (N, D) float32 and norms (N,) float32; flags (N,) uint8.

    A row with a value that is not finite at any hook carries FLAG_NOT_FINITE and is zero at the hooks where it had one.
    """

    start: int
    stop: int
    acts: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    flags_N: np.ndarray


class Capturer:
    """Runs the batches of a plan through one llama.cpp context, made when the first batch is asked for."""

    def __init__(
        self, model: Model, table: WindowTable, plan: Plan, config: ExtractConfig, model_config: ModelConfig
    ) -> None:
        self.model, self.table, self.plan = model, table, plan
        self.config, self.model_config = config, model_config
        self._session: Session | None = None
        self._points = {name: HookPoint.parse(name) for name in plan.hooks}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context; the next batch makes a new one."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def batch(self, index: int) -> Batch:
        """Decode one batch from an empty KV cache, stopping after the deepest hook."""
        start, stop = (int(row) for row in self.plan.batch_rows[index : index + 2])
        flags_N = np.array(self.table.flags_N[start:stop])
        parts = [self._decode(low, high) for low, high in self._spans(index)]
        acts = parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        norms = {name: row_norms(x_ND) for name, x_ND in acts.items()}
        if not all(np.isfinite(norm_N).all() for norm_N in norms.values()):
            flags_N |= self._repair(index, acts, norms)
        return Batch(start=start, stop=stop, acts=acts, norms=norms, flags_N=flags_N)

    def where(self, row: int) -> str:
        """`document 'x.py', window 12`."""
        document = self.table.documents[int(self.table.doc_N[row])].name
        return f"document {document!r}, window {int(self.table.window_N[row])}"

    def _open(self) -> Session:
        if self._session is None:
            points = list(self._points.values())
            # A KV cache of its own per window: attending over the whole batch's cells, masked, cost 25 % of the speed.
            self._session = Session(
                self.model,
                n_ctx=self.table.context_tokens * self.plan.max_batch_windows,
                n_batch=self.plan.max_batch_rows,
                n_ubatch=min(self.config.ubatch_tokens, self.plan.max_batch_rows),
                n_seq_max=self.plan.max_batch_windows,
                n_threads=self.model_config.n_threads,
                kv_type=self.model_config.kv_type,
                flash_attn=self.model_config.flash_attn,
                kv_unified=False,
                layer_inp=points if choose_backend(self.config.backend, self.model, points) == "layer_inp" else (),
            )
        return self._session

    @cached_property
    def _needs_outputs(self) -> bool:
        """Whether a hook has rows only for tokens whose logits are asked for: the last block after its attention."""
        graph = self._open().graph
        return any(graph.find(point).outputs_only for point in self._points.values())

    def _spans(self, index: int) -> Iterator[tuple[int, int]]:
        """The rows decoded together: a whole batch, or where llama.cpp keeps room for their logits fewer windows."""
        first, last = (int(window) for window in self.plan.batch_windows[index : index + 2])
        borders = np.asarray(self.table.window_starts[first : last + 1]).tolist()
        most = LOGIT_BYTES // (4 * self.model.n_vocab) if self._needs_outputs else borders[-1] - borders[0]
        start = borders[0]
        for low, high in itertools.pairwise(borders):
            if high - start > most and low > start:
                yield start, low
                start = low
        yield start, borders[-1]

    def _decode(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Values of the rows `start : stop`, whole windows, by hook."""
        rows = slice(start, stop)
        acts = {name: np.empty((stop - start, width), np.float32) for name, width in self.plan.hooks.items()}
        session = self._open()  # its KV cache is empty: every decode here stops early, which clears it
        window_N = self.table.window_N[rows]
        session.decode(
            self.table.token_N[rows],
            window_N - window_N[0],
            self.table.pos_N[rows],
            hooks=[Hook(point, read=_into(acts[name])) for name, point in self._points.items()],
            logits="all" if self._needs_outputs else "none",
            stop_early=True,
        )
        return acts

    def _repair(self, index: int, acts: dict[str, np.ndarray], norms: dict[str, np.ndarray]) -> np.ndarray:
        """Compute each window of a batch with values that are not finite alone, in place; the flags to add (N,).

        What such a value spoils beside its own window depends on how the backend computes a batch: alone, a window is
        innocent or it is not. Its rows that stay not finite become zero there and are flagged.
        """
        first, last = (int(window) for window in self.plan.batch_windows[index : index + 2])
        borders = np.asarray(self.table.window_starts[first : last + 1]).tolist()
        bad_N = np.zeros(borders[-1] - borders[0], bool)
        for start, stop in itertools.pairwise(borders):
            rows = slice(start - borders[0], stop - borders[0])
            self._open().clear(wipe=True)  # keys and values that are not finite would spoil what follows, masked or not
            for name, x_ND in self._decode(start, stop).items():
                bad_n = ~np.isfinite(x_ND).all(axis=1)
                x_ND[bad_n] = 0
                acts[name][rows], norms[name][rows] = x_ND, row_norms(x_ND)
                bad_N[rows] |= bad_n
        self._open().clear(wipe=True)
        return np.where(bad_N, FLAG_NOT_FINITE, 0).astype(np.uint8)


def row_norms(x_ND: np.ndarray) -> np.ndarray:
    """(N,) float32 Euclidean norms, to about 1e-6; not finite where a value of the row is not (or its square)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))


def exact_norms(x_ND: np.ndarray) -> np.ndarray:
    """(N,) float64 Euclidean norms."""
    return np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64))


def _into(out_ND: np.ndarray) -> Callable[[Rows], None]:
    def read(rows: Rows) -> None:
        out_ND[rows.index_N] = rows.values_ND

    return read
