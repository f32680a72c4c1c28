"""Tokeniser and training batches of pylm: windows that start with BOS, as at run time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.corpus.stdlib import is_held_out, stdlib_files

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 4096


def documents(*, held_out: bool) -> list[tuple[str, str]]:
    """`(relative path, text)` of the training or the held-out half of the standard library.

    Files that are not UTF-8 are left out, as `extract` does.
    """
    found = []
    for name, path in stdlib_files():
        if is_held_out(name) == held_out:
            try:
                found.append((name, path.read_bytes().decode("utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokeniser, which llama.cpp knows as pre-type `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, without BOS. Special tokens spelled out in a text stay text."""
    tokenizer.encode_special_tokens = True
    return [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def epoch_windows(docs: list[np.ndarray], context: int, rng: np.random.Generator) -> np.ndarray:
    """All windows of one pass, (windows, context + 1) int32, shuffled, padded with -1.

    The first window of a document has a random length, so that window borders move from pass to
    pass. EOS ends the last window of a document.
    """
    body = context - 1
    rows = []
    for doc in docs:
        ids = np.append(doc.astype(np.int32), EOS_ID)
        cut = int(rng.integers(1, body + 1)) if len(ids) > body else 0
        starts = ([0] if cut else []) + list(range(cut, len(ids), body))
        for index, start in enumerate(starts):
            stop = starts[index + 1] if index + 1 < len(starts) else len(ids)
            row = np.full(context + 1, -1, np.int32)
            row[0] = BOS_ID
            piece = ids[start : min(stop, start + body) + 1]  # one token of look-ahead is the last target
            row[1 : 1 + len(piece)] = piece[:context]
            rows.append(row)
    windows = np.stack(rows)
    return windows[rng.permutation(len(windows))]


def batches(docs: list[np.ndarray], context: int, batch: int, seed: int, skip: int) -> Iterator[tuple[int, np.ndarray]]:
    """`(epoch, windows (batch, context + 1))` without end; `skip` batches are passed over to resume."""
    epoch = 0
    while True:
        windows = epoch_windows(docs, context, np.random.default_rng((seed, epoch)))
        for start in range(0, len(windows) - batch + 1, batch):
            if skip:
                skip -= 1
            else:
                yield epoch, windows[start : start + batch]
        epoch += 1
