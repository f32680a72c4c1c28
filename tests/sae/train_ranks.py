"""Trains two toy SAEs on the ranks of torchrun:
`torchrun ... -m tests.sae.train_ranks FOLDER [stop=STEP] [resume] [latent] [SETTING=VALUE ...]`.

Rank 0 leaves `weights.npz` and `rows.json`; every rank the hash of its weights in `rank-N.txt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.checkpoint_torch import checkpoint_path
from sae.errors import InterruptedRunError
from sae.ranks import torchrun_ranks
from sae.saving import restored
from sae.trainer import JointTrainer, TrainConfig

from .toy import Toy

CONFIG = TrainConfig(
    num_latents=256, k=6, batch_tokens=256, tokens=24 * 256, lr=2e-3, warmup_steps=5, dead_after_tokens=512,
    checkpoint_steps=8, log_steps=4, encoder_dtype="float32", auxk_dtype="float32",
)  # fmt: skip
CONFIGS = {"a": CONFIG, "b": dataclasses.replace(CONFIG, k=3, seed=1, auxk_coef=0.0)}
KINDS = {"lr": float}  # of the settings that are no words
FIELDS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "freq_F")


def main() -> None:
    torch.set_num_threads(1)
    folder, words, toy = Path(sys.argv[1]), sys.argv[2:], Toy(batch=256)
    given = dict(word.split("=") for word in words if "=" in word and not word.startswith("stop="))
    more: dict[str, Any] = {key: KINDS.get(key, str)(value) for key, value in given.items()}
    configs = {
        name: dataclasses.replace(config, parallel="latent" if "latent" in words else "data", save_best=True, **more)
        for name, config in CONFIGS.items()
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGS}

    def progress(tokens: int) -> None:
        if f"stop={tokens // 256}" in words and ranks.rank == ranks.world - 1:  # one rank only is told to stop
            os.kill(os.getpid(), signal.SIGTERM)

    with torchrun_ranks(torch.device("cpu")) as ranks:
        run = JointTrainer(
            configs, toy, **toy.statistics(), folder=folder / "checkpoints", ranks=ranks, progress=progress,
            log=lambda name, row: rows[name].append(row),
        )  # fmt: skip
        try:
            weights = run.fit(resume="resume" in words)
        except InterruptedRunError as error:
            (folder / f"rank-{ranks.rank}.txt").write_text(str(error))
            return
        arrays = {f"{name}.{field}": getattr(w, field) for name, w in weights.items() for field in FIELDS}
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
        (folder / f"rank-{ranks.rank}.txt").write_text(digest)
        if ranks.first:
            np.savez(folder / "weights.npz", **arrays)
            (folder / "rows.json").write_text(json.dumps(rows))
    if ranks.first:  # as the stage does, without the others
        again = run.weights()
        for name, learner in run.learners.items():
            alone = learner.alone()
            restored(alone, checkpoint_path(folder / "checkpoints" / name, learner.step), learner.check_identity)
            for field in FIELDS:
                for found in (again[name], alone.weights()):
                    np.testing.assert_array_equal(getattr(found, field), arrays[f"{name}.{field}"], err_msg=field)


if __name__ == "__main__":
    main()
    left = [name for task in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := task.read_text())]
    assert not left, left  # one that still holds a tensor as Python ends aborts the process
