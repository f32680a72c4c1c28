"""Trains the toy SAE in a process of its own: `python -m tests.sae.train_toy FOLDER [resume] [limit=BYTES] [every=STEPS] [joint]
[kernel=NAME]`.

Prints one line per step and the hash of the final weights; user errors as `CLASS CODE MESSAGE`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sae.errors import SAEError
from sae.trainer import JointTrainer, TrainConfig, Trainer

from .toy import Toy

CONFIG = TrainConfig(
    num_latents=320,
    k=6,
    batch_tokens=256,
    tokens=60 * 256,
    lr=5e-3,
    warmup_steps=5,
    dead_after_tokens=256,  # so short that some latents count as dead and AuxK takes part
    checkpoint_steps=7,
    log_steps=1,
)


def main() -> None:
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    toy = Toy(batch=256)
    every = [int(word.removeprefix("every=")) for word in words if word.startswith("every=")]
    config = dataclasses.replace(CONFIG, checkpoint_steps=every[0]) if every else CONFIG

    def log(metrics):
        print("step", metrics["step"], metrics["dead"], flush=True)
        for word in words:
            if word.startswith("limit=") and metrics["step"] == 20:
                size = int(word.removeprefix("limit="))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    kernel = next((word.removeprefix("kernel=") for word in words if word.startswith("kernel=")), "auto")
    config = replace(config, kernel=kernel)
    try:
        if "joint" in words:
            configs = {"a": config, "b": dataclasses.replace(config, k=3, seed=1)}
            run = JointTrainer(configs, toy, **toy.statistics(), folder=Path(folder), log=lambda _name, row: log(row))
            found = list(run.fit(resume="resume" in words).values())
        else:
            run = Trainer(config, toy, **toy.statistics(), folder=Path(folder), log=log)
            found = [run.fit(resume="resume" in words)]
    except SAEError as error:
        print(type(error).__name__, error.exit_code, error)
        return
    arrays = [array for w in found for array in (w.W_enc_FD, w.b_enc_F, w.W_dec_FD, w.b_dec_D, w.freq_F)]
    print("weights", hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())


if __name__ == "__main__":
    main()
