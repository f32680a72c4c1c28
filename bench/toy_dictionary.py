"""`python -m bench.toy_dictionary [--json FILE]`: does a trained SAE find the dictionary that made the rows?

Toy rows with known features (`bench.superposition`), the real trainer, and `sae.ground_truth`'s mean max cosine and
recovered share; beside them the dictionary training starts from, which is what chance gives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Row, machine, report
from bench.superposition import Superposition
from sae.ground_truth import dictionary_recovery
from sae.metrics import ReconstructionMetrics
from sae.options import SAEOptions
from sae.runtime import decode, encode
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.weights import SAEWeights

# name of a row -> fields of TrainConfig; ReLU finds most with this penalty, at five times the L0 (larger ones need more tokens)
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"variant": "batchtopk"},
    "relu": {"variant": "relu", "options": SAEOptions(l1_coef=2.0)},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes. As many features are drawn a row as the SAE may use."""

    d_in: int = 64
    truths: int = 256
    num_latents: int = 512
    k: int = 8
    tokens: int = 1_000_000
    batch_tokens: int = 1024
    lr: float = 4e-3
    held_out_rows: int = 8192
    seed: int = 0


class Rows:
    """A `BatchSource` of toy rows."""

    def __init__(self, toy: Superposition, batch: int) -> None:
        self.toy, self.batch, self.d_in, self.served = toy, batch, toy.truth_MD.shape[1], 0

    def next(self) -> np.ndarray:
        self.served += 1
        return self.toy.batch(self.served, self.batch)

    def state(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def rows(problem: Problem, variants: dict[str, dict[str, Any]] = VARIANTS) -> Iterator[Row]:
    """`ours`: after training, `theirs`: before; for each variant both measures, FVU beside them."""
    toy = Superposition(problem.d_in, problem.truths, seed=problem.seed, draws=problem.k)
    case = f"d{problem.d_in}_m{problem.truths}_n{problem.num_latents}_k{problem.k}_{problem.tokens // 1000}k"
    for name, settings in variants.items():
        before, after = trained(toy, problem, settings)
        result = held_out(toy, after, problem)
        note = f"FVU {result['fvu']:.4f}, L0 {result['l0']:.1f}"
        start, end = (dictionary_recovery(weights.W_dec_FD, toy.truth_MD) for weights in (before, after))
        for measure in end:
            ratio = end[measure] / max(start[measure], 1 / problem.truths)  # none recovered counts as less than one
            yield Row(
                case=f"{case}_{name}",
                peer="untrained",
                unit=measure,
                ours=end[measure],
                theirs=start[measure],
                ratio=ratio,
                note=f"{end[measure]:.4f} from {start[measure]:.4f}; {note}",
            )


def trained(toy: Superposition, problem: Problem, settings: dict[str, Any]) -> tuple[SAEWeights, SAEWeights]:
    """The SAE before its first step and after its last."""
    sample_ND = toy.held_out(problem.held_out_rows).astype(np.float64)
    mean_D = sample_ND.mean(0)
    config = TrainConfig(
        num_latents=problem.num_latents,
        k=problem.k,
        batch_tokens=problem.batch_tokens,
        tokens=problem.tokens,
        lr=problem.lr,
        seed=problem.seed,
        dead_after_tokens=max(problem.batch_tokens, problem.tokens // 20),
        checkpoint_steps=0,
        **settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config,
            Rows(toy, problem.batch_tokens),
            mean_D=mean_D.astype(np.float32),
            variance=float(((sample_ND - mean_D) ** 2).sum(1).mean()),
            hook="blocks.0.hook_resid_post",
            host={},
            folder=folder,
        )
        before = trainer.weights()
        return before, trainer.fit()


def held_out(toy: Superposition, weights: SAEWeights, problem: Problem) -> dict[str, Any]:
    """The reconstruction metrics on rows that were not trained on."""
    x_ND = toy.held_out(problem.held_out_rows)
    metrics = ReconstructionMetrics(problem.d_in, problem.num_latents)
    idx_NK, vals_NK = encode(weights, x_ND)
    metrics.update(x_ND, decode(weights, idx_NK, vals_NK), idx_NK, vals_NK)
    return metrics.result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.toy_dictionary", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--tokens", type=int, default=Problem().tokens)
    parser.add_argument("--lr", type=float, default=Problem().lr)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = list(rows(Problem(tokens=options.tokens, lr=options.lr)))
    report(found, machine() | {"threads": options.threads}, title="toy dictionary", json_path=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
