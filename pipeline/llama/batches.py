"""Which tokens of a batch llama.cpp computes together, and in which row order.

`llama_decode` cuts a batch into micro-batches of `n_ubatch` tokens. With one KV buffer for all sequences it takes
them in batch order; with one per sequence it takes equally many tokens of several sequences and lays them one
sequence after the other (llama.cpp, `llama_batch_allocr::split_simple` and `split_equal`). The callback checks every
prediction against the tokens and positions in the graph's own inputs.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .symbols import lc


def split_simple(n_tokens: int, n_ubatch: int) -> list[np.ndarray]:
    """Consecutive pieces: batch rows of each micro-batch, in row order."""
    return [np.arange(start, min(start + n_ubatch, n_tokens)) for start in range(0, n_tokens, n_ubatch)]


def split_equal(seq_N: np.ndarray, n_ubatch: int) -> list[np.ndarray]:
    """Equally many tokens of consecutive sequence ids at a time, laid out sequence after sequence."""
    unused_N = np.ones(len(seq_N), bool)
    rows_of = {int(s): np.flatnonzero(seq_N == s) for s in np.unique(seq_N)}
    pieces = []
    while unused_N.any():
        taken = _sequences_together(seq_N[unused_N], n_ubatch)
        shortest = min(len(rows_of[s]) for s in taken)
        length = max(1, min(shortest, n_ubatch // len(taken)))
        piece = np.concatenate([rows_of[s][:length] for s in taken])
        for s in taken:
            rows_of[s] = rows_of[s][length:]
        unused_N[piece] = False
        pieces.append(piece)
    return pieces


def _sequences_together(seq_N: np.ndarray, n_ubatch: int) -> list[int]:
    """Sequence ids of the next micro-batch: one pass over the unused tokens, taking each id one above the last."""
    run_starts = np.flatnonzero(np.r_[True, seq_N[1:] != seq_N[:-1]])
    taken = [int(seq_N[0])]
    for seq in seq_N[run_starts].tolist():
        if seq == taken[-1] + 1:
            taken.append(seq)
            if len(taken) > n_ubatch:
                break
    return taken


class Batch:
    """A `llama_batch` over numpy arrays: one sequence per token."""

    def __init__(self, tokens_N: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray, output_N: np.ndarray) -> None:
        n = len(tokens_N)
        self.tokens_N = np.ascontiguousarray(tokens_N, np.int32)
        self.seq_N = np.ascontiguousarray(seq_N, np.int32)
        self.pos_N = np.ascontiguousarray(pos_N, np.int32)
        self.output_N = np.ascontiguousarray(output_N, np.int8)
        self._one_N = np.ones(n, np.int32)
        self._seq_addresses_N = self.seq_N.ctypes.data + 4 * np.arange(n, dtype=np.uint64)  # each token's own id list
        types = dict(lc.llama_batch._fields_)
        self.c = lc.llama_batch(
            n_tokens=n,
            token=_pointer(self.tokens_N, types["token"]),
            embd=None,
            pos=_pointer(self.pos_N, types["pos"]),
            n_seq_id=_pointer(self._one_N, types["n_seq_id"]),
            seq_id=_pointer(self._seq_addresses_N, types["seq_id"]),
            logits=_pointer(self.output_N, types["logits"]),
        )


class OneToken:
    """A batch of one token whose arrays are used again: generation decodes thousands of these."""

    def __init__(self, next_pos_S: np.ndarray, *, n_vocab: int, each: int, together: int) -> None:
        """`next_pos_S`: the session's own array; `each`: tokens a sequence may have, `together`: all of them, 0: no limit."""
        self._next_pos_S, self._n_vocab, self._each, self._together = next_pos_S, n_vocab, each, together
        self._batch = Batch(*(np.zeros(1) for _ in range(4)))

    def take(self, tokens: object, seq: object, pos: object, logits: str) -> Batch | None:
        """The batch of one good token. None for anything else: the general path computes it, or says what is wrong."""
        found = [
            int(a[0])
            for a in (tokens, seq, pos)
            if isinstance(a, np.ndarray) and a.shape == (1,) and a.dtype.kind == "i"
        ]
        if len(found) != 3 or logits not in ("none", "last", "all"):
            return None
        token, s, p = found
        if not (0 <= token < self._n_vocab and 0 <= s < len(self._next_pos_S)) or p != self._next_pos_S[s]:
            return None
        if p >= self._each or (self._together and int(self._next_pos_S.sum()) >= self._together):
            return None
        batch = self._batch
        batch.tokens_N[0], batch.seq_N[0], batch.pos_N[0], batch.output_N[0] = token, s, p, logits != "none"
        return batch


def _pointer(array: np.ndarray, kind: type) -> object:
    return ctypes.cast(array.ctypes.data, kind)
