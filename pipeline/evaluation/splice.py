"""What the model loses when its activations at hook points are replaced inside llama.cpp's forward pass.

The clean run of a batch is decoded once; it gives the logits to compare with, the activations x at the
hook and the flagged rows. Every other run decodes the same batch again while the hook writes
x + (x_hat - x), so a replacement that returns x is bit-identical to the clean run. Flagged rows (BOS,
special, first, outlier, not finite) are never changed and never counted. A row is counted where it is
unflagged and the window holds the token it predicts.

Several hook points are replaced in the same forward pass by
    a wired run: all that stands there is made of the clean run's rows, at these or at other hook points
    a joint run: each replacement sees the activations as the earlier ones have left them

N rows of a batch, D width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.corpus.windows import FLAG_NOT_FINITE, FLAG_OUTLIER, FLAGS_ALL, WindowTable
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Rows, Session
from sae.errors import ShapeError

from .losses import Reference, cross_entropy, kl_divergence, log_normaliser

CLEAN = "clean"
MAX_SEQUENCES = 64  # windows decoded together; llama.cpp allows 256

Reconstruct = Callable[[np.ndarray], np.ndarray]  # x_ND of unflagged rows -> x_hat_ND
Joint = Mapping[HookPoint, Reconstruct]  # what stands at each hook point of one run
RowsAt = Mapping[HookPoint, np.ndarray]
Observe = Callable[[str, np.ndarray, np.ndarray], None]  # run, logits_NV and log_z_N of counted rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Wired:
    """A run in which `reconstruct` gives what stands at some of `points`, of the clean run's unflagged rows at all."""

    points: tuple[HookPoint, ...]
    reconstruct: Callable[[RowsAt], RowsAt]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWindow:
    """One sequence: `tokens` from position 0 on, `flags` (0: counted) of the same length."""

    tokens: np.ndarray
    flags: np.ndarray
    document: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpliceConfig:
    """How the forward passes are made. `logits_bytes` bounds the clean logits held in memory."""

    batch_tokens: int = 512
    logits_bytes: int = 64 << 20
    outlier_norm: float = 0.0  # rows of a larger norm are flagged; 0: none
    outlier_norms: Mapping[HookPoint, float] = field(default_factory=dict)  # the same at the hook points named
    session: Mapping[str, Any] | None = None  # further arguments of Session: n_threads, kv_type, flash_attn


@dataclass(frozen=True, kw_only=True, slots=True)
class SpliceResult:
    """Per counted token, in window order: cross entropy (nats) and KL(clean || run) of every run."""

    ce: dict[str, np.ndarray]
    kl: dict[str, np.ndarray]
    document_N: np.ndarray
    window_N: np.ndarray
    rows: int  # all rows decoded
    flagged_rows: int


@dataclass(slots=True)
class _Batch:
    """Windows laid end to end; row of (seq, pos) is start_B[seq] + pos."""

    tokens_N: np.ndarray
    seq_N: np.ndarray
    pos_N: np.ndarray
    flags_N: np.ndarray
    document_N: np.ndarray
    start_B: np.ndarray


def split_windows(table: WindowTable) -> list[TokenWindow]:
    """The windows of a table, in its order."""
    bounds = np.asarray(table.window_starts).tolist()
    return [
        TokenWindow(tokens=table.token_N[a:b], flags=table.flags_N[a:b] & FLAGS_ALL, document=int(table.doc_N[a]))
        for a, b in pairwise(bounds)
    ]


def batches(windows: list[TokenWindow], batch_tokens: int) -> Iterator[list[TokenWindow]]:
    """Consecutive windows, together at most `batch_tokens` rows, or a single longer window.

    Each window gets a KV as long as the longest: so few windows that those hold at most twice the rows.
    """
    longest = max((len(w.tokens) for w in windows), default=1)
    limit = min(MAX_SEQUENCES, max(1, 2 * batch_tokens // longest))
    batch: list[TokenWindow] = []
    rows = 0
    for window in windows:
        if batch and (rows + len(window.tokens) > batch_tokens or len(batch) == limit):
            yield batch
            batch, rows = [], 0
        batch.append(window)
        rows += len(window.tokens)
    if batch:
        yield batch


def splice(
    model: Model,
    windows: list[TokenWindow],
    replacements: Mapping[str, Reconstruct],
    hook: HookPoint,
    *,
    config: SpliceConfig | None = None,
    wired: Mapping[str, Wired] | None = None,
    joint: Mapping[str, Joint] | None = None,
    observe: Observe | None = None,
    progress: Callable[[int], None] | None = None,
) -> SpliceResult:
    """Cross entropy and KL per token of the clean run and of every replacement at `hook`.

    `replacements` maps a run's name to x_ND -> x_hat_ND; it is called once per batch, with the unflagged
    rows only, and so are the runs of `wired`. `joint` maps the names of further runs to what they put at each hook
    point; these are called with the rows as llama.cpp computes them, one or more times per batch. A row that is an
    outlier or not finite at any of the hook points is flagged in every run. `observe` sees the logits of every run's
    counted rows, piece by piece; `progress` receives the rows of each finished batch. Raises ShapeError without
    windows, or where what replaces rows has another shape than they.
    """
    config = config or SpliceConfig()
    before = {name: _alone(hook, reconstruct) for name, reconstruct in replacements.items()} | dict(wired or {})
    if not windows:
        raise ShapeError("expected held-out windows to splice into, got none; widen the corpus or its held-out split")
    piece = max(1, min(config.batch_tokens, config.logits_bytes // (4 * model.n_vocab)))
    groups = list(batches(windows, piece))
    parts: dict[str, list[np.ndarray]] = {}
    session = Session(
        model,
        # A KV of its own for each window: attending over the whole batch's cells, masked, costs a tenth.
        n_ctx=max(map(len, groups)) * max(len(w.tokens) for w in windows),
        n_batch=piece,
        n_seq_max=max(map(len, groups)),
        kv_unified=False,
        **dict(config.session or {}),
    )
    try:
        done = flagged = first_window = 0
        for group in groups:
            batch = _lay_out(group)
            counted_N, values = _measure(session, batch, hook, before, joint or {}, piece, config, observe)
            done, flagged = done + len(batch.tokens_N), flagged + int((batch.flags_N != 0).sum())
            values["document"] = batch.document_N[counted_N]
            values["window"] = batch.seq_N[counted_N] + first_window
            first_window += len(group)
            for key, array in values.items():
                parts.setdefault(key, []).append(array)
            if progress is not None:
                progress(len(batch.tokens_N))
    finally:
        session.close()
    joined = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    return SpliceResult(
        ce={name: joined[f"ce/{name}"] for name in (CLEAN, *before, *(joint or {}))},
        kl={name: joined[f"kl/{name}"] for name in (*before, *(joint or {}))},
        document_N=joined["document"],
        window_N=joined["window"],
        rows=done,
        flagged_rows=flagged,
    )


def _alone(hook: HookPoint, reconstruct: Reconstruct) -> Wired:
    return Wired(points=(hook,), reconstruct=lambda acts: {hook: reconstruct(acts[hook])})


def _lay_out(group: list[TokenWindow]) -> _Batch:
    lengths = np.array([len(w.tokens) for w in group])
    start_B = np.r_[0, np.cumsum(lengths)[:-1]]
    seq_N = np.repeat(np.arange(len(group), dtype=np.int32), lengths)
    return _Batch(
        tokens_N=np.concatenate([w.tokens for w in group]).astype(np.int32),
        seq_N=seq_N,
        pos_N=(np.arange(lengths.sum()) - start_B[seq_N]).astype(np.int32),
        flags_N=np.concatenate([w.flags for w in group]).astype(np.int64),
        document_N=np.repeat([w.document for w in group], lengths),
        start_B=start_B,
    )


def _measure(
    session: Session,
    batch: _Batch,
    hook: HookPoint,
    before: Mapping[str, Wired],
    joint: Mapping[str, Joint],
    piece: int,
    config: SpliceConfig,
    observe: Observe | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows counted, `ce/<run>` and `kl/<run>` of them). Flags the rows that are outliers or not finite, at a hook or at the end."""
    further = [*(run.points for run in before.values()), *joint.values()]
    points = list(dict.fromkeys([hook, *(point for run in further for point in run)]))
    acts, clean = _clean_run(session, batch, points, piece, config)
    _flag(batch, acts, clean, {hook: config.outlier_norm, **config.outlier_norms})
    active_N = batch.flags_N == 0
    n = len(batch.tokens_N)
    has_next_N = np.r_[batch.seq_N[1:] == batch.seq_N[:-1], False]
    is_counted_N = active_N & has_next_N
    counted_N = np.flatnonzero(is_counted_N)
    targets_N = batch.tokens_N[np.minimum(np.arange(n) + 1, n - 1)]
    values = {f"ce/{CLEAN}": cross_entropy(clean.logits_NV, clean.log_z_N, targets_N)[counted_N]}
    if observe is not None:
        observe(CLEAN, clean.logits_NV[counted_N], clean.log_z_N[counted_N])

    def compare(name: str, edits: Sequence[Hook]) -> None:
        ce_N, kl_N = np.empty(n), np.empty(n)
        for rows, logits_NV in _decode(session, batch, edits, piece, name):
            log_z_N = log_normaliser(logits_NV)
            ce_N[rows] = cross_entropy(logits_NV, log_z_N, targets_N[rows])
            reference = Reference(logits_NV=clean.logits_NV[rows], log_z_N=clean.log_z_N[rows])
            kl_N[rows] = kl_divergence(reference, logits_NV, log_z_N)
            if observe is not None:
                observe(name, logits_NV[is_counted_N[rows]], log_z_N[is_counted_N[rows]])
        values[f"ce/{name}"], values[f"kl/{name}"] = ce_N[counted_N], kl_N[counted_N]

    active = {point: x_ND[active_N] for point, x_ND in acts.items()}
    for name, run in before.items():
        found = run.reconstruct({point: active[point] for point in run.points}) if active_N.any() else {}
        stands = {point: _checked(name, y_ND, active[point]) for point, y_ND in found.items()}
        compare(name, [Hook(point=point, edit=_standing(batch, active_N, y_ND)) for point, y_ND in stands.items()])
    for name, run in joint.items():
        compare(name, [Hook(point=point, edit=_live(name, batch, active_N, run[point])) for point in run])
    return counted_N, values


def _flag(
    batch: _Batch, acts: Mapping[HookPoint, np.ndarray], clean: Reference, limits: Mapping[HookPoint, float]
) -> None:
    """Flag the rows that are not finite, at a hook or at the end, and those whose norm is above a hook's limit (0: none)."""
    for point, x_ND in acts.items():
        batch.flags_N[~(np.isfinite(x_ND).all(axis=1) & np.isfinite(clean.log_z_N))] |= FLAG_NOT_FINITE
        if limits.get(point, 0.0) > 0:
            batch.flags_N[np.linalg.norm(x_ND, axis=1) > limits[point]] |= FLAG_OUTLIER


def _clean_run(
    session: Session, batch: _Batch, points: Sequence[HookPoint], piece: int, config: SpliceConfig
) -> tuple[dict[HookPoint, np.ndarray], Reference]:
    """The activations at the hook points and the logits of every row, nothing changed."""
    n = len(batch.tokens_N)
    received: dict[HookPoint, list[tuple[np.ndarray, np.ndarray]]] = {point: [] for point in points}

    def reader(point: HookPoint) -> Callable[[Rows], None]:
        def read(rows: Rows) -> None:
            received[point].append((batch.start_B[rows.seq_N] + rows.pos_N, rows.values_ND.copy()))

        return read

    logits_NV: np.ndarray | None = None
    log_z_N = np.empty(n)
    for rows, piece_NV in _decode(session, batch, [Hook(point=p, read=reader(p)) for p in points], piece, ""):
        if logits_NV is None:
            logits_NV = _logits_buffer((n, piece_NV.shape[1]), config.logits_bytes)
        logits_NV[rows] = piece_NV
        log_z_N[rows] = log_normaliser(piece_NV)
    assert logits_NV is not None
    return {p: _in_order(p, parts, n) for p, parts in received.items()}, Reference(logits_NV=logits_NV, log_z_N=log_z_N)


def _in_order(point: HookPoint, parts: list[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    """What was received of a batch, as (n, width) in the batch's order."""
    order_N = np.concatenate([index for index, _ in parts])
    if not np.array_equal(np.sort(order_N), np.arange(n)):
        raise ShapeError(f"expected {n} rows at {point}, got {len(order_N)}; this is a fault of the hook's row mapping")
    x_ND = np.empty((n, parts[0][1].shape[1]), np.float32)
    x_ND[order_N] = np.concatenate([values for _, values in parts])
    return x_ND


def _logits_buffer(shape: tuple[int, int], budget_bytes: int) -> np.ndarray:
    """Memory, or an unnamed file where one long window of a large vocabulary would not fit."""
    if 4 * shape[0] * shape[1] <= budget_bytes:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the unnamed file alive
        return np.memmap(file, np.float32, "w+", shape=shape)


def _decode(
    session: Session, batch: _Batch, hooks: Sequence[Hook], piece: int, key: str
) -> Iterator[tuple[slice, np.ndarray]]:
    """Decodes the batch from an empty KV in pieces of `piece` rows; yields the rows and their logits."""
    session.clear()
    for start in range(0, len(batch.tokens_N), piece):
        rows = slice(start, min(start + piece, len(batch.tokens_N)))
        logits_NV = session.decode(
            batch.tokens_N[rows], batch.seq_N[rows], batch.pos_N[rows], hooks=hooks, logits="all", edits_key=key
        )
        assert logits_NV is not None
        yield rows, logits_NV


def _standing(batch: _Batch, active_N: np.ndarray, y_ND: np.ndarray) -> Callable[[Rows], np.ndarray | None]:
    """Puts `y_ND`, the rows of the active ones in the batch's order, in place of what they are in this run."""
    place_N = np.cumsum(active_N) - 1
    return _edit(batch, active_N, lambda x_ND, at_N: y_ND[place_N[at_N]])


def _live(
    name: str, batch: _Batch, active_N: np.ndarray, reconstruct: Reconstruct
) -> Callable[[Rows], np.ndarray | None]:
    """Replaces the unflagged rows by the reconstruction of what they are in this very run."""
    return _edit(batch, active_N, lambda x_ND, at_N: _checked(name, reconstruct(x_ND), x_ND))


def _edit(
    batch: _Batch, active_N: np.ndarray, replaced: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[[Rows], np.ndarray | None]:
    """`replaced` gets the unflagged rows and their places in the batch."""

    def edit(rows: Rows) -> np.ndarray | None:
        at_N = batch.start_B[rows.seq_N] + rows.pos_N
        free_N = active_N[at_N]
        if not free_N.any():
            return None
        x_ND = rows.values_ND[free_N]
        delta_ND = np.zeros_like(rows.values_ND)
        delta_ND[free_N] = replaced(x_ND, at_N[free_N]) - x_ND
        return delta_ND

    return edit


def _checked(name: str, x_hat_ND: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
    if x_hat_ND.shape != x_ND.shape:
        raise ShapeError(
            f"expected the reconstruction of run {name!r} to be {x_ND.shape}, got {x_hat_ND.shape}; "
            "was it trained on another hook point or model?"
        )
    return x_hat_ND
