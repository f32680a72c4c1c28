"""Train pylm on the standard library: `python -m models.pylm.train` (see README.md beside this file).

Muon for the matrices of the blocks, AdamW for the rest; warm-up, constant, then linear decay to zero
over the last `--decay` share of the steps. A checkpoint is written every few minutes and the command
continues from it; as long as the decay has not begun, `--steps` may be changed when it does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import data
from .model import PyLM, Shape
from .muon import Muon

WORK = Path(__file__).parent / "work"
TOKENIZER = Path(__file__).parent / "tokenizer.json"
# Without these instructions bfloat16 products run 30 times slower than float32 ones.
FAST_BF16 = torch.cpu._is_avx512_bf16_supported()


def learning_rate_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    start = int(steps * (1 - decay))
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - start)))


def loss_of(model: PyLM, rows: torch.Tensor) -> torch.Tensor:
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long(), ignore_index=-1)


@torch.no_grad()
def held_out_loss(model: PyLM, rows: torch.Tensor, batch: int) -> float:
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        n = int((part[:, 1:] >= 0).sum())
        total, count = total + float(loss_of(model, part)) * n, count + n
    return total / count


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--steps", type=int, default=1200)
    ap.add_argument("--batch", type=int, default=12, help="windows of 512 tokens a step")
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--decay", type=float, default=0.25)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--compile", action="store_true")
    args = ap.parse_args()
    WORK.mkdir(exist_ok=True)
    torch.manual_seed(args.seed)
    train_docs, test_docs = data.documents(held_out=False), data.documents(held_out=True)
    if not TOKENIZER.exists():
        data.train_tokenizer([text for _, text in train_docs]).save(str(TOKENIZER))
    tokenizer = data.load_tokenizer(TOKENIZER)
    train = data.encode(tokenizer, [text for _, text in train_docs])
    test = data.encode(tokenizer, [text for _, text in test_docs])
    test_bytes = sum(len(text.encode()) for _, text in test_docs)
    shape = Shape(vocab=tokenizer.get_vocab_size())
    test_rows = torch.from_numpy(data.epoch_windows(test, shape.context, data.np.random.default_rng(1)))
    model = PyLM(shape)
    print(
        f"python {sys.version.split()[0]}; train {len(train)} files, {sum(map(len, train))} tokens; held out "
        f"{len(test)} files, {sum(map(len, test))} tokens, {test_bytes} bytes; "
        f"{sum(p.numel() for p in model.parameters())} parameters",
        flush=True,
    )
    matrices = [p for n, p in model.named_parameters() if n.startswith("layers") and p.dim() == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("layers") and p.dim() == 2)]
    optimizers = [
        Muon(matrices, lr=args.lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    step, seconds, checkpoint = 0, 0.0, WORK / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, s in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        step, seconds = state["step"], state["seconds"]
        print(f"continues at step {step}", flush=True)
    run = torch.compile(model) if args.compile else model
    began, saved = time.time() - seconds, time.time()
    for epoch, rows in data.batches(train, shape.context, args.batch, args.seed, step):
        if step >= args.steps:
            break
        factor = learning_rate_factor(step, args.steps, 100, args.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        loss = loss_of(run, torch.from_numpy(rows))  # type: ignore[arg-type]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 5 == 0:
            rate = step * args.batch * shape.context / (time.time() - began)
            print(
                f"step {step} epoch {epoch} loss {loss.item():.4f} lr {args.lr * factor:.5f} {rate:.0f} tok/s",
                flush=True,
            )
        if step % 200 == 0 or step == args.steps:
            test_loss = held_out_loss(model, test_rows[:32] if step < args.steps else test_rows, args.batch)
            tokens = sum(map(len, test))
            print(
                f"step {step} held-out loss {test_loss:.4f} bits/byte {test_loss / 0.6931472 * tokens / test_bytes:.4f}",
                flush=True,
            )
        if time.time() - saved > 240 or step == args.steps:
            saved = time.time()
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step, "seconds": saved - began}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    info = {"shape": shape.as_dict(), "steps": step, "seconds": time.time() - began, "python": sys.version.split()[0]}
    info |= {"batch": args.batch, "lr": args.lr, "seed": args.seed}
    (WORK / "training.json").write_text(json.dumps(info, indent=1))


if __name__ == "__main__":
    main()
