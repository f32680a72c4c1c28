"""Generation token by token, with SAE readings of every token and interventions on the way.

Shape letters: N tokens decoded together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from sae.errors import ConfigError

from .interventions.base import Intervention, Sequences, edit_hooks, edits_key
from .interventions.inputs import check_order
from .llama.model import Model
from .llama.session import Session
from .readout import Reader, Reading, ReadoutEvent, TextPieces

LOGIT_BYTES = 256 << 20  # most that the logits of one prompt chunk may take
_SEQ = 0


def generate(
    session: Session,
    model: Model,
    prompt_tokens: Sequence[int] | np.ndarray,
    *,
    interventions: Sequence[Intervention] = (),
    readers: Sequence[Reader] = (),
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[ReadoutEvent]:
    """Decodes the prompt, then up to `max_tokens` tokens, and yields one event for each token of both.

    Temperature 0 takes the most probable token (the lowest id among equals), above 0 samples from softmax(logits / T)
    with numpy's generator of this seed. An end-of-generation token ends it and gives no event. The session is cleared
    first: nothing of an earlier run with other interventions can leak in. Readers see a hook point's value before an
    edit at the same point (the model's own value there), and after all edits at points before it (a transcoder's input:
    after the edits at that point too, since its output is computed from them). A generated token is decoded, and so read
    and edited, even when it is the last.

    Raises ConfigError for an empty prompt, token ids the model lacks, a temperature below 0, more tokens than the
    context holds, or a transcoder whose input is not before its output in the model.
    """
    tokens = np.asarray(prompt_tokens, dtype=np.int32).reshape(-1)
    if len(tokens) == 0:
        raise ConfigError("the prompt has no tokens; give a text, or a model that adds a BOS token")
    if tokens.min() < 0 or tokens.max() >= model.n_vocab:
        raise ConfigError(
            f"prompt tokens should be 0..{model.n_vocab - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
    if max_tokens < 0 or not temperature >= 0:
        raise ConfigError(f"max_tokens and temperature should be at least 0, got {max_tokens} and {temperature}")
    if len(tokens) + max_tokens > session.n_ctx_seq:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {max_tokens}, the context holds {session.n_ctx_seq}; "
            "shorten one or raise model.n_ctx"
        )
    run = _Run(session, model, interventions, readers, temperature, np.random.default_rng(seed))
    return run.events(tokens, max_tokens)


def flagged_token(model: Model, token: int) -> bool:
    """BOS and special tokens: no readings, no edits unless named by position."""
    return token == model.bos or model.is_special(token)


def token_logprobs(logits_NV: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """log softmax(logits)[token] in nats, float64 (N,)."""
    logits_NV = logits_NV.astype(np.float64)
    top_N = logits_NV.max(axis=1)
    total_N = np.log(np.exp(logits_NV - top_N[:, None]).sum(axis=1)) + top_N
    return logits_NV[np.arange(len(tokens_N)), tokens_N] - total_N


def sample(logits_V: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """argmax at temperature 0, else one draw from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits_V.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, which exp takes to 0
        scaled_V = (logits_V.astype(np.float64) - logits_V.max()) / temperature
    cumulative_V = np.cumsum(np.exp(scaled_V))
    drawn = np.searchsorted(cumulative_V, rng.random() * cumulative_V[-1], side="right")
    return min(int(drawn), len(logits_V) - 1)


class _Run:
    """One generation: the state between two tokens."""

    def __init__(
        self,
        session: Session,
        model: Model,
        interventions: Sequence[Intervention],
        readers: Sequence[Reader],
        temperature: float,
        rng: np.random.Generator,
    ) -> None:
        self.session, self.model, self.readers = session, model, readers
        self.interventions, self.temperature, self.rng = interventions, temperature, rng
        self.sequences, self.pieces = Sequences(), TextPieces()
        for source, point in [(r.source, r.point) for r in readers] + [(i.reads, i.point) for i in interventions]:
            if source is not None:
                check_order(session.graph, source, point)
        inputs = [hook for reader in readers if (hook := reader.input_hook()) is not None]
        self.hooks = [reader.hook() for reader in readers] + edit_hooks(interventions, self.sequences) + inputs
        self.edits_key = ""

    def events(self, prompt: np.ndarray, max_tokens: int) -> Iterator[ReadoutEvent]:
        self.session.clear()
        # the first row is flagged like in a store, whether it is BOS or not
        self.sequences.start(_SEQ, [i == 0 or flagged_token(self.model, int(t)) for i, t in enumerate(prompt)])
        self.edits_key = edits_key(self.interventions, self.sequences)
        logprobs, readings, logits_V = self._prompt(prompt)
        token, last = self._next(logits_V, max_tokens)
        for pos in range(len(prompt)):
            end = last and pos == len(prompt) - 1
            yield self._event(int(prompt[pos]), pos, "prompt", logprobs[pos], readings[pos], end)
        pos = len(prompt)
        while not last:
            logprob = float(token_logprobs(logits_V[None], np.array([token]))[0])
            self.sequences.append(_SEQ, flagged_token(self.model, token))
            logits_V = self._decode(np.array([token], dtype=np.int32), pos, "last")[0]
            reading = self._take([pos])[0]
            following, last = self._next(logits_V, max_tokens - (pos - len(prompt) + 1))
            yield self._event(token, pos, "response", logprob, reading, last)
            token, pos = following, pos + 1

    def _next(self, logits_V: np.ndarray, remaining: int) -> tuple[int, bool]:
        """The token after these logits, and whether the generation ends before it."""
        if remaining <= 0:
            return -1, True
        token = sample(logits_V, self.temperature, self.rng)
        return token, self.model.is_end(token)

    def _prompt(self, prompt: np.ndarray) -> tuple[list[float | None], list[tuple[Reading, ...]], np.ndarray]:
        step = max(1, min(self.session.n_batch, LOGIT_BYTES // (4 * self.model.n_vocab)))
        logprobs: list[float | None] = [None]
        readings: list[tuple[Reading, ...]] = []
        logits_V = np.empty(0, dtype=np.float32)
        for start in range(0, len(prompt), step):
            chunk = prompt[start : start + step]
            logits_NV = self._decode(chunk, start, "all")
            known = prompt[start + 1 : start + len(chunk) + 1]  # what follows each row, as far as the prompt tells
            logprobs += token_logprobs(logits_NV[: len(known)], known).tolist()
            readings += self._take(list(range(start, start + len(chunk))))
            logits_V = logits_NV[-1].copy()
        return logprobs, readings, logits_V

    def _decode(self, tokens_N: np.ndarray, start: int, logits: Literal["last", "all"]) -> np.ndarray:
        count = len(tokens_N)
        positions_N = np.arange(start, start + count, dtype=np.int32)
        seq_N = np.full(count, _SEQ, dtype=np.int32)
        found = self.session.decode(
            tokens_N, seq_N, positions_N, hooks=self.hooks, logits=logits, edits_key=self.edits_key
        )
        assert found is not None
        return found

    def _take(self, positions: list[int]) -> list[tuple[Reading, ...]]:
        flags = self.sequences.flags[_SEQ]
        wanted = [pos for pos in positions if not flags[pos]]
        columns = [dict(zip(wanted, reader.take(_SEQ, wanted), strict=True)) for reader in self.readers]
        return [tuple(column[pos] for column in columns if pos in column) for pos in positions]

    def _event(
        self, token: int, pos: int, phase: str, logprob: float | None, readings: tuple[Reading, ...], last: bool
    ) -> ReadoutEvent:
        return ReadoutEvent(
            token=token,
            text=self.pieces.feed(self.model.piece(token), last=last),
            pos=pos,
            phase=phase,
            flagged=self.sequences.flags[_SEQ][pos],
            logprob=logprob,
            readings=readings,
        )
