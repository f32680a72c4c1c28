"""The peers of `bench.grid`, in the environment of `bench.train_peers`: a whole training on given rows, and its SAE's files.

Rows come from a file in the order in which our trainer reads them, so that every side sees the same batches. They are
scaled as each library wants them; what it writes is for raw rows again. Letters: N rows, D width, B rows of a batch.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import serve
from bench.train_peers import LIBRARIES, MODULES, version
from bench.train_worker import Problem


def scale_for(library: str, rows: dict[str, float], d_in: int) -> float:
    """What raw rows are multiplied by. `rows`: their `mean_norm` and `mean_square` (of the norm).

    SAELens ("expected_average_only_in") brings the mean norm to sqrt(d), dictionary_learning the mean squared norm
    to 1; sparsify takes rows as they are.
    """
    if library == "saelens":
        return math.sqrt(d_in) / rows["mean_norm"]
    return 1 / math.sqrt(rows["mean_square"]) if library == "dictionary_learning" else 1.0


def train(
    library: str,
    options: dict[str, Any],
    rows: str,
    statistics: dict[str, float],
    shape: dict[str, Any],
    steps: int,
    lr: float,
    warmup_steps: int,
    decay_steps: int,
    dead_after_tokens: int,
    seed: int,
    threads: int,
    save: str,
) -> dict[str, Any]:
    """Train on the first `steps` batches of `rows`; the SAE goes to the folder `save`.

    `fvu_of_first_batch`: sum ||x - x_hat||^2 over N variance of the first batch by the finished SAE, as the library
    itself computes it. `seconds` are those of the steps.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x_ND = np.load(rows, mmap_mode="r")
    scale, batch = scale_for(library, statistics, shape["d_in"]), shape["batch"]
    problem = Problem(
        **shape, steps=steps, lr=lr, seed=seed, mean_D=torch.from_numpy(np.load(Path(rows).with_name("mean.npy"))) * scale,
        variance=statistics["variance"] * scale**2, warmup_steps=warmup_steps, decay_steps=decay_steps,
        dead_after_tokens=dead_after_tokens,
    )  # fmt: skip
    side = LIBRARIES[library](problem, **options)
    seconds = 0.0
    for step in range(steps):
        x_BD = torch.from_numpy(np.asarray(x_ND[step * batch : (step + 1) * batch], np.float32) * np.float32(scale))
        started = time.perf_counter()
        side.step(x_BD)
        seconds += time.perf_counter() - started
    x_BD = torch.from_numpy(x_ND[:batch] * np.float32(scale))
    with torch.no_grad():
        found = float((x_BD - side.reconstruct(x_BD)).double().pow(2).sum()) / (batch * problem.variance)
    side.save(Path(save), scale)
    return {"seconds": seconds, "fvu_of_first_batch": found}


def main() -> None:
    """Answer requests until the input ends. The library named on the command line is imported first."""
    with contextlib.redirect_stdout(sys.stderr):
        for library in sys.argv[1:]:
            importlib.import_module(MODULES[library])
    serve({"train": train, "version": version})


if __name__ == "__main__":
    main()
