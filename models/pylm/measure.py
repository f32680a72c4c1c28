"""Held-out bits per byte of pylm from llama.cpp's own logits, beside xz and a 5-gram: `python -m models.pylm.measure`.

Every held-out file is cut into windows of the model's context that start with BOS, as `extract` does, so
the first token of a window is predicted from nothing. EOS is not counted: the other compressors know
the length of a file too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from pipeline.generate import generate
from pipeline.llama.model import Model
from pipeline.llama.session import Session

from . import data
from .export import OUT

ORDER = 5


def model_bits(model: Model, session: Session, ids: np.ndarray, context: int) -> float:
    """-sum log2 p(token) of one document."""
    bits, body = 0.0, context - 1
    for start in range(0, len(ids), body):
        piece = ids[start : start + body]
        tokens = np.concatenate([[data.BOS_ID], piece[:-1]]).astype(np.int32)
        session.clear()
        logits = session.decode(tokens, np.zeros_like(tokens), np.arange(len(tokens), dtype=np.int32), logits="all")
        assert logits is not None
        z = logits.astype(np.float64)
        z -= z.max(1, keepdims=True)
        log_p = z[np.arange(len(piece)), piece] - np.log(np.exp(z).sum(1))
        bits -= log_p.sum() / np.log(2)
    return bits


def xz(blob: bytes) -> int:
    return 8 * len(lzma.compress(blob, preset=9 | lzma.PRESET_EXTREME))


class NGram:
    """Interpolated 5-gram over the model's own tokens with Witten-Bell weights, down to a uniform 0-gram."""

    def __init__(self, documents: list[np.ndarray], vocab: int) -> None:
        self.vocab = vocab
        self.counts: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for ids in documents:
            seq = [data.BOS_ID, *ids.tolist()]
            for i in range(1, len(seq)):
                for n in range(min(ORDER, i + 1)):
                    row = self.counts[tuple(seq[i - n : i])]
                    row[seq[i]] = row.get(seq[i], 0) + 1
        self.totals = {context: sum(row.values()) for context, row in self.counts.items()}

    def bits(self, ids: np.ndarray) -> float:
        seq = [data.BOS_ID, *ids.tolist()]
        total = 0.0
        for i in range(1, len(seq)):
            p = 1 / self.vocab
            for n in range(min(ORDER, i + 1)):
                row = self.counts.get(tuple(seq[i - n : i]))
                if row is None:
                    break
                count, kinds = self.totals[tuple(seq[i - n : i])], len(row)
                p = (row.get(seq[i], 0) + kinds * p) / (count + kinds)
            total -= np.log2(p)
        return total


def complete(model: Model, session: Session, prompt: str, n: int, temperature: float = 0.6) -> str:
    """A sampled completion (seed 0)."""
    tokens = [data.BOS_ID, *model.tokenize(prompt.encode()).tolist()]
    events = generate(session, model, tokens, max_tokens=n, temperature=temperature, seed=0)
    return "".join(event.text for event in events if event.phase == "response")


PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "    for i in range(",
    '    """Return the ',
)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--model", type=Path, default=OUT)
    ap.add_argument("--no-ngram", action="store_true")
    args = ap.parse_args()
    held, train = data.documents(held_out=True), data.documents(held_out=False)
    held_bytes = sum(len(text.encode()) for _, text in held)
    result: dict[str, float | str] = {"held_out_files": len(held), "held_out_bytes": held_bytes}
    with Model(args.model) as model:
        context = model.n_ctx_train
        session = Session(model, n_ctx=context, n_ubatch=context)
        began = time.time()
        ids = [model.tokenize(text.encode()) for _, text in held]
        result["model"] = sum(model_bits(model, session, i, context) for i in ids) / held_bytes
        result["seconds"] = time.time() - began
        for prompt in PROMPTS:
            result[prompt] = complete(model, session, prompt, 48)
        if not args.no_ngram:
            ngram = NGram([model.tokenize(text.encode()) for _, text in train], model.n_vocab)
            result["5-gram"] = sum(ngram.bits(i) for i in ids) / held_bytes
        session.close()
    result["xz -9e of each file"] = sum(xz(text.encode()) for _, text in held) / held_bytes
    together = b"".join(text.encode() for _, text in train)
    result["xz(train+held-out) - xz(train)"] = (
        xz(together + b"".join(t.encode() for _, t in held)) - xz(together)
    ) / held_bytes
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
