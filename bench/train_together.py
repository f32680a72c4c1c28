"""Several SAEs from one reading of a store, against as many trainings one after the other (`bench.train --only together`).

The SAEs are small beside their rows, so that reading bounds: on few cores it takes them from the steps rather than let
those wait. The store is read cold from the disk, its pages dropped before each training.
Seconds are those of `fit` alone: neither the start of a process nor the opening of the store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import Row, cache_folder, compare, in_turns
from bench.stores import drop_from_cache, write_store
from bench.train_cases import Say, Settings, ours_worker
from pipeline.corpus.table import FLAGS_ALL
from pipeline.store.reader import ActivationStore
from pipeline.store.schema import is_store
from sae.train_config import TrainConfig
from sae.trainer import JointTrainer

WIDTH, LATENTS, K, BATCH, SHARD_ROWS = (
    2048,
    256,
    4,
    4096,
    16_384,
)  # a row of these takes longer to read than to train on
SAES = 4
TOGETHER_TARGET = 1.5
LARGER_LATENTS, LARGER_K = 4096, 32  # where arithmetic bounds ...
MOST_WAITING = 0.05  # ... a step waits no longer than this share of the time, as train's own warning has it


def fit_from_store(path: str, seeds: list[int], num_latents: int, k: int, tokens: int, threads: int) -> dict[str, Any]:
    """SAEs that differ in their seed, trained together on a store that is not in the page cache.

    `seconds` of the training, `wait_share` of it as the metrics report it.
    """
    import torch

    torch.set_num_threads(threads)
    store = ActivationStore(path)
    hook = store.meta.hooks[0].name
    stats = store.stats(hook)
    shared: dict[str, Any] = {
        "num_latents": num_latents,
        "k": k,
        "batch_tokens": BATCH,
        "tokens": tokens,
        "checkpoint_steps": 0,
    }
    configs = {f"seed{seed}": TrainConfig(seed=seed, **shared) for seed in seeds}
    source = store.batches(hook, batch_rows=BATCH, seed=0, exclude_flags=FLAGS_ALL)
    with tempfile.TemporaryDirectory() as folder:
        trainer = JointTrainer(
            configs, source, mean_D=stats.mean_D, variance=stats.variance, hook=hook, host={}, folder=folder
        )
        drop_from_cache(Path(path))
        started = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "wait_share": trainer.wait_share}


def rows(settings: Settings, say: Say, store_rows: int) -> Iterator[Row]:
    """SAE tokens a second of one training of all against one after the other; then how long a larger SAE waits."""
    path = cache_folder() / f"store-d{WIDTH}-{store_rows}"
    if not is_store(path):
        say("writing a store to train from")
        write_store(str(path), store_rows, WIDTH, SHARD_ROWS)
    tokens = store_rows // BATCH * BATCH

    with ours_worker(settings.threads) as worker:  # nothing stays mapped, so one process can serve both sides

        def fitted(seeds: list[int], num_latents: int = LATENTS, k: int = K) -> dict[str, Any]:
            request = {"path": str(path), "tokens": tokens, "threads": settings.threads}
            found = worker.ask("fit_from_store", seeds=seeds, num_latents=num_latents, k=k, **request)
            say(f"{len(seeds)} of n{num_latents}: {found['seconds']:.2f} s, waiting {found['wait_share']:.0%}")
            return found

        numbers = list(range(SAES))
        sides = {
            "together": lambda: SAES * tokens / fitted(numbers)["seconds"],
            "separate": lambda: SAES * tokens / sum(fitted([seed])["seconds"] for seed in numbers),
        }
        speeds = in_turns(sides, settings.rounds, say=lambda text: say(f"several SAEs: {text}"))
        case = f"d{WIDTH}_n{LATENTS}_k{K}_b{BATCH}_{SAES}saes_cold_store"
        yield compare(
            case, f"{SAES}-runs", "SAE tokens/s", speeds["together"], speeds["separate"], target=TOGETHER_TARGET
        )
        say("waiting for rows")
        share = fitted([0], LARGER_LATENTS, LARGER_K)["wait_share"]
    yield Row(
        case=f"d{WIDTH}_n{LARGER_LATENTS}_k{LARGER_K}_b{BATCH}_cold_store", peer="most-waiting", unit="share of time",
        ours=share, theirs=MOST_WAITING, ratio=MOST_WAITING / max(share, 1e-6), target=1.0,
    )  # fmt: skip
