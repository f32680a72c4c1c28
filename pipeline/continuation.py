"""The model's own continuation of many prompts at once, for corpora with `corpus.generate_tokens`.

Letters: T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from sae.errors import ConfigError

from .config import ModelConfig
from .generate import sample
from .llama.model import Model
from .llama.session import Session

N_PARALLEL = 16


class BatchGenerator:
    """Continues up to `n_parallel` prompts together, each a sequence of its own in one session.

    Temperature 0 takes the most probable token, above 0 samples with a generator of (`seed`, number of the
    prompt), so that a prompt's draws do not depend on those beside it. An end-of-generation token ends a
    continuation and is not part of it. A context manager; the session is made for the first prompts.
    """

    def __init__(
        self,
        model: Model,
        *,
        context_tokens: int,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        config: ModelConfig | None = None,
        n_parallel: int = N_PARALLEL,
    ) -> None:
        if max_tokens < 1 or not temperature >= 0:
            raise ConfigError(
                f"expected corpus.generate_tokens of at least 1 and corpus.generate_temperature of at least 0, "
                f"got {max_tokens} and {temperature}"
            )
        self.model, self.context_tokens, self.max_tokens = model, context_tokens, max_tokens
        self.temperature, self.seed, self.n_parallel = temperature, seed, n_parallel
        self.config = config or ModelConfig()
        self._session: Session | None = None

    def __enter__(self) -> BatchGenerator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._session is not None:
            self._session.close()

    def __call__(self, prompts: Sequence[np.ndarray], first: int) -> list[np.ndarray]:
        """The ids after each prompt (T,), each array at most `max_tokens` long. `first`: number of the first prompt."""
        session = self._open()
        session.clear()
        rngs = [np.random.default_rng([abs(self.seed), first + index]) for index in range(len(prompts))]
        found: list[list[int]] = [[] for _ in prompts]
        open_ones: list[int] = []
        for group in _groups([len(prompt) for prompt in prompts], session.n_batch):
            logits_SV = self._decode([(s, 0, prompts[s]) for s in group])
            open_ones += self._next(group, logits_SV, rngs, found)
        while open_ones := [s for s in open_ones if len(found[s]) < self.max_tokens]:
            tokens = [(s, len(prompts[s]) + len(found[s]) - 1, np.array(found[s][-1:])) for s in open_ones]
            open_ones = self._next(open_ones, self._decode(tokens), rngs, found)
        return [np.array(tokens, np.int32) for tokens in found]

    def _next(
        self, sequences: list[int], logits_SV: np.ndarray, rngs: list[np.random.Generator], found: list[list[int]]
    ) -> list[int]:
        """Choose a token for each sequence; those that go on."""
        going = []
        for s, logits_V in zip(sequences, logits_SV, strict=True):
            token = sample(logits_V, self.temperature, rngs[s])
            if not self.model.is_end(token):
                found[s].append(token)
                going.append(s)
        return going

    def _decode(self, parts: list[tuple[int, int, np.ndarray]]) -> np.ndarray:
        """The logits after the last token of each (sequence, first position, tokens)."""
        tokens_N = np.concatenate([tokens for _, _, tokens in parts])
        seq_N = np.concatenate([np.full(len(tokens), s) for s, _, tokens in parts])
        pos_N = np.concatenate([np.arange(start, start + len(tokens)) for _, start, tokens in parts])
        logits = self._open().decode(tokens_N, seq_N, pos_N, logits="last")
        assert logits is not None
        return logits

    def _open(self) -> Session:
        if self._session is None:
            self._session = Session(
                self.model,
                n_ctx=self.context_tokens * self.n_parallel,
                n_batch=max(self.context_tokens, self.n_parallel),
                n_seq_max=self.n_parallel,
                n_threads=self.config.n_threads,
                kv_type=self.config.kv_type,
                flash_attn=self.config.flash_attn,
                kv_unified=False,
            )
        return self._session


def _groups(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Consecutive prompts that fit one decode."""
    group: list[int] = []
    for index, length in enumerate(lengths):
        if group and sum(lengths[i] for i in group) + length > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
