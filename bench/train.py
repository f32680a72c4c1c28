"""`python -m bench.train [--quick] [--json FILE]`: our training step against sparsify, SAELens, dictionary_learning, the floor.

Same toy rows, same threads, sides in turns, each in a process of its own. The peers live in an environment of their
own (`make bench-env`); without it only our own parts and the floor are measured and the table says so. `--curves`:
FVU over tokens and seconds instead of speed. On a machine with CUDA also our Triton step beside sparsify's fused one there
(`--only gpu`: nothing else).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import train_cases as cases
from bench import train_curves as curves
from bench import train_gpu as gpu
from bench import train_together as together
from bench.common import TRAIN_PEER_PYTHON, BenchError, Row, machine, report, write_json

SHAPES = {"main": cases.MAIN, "small": cases.SMALL, "large": cases.LARGE}
GROUPS = ("peers", "parts", "together")
GPU = "gpu"
STORE_ROWS = {False: 250_000, True: 49_152}  # of `together`; the second with --quick


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cuda = gpu.device_name()
    options.only = groups(options.only or [], cuda)
    if GPU in options.only and not cuda:
        _say(f"bench.train: --only {GPU} needs a GPU that torch can use, and torch {gpu.torch_build()} finds none")
        return 2
    facts: dict[str, Any] = machine()
    rows: list[Row] = []
    rounds: dict[str, dict[str, list[float]]] = {}
    started = time.monotonic()

    def save() -> None:
        facts["seconds"] = round(time.monotonic() - started)
        if options.json is not None:
            write_json(options.json, rows, facts | {"tokens_per_s of the rounds": rounds})

    def keep(case: str, speeds: dict[str, list[float]]) -> None:
        rounds[case] = speeds
        save()

    settings = cases.Settings.quick() if options.quick else cases.Settings()
    shapes = tuple(SHAPES[name] for name in options.shapes)
    settings = settings.changed(threads=options.threads, rounds=options.rounds, shapes=shapes, keep=keep)
    facts |= {"threads": settings.threads} | ({"gpu": cuda} if cuda else {})
    with_peers = TRAIN_PEER_PYTHON.exists()
    if not with_peers:
        facts["left out"] = "other trainers: run `make bench-env` first"
    for name, found in _groups(options, settings, with_peers):
        try:
            for row in found:
                rows.append(row)
                save()
        except BenchError as error:  # the other groups' rows are worth their time
            facts.setdefault("failed", []).append(f"{name}: {error}")
    save()
    report(rows, facts, title="training")
    return 3 if "failed" in facts else 0


def groups(asked: list[str], cuda: str) -> list[str]:
    """What was asked for, or all that the machine can do; `cuda`: its GPU's name."""
    return asked or [*GROUPS, *([GPU] if cuda else [])]


def _groups(
    options: argparse.Namespace, settings: cases.Settings, with_peers: bool
) -> Iterator[tuple[str, Iterator[Row]]]:
    if options.curves:
        wanted = curves.Curves(lrs=tuple(options.lr), steps=options.steps, libraries=tuple(options.libraries))
        for shape in settings.shapes:
            yield f"{shape.name} curves", curves.rows(shape, settings, wanted, _say, with_peers=with_peers)
        return
    for shape in settings.shapes:
        if "peers" in options.only:
            yield f"{shape.name} peers", cases.against_peers(shape, settings, _say, with_peers=with_peers)
        if "parts" in options.only and (shape == cases.MAIN or not settings.short):
            yield f"{shape.name} parts", cases.own_parts(shape, settings, _say)
    if "together" in options.only:
        yield "together", together.rows(settings, _say, STORE_ROWS[settings.short])
    if GPU in options.only:
        yield GPU, gpu.rows(gpu.SHAPE, settings, _say, with_peers=with_peers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter rounds and fewer peers, under five minutes")
    parser.add_argument("--json", type=Path, help="write the rows there too, after every one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=(*GROUPS, GPU), help=f"all; {GPU} where there is one")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--curves", action="store_true", help="FVU over tokens instead of speed; hours for all of it")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=list(curves.LRS), help="of the curves; 0: each one's own"
    )
    parser.add_argument("--steps", type=int, default=200, help="of a curve")
    parser.add_argument("--libraries", nargs="+", choices=curves.LIBRARIES, default=list(curves.LIBRARIES))
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
