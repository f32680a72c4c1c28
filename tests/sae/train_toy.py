"""Trains the toy SAE in a process of its own: `python -m tests.sae.train_toy FOLDER [resume] [limit=BYTES] [kernel=NAME]`.

Prints one line per step and the hash of the final weights; user errors as `CLASS CODE MESSAGE`.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sae.errors import SAEError
from sae.trainer import TrainConfig, Trainer

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

    def log(metrics):
        print("step", metrics["step"], metrics["dead"], flush=True)
        for word in words:
            if word.startswith("limit=") and metrics["step"] == 20:
                size = int(word.removeprefix("limit="))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    kernel = next((word.removeprefix("kernel=") for word in words if word.startswith("kernel=")), "auto")
    config = replace(CONFIG, kernel=kernel)
    try:
        weights = Trainer(config, toy, **toy.statistics(), folder=Path(folder), log=log).fit(resume="resume" in words)
    except SAEError as error:
        print(type(error).__name__, error.exit_code, error)
        return
    arrays = (weights.W_enc_FD, weights.b_enc_F, weights.W_dec_FD, weights.b_dec_D, weights.freq_F)
    print("weights", hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())


if __name__ == "__main__":
    main()
