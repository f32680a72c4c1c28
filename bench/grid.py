"""`python -m bench.grid [--quick] [--json FILE]`: SAEs of the demo model over k and width, ours beside other trainers'.

Every side trains on the same batches of one store, for every k at the best of a few learning rates by the same rule:
whole trainings at the first width, the lowest FVU on held-out text. `ggscope evaluate` measures all of them on the same held-out text. The peers live in `.venv-bench-train` (`make bench-env`).
A run that was cut off goes on; `--again` trains a side anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import TRAIN_PEER_PYTHON, BenchError, Row, cache_folder, machine, report, write_json
from bench.grid_picture import draw
from bench.grid_runs import OURS, Point, Runs, Settings

LIBRARIES = ("sparsify", "saelens", "dictionary_learning")
KS, WIDTHS = (32, 16, 64), (2048, 4096)
BATCHTOPK = ("dictionary_learning",)  # who is compared there, at the first k
QUICK = Settings(
    store_rows=30_000, tokens=24_576, batch=512, rates=(2e-3, 8e-3), evaluate_tokens=4096,
    splice_tokens=4096,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    settings = QUICK if options.quick else Settings()
    given = {"tokens": options.tokens, "batch": options.batch, "rates": options.lr and tuple(options.lr)}
    settings = replace(settings, **{key: value for key, value in given.items() if value})
    folder = options.folder or settings.folder(cache_folder())
    wanted = points(
        options.k or KS[: 1 if options.quick else None], options.width or WIDTHS[: 1 if options.quick else None]
    )
    runs = Runs(settings, folder, (options.width or WIDTHS)[0], threads=options.threads, say=_say)
    for side in options.again:
        shutil.rmtree(folder / side, ignore_errors=True)
    sides = [side for side in options.sides if side == OURS or TRAIN_PEER_PYTHON.exists()]
    facts: dict[str, Any] = machine() | {"threads": options.threads, "steps": settings.steps, "folder": str(folder)}
    if len(sides) < len(options.sides):
        facts["left out"] = "other trainers: run `make bench-env` first"
    started = time.monotonic()
    found: dict[str, dict[Point, dict[str, Any]]] = {}
    todo = list(tasks(sides, wanted))
    try:
        for side, point in todo:
            found.setdefault(runs.version(side), {})[point] = runs.quality(side, point)
            if options.json is not None:
                write_json(options.json, list(rows(found)), facts | {"found": flat(found)})
        facts["rates"] = {side: {p.name: runs.rate(side, p) for of, p in todo if of == side} for side in sides}
    except BenchError as error:
        facts["failed"] = str(error)
    facts["seconds"] = round(time.monotonic() - started)
    report(list(rows(found)), facts, title="SAEs over k and width")
    if options.json is not None:
        write_json(options.json, list(rows(found)), facts | {"found": flat(found)})
    if options.picture is not None:
        draw(found, options.picture)
    return 3 if "failed" in facts else 0


def points(ks: tuple[int, ...], widths: tuple[int, ...]) -> list[Point]:
    """The grid, then BatchTopK at its first k."""
    topk = [Point(num_latents=n, k=k) for n in widths for k in ks]
    return topk + [Point(num_latents=n, k=ks[0], variant="batchtopk") for n in widths]


def tasks(sides: list[str], wanted: list[Point]) -> Iterator[tuple[str, Point]]:
    """Point by point, each with every side that has it."""
    for point in wanted:
        for side in sides:
            if point.variant == "topk" or side == OURS or side in BATCHTOPK:
                yield side, point


def rows(found: dict[str, dict[Point, dict[str, Any]]]) -> Iterator[Row]:
    """FVU, and what is missing to CE recovered = 1, of every peer beside ours. Where there are no peers: ours alone."""
    mine = found.get(OURS, {})
    for name, theirs in found.items():
        if name == OURS and len(found) > 1:
            continue
        for point, peer in theirs.items():
            if point in mine:
                yield from _pair(point, name, mine[point], peer)


def _pair(point: Point, name: str, mine: dict[str, Any], peer: dict[str, Any]) -> Iterator[Row]:
    note = f"lr {mine['lr']:g}, theirs {peer['lr']:g}; L0 {mine['l0']:.1f}, {peer['l0']:.1f}; dead {mine['dead_share']:.1%}, {peer['dead_share']:.1%}"
    yield Row(
        case=f"{point.name}_fvu", peer=name, unit="FVU", ours=mine["fvu"], theirs=peer["fvu"],
        ratio=peer["fvu"] / mine["fvu"], target=1.0, note=note,
    )  # fmt: skip
    yield Row(
        case=f"{point.name}_ce", peer=name, unit="CE recovered", ours=mine["ce_recovered"],
        theirs=peer["ce_recovered"], ratio=(1 - peer["ce_recovered"]) / (1 - mine["ce_recovered"]), target=1.0,
    )  # fmt: skip


def flat(found: dict[str, dict[Point, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {name: {point.name: numbers for point, numbers in at.items()} for name, at in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.grid", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one point, few tokens: whether it runs, not who is better"
    )
    parser.add_argument("--json", type=Path, help="write the rows there too, after every SAE")
    parser.add_argument("--picture", type=Path, help="draw FVU and CE recovered over L0 there (PNG)")
    parser.add_argument("--folder", type=Path, help="where stores and SAEs lie; by default in the cache, by settings")
    parser.add_argument("--sides", nargs="+", choices=(OURS, *LIBRARIES), default=[OURS, *LIBRARIES])
    parser.add_argument("--again", nargs="+", choices=(OURS, *LIBRARIES), default=[], help="train these anew")
    parser.add_argument("--k", nargs="+", type=int)
    parser.add_argument("--width", nargs="+", type=int, help="numbers of latents")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", nargs="+", type=float, help="learning rates to choose from")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
