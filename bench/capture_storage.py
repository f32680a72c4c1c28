"""The cases of `bench.capture` about the store: memory that must not grow with the corpus, and reading back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.capture_cases import BenchModel, Say, Settings, point_of
from bench.common import Row, compare, in_turns, our_worker

GROWTH_TARGET, READ_TARGET = 0.9, 0.7


def memory_growth(model: BenchModel, settings: Settings, say: Say) -> list[Row]:
    """Peak of extract for 1x and 16x the tokens, a fresh process each; the peer is the 1x run.

    The benchmark's own table of tokens, which lies in memory, is left out; a corpus on disk is never held.
    """
    kind, peaks = settings.kinds[-1], {}
    shape = {"batch_tokens": 4 * settings.context, "ubatch_tokens": 512}
    for times in (1, 16):
        say(f"{model.name}: memory for {times}x the tokens")
        request = {"context": settings.context, "threads": settings.threads, "seed": settings.seed, "shape": shape}
        windows = settings.windows(settings.growth_tokens) * times
        with our_worker(settings.threads) as worker:
            worker.ask("start_memory")
            worker.ask("run", path=str(model.file(kind)), points=[point_of(0)], windows=windows, **request)
            found = worker.ask("memory")
            peaks[times] = found["bytes"] - found["table_bytes"]
    return [
        Row(
            case=f"{model.name}_{kind.lower()}_memory_16x_tokens",
            peer="ours-1x",
            unit="MB peak",
            ours=peaks[16] / 1e6,
            theirs=peaks[1] / 1e6,
            ratio=peaks[1] / peaks[16],
            target=GROWTH_TARGET,
        )
    ]


def reading(path: Path, settings: Settings, say: Say) -> list[Row]:
    """Shuffled float32 batches from a store that is not in the page cache, against reading its files in order."""
    width = 768
    with our_worker(settings.threads) as worker:
        say("writing a store to read back")
        worker.ask("write_store", path=str(path), rows=settings.store_rows, width=width, shard_rows=65536)

    def cold(op: str, **request: Any) -> Callable[[], float]:
        def ask() -> float:
            with our_worker(settings.threads) as worker:  # a fresh one: files still mapped do not leave the cache
                return worker.ask(op, path=str(path), **request)["mb_per_s"]

        return ask

    sides = {"shuffled": cold("read_shuffled", batch_rows=4096), "raw": cold("read_raw")}
    speeds = in_turns(sides, settings.rounds, say=lambda text: say(f"reading: {text}"))
    case = f"store_d{width}_rows{settings.store_rows}_cold"
    return [compare(case, "raw-sequential", "MB/s", speeds["shuffled"], speeds["raw"], target=READ_TARGET)]
