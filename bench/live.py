"""`python -m bench.live [--quick] [--json FILE]`: what reading an SAE adds to a generated token.

A random Llama of the 1B shape in Q8_0 (of fewer blocks with `--quick`) and the demo model. Beside each added time
stands the byte floor: the encoder's bytes at the speed of a read-only sum over 1 GiB, taken in turns with the rest. Where
`make bench-env` was run: a token with a reading beside HF transformers with SAELens on the same weights. `--gpu`: an 8B
shape with all blocks on the GPU instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import live_beside, live_gpu
from bench import live_cases as cases
from bench.common import Row, cache_folder, machine, report, write_json
from bench.live_steps import Settings


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.gpu and not live_gpu.device_name():
        _say("bench.live: --gpu needs a llama.cpp built for a GPU, and one that it finds; see `ggscope doctor`")
        return 2
    settings = _settings(options)
    folder = Path(options.folder) if options.folder else cache_folder()
    facts: dict[str, Any] = machine() | {"threads": settings.threads, "tokens": settings.tokens}
    started = time.monotonic()
    rows: list[Row] = []
    if options.gpu:
        rows, more = live_gpu.measure(cases.prepare(live_gpu.NAME, folder, settings, _say), settings, _say)
        facts |= more | {"gpu": live_gpu.device_name(), "seconds": round(time.monotonic() - started)}
        report(rows, facts, title="live, GPU", json_path=options.json)
        return 0
    for name in options.models:
        own = settings.for_demo() if name == "demo" else settings
        found, more = cases.measure(name, cases.prepare(name, folder, own, _say), own, _say)
        rows += found
        if name == "llama1b" and options.peers == "auto" and live_beside.available():
            found, versions = live_beside.peer_rows(name, cases.prepare(name, folder, own, _say), folder, own, _say)
            rows += found
            more |= versions
        facts |= more | {"seconds": round(time.monotonic() - started)}
        if options.json:
            write_json(options.json, rows, facts)
    report(rows, facts, title="live", json_path=options.json)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    quick = live_gpu.QUICK if options.gpu else Settings.quick()
    whole = live_gpu.SETTINGS if options.gpu else Settings()
    found = quick if options.quick else whole
    return replace(
        found,
        threads=options.threads,
        tokens=options.tokens or found.tokens,
        peer_tokens=options.tokens or found.peer_tokens,
        latents=tuple(options.latents or found.latents),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.live", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 4 blocks, fewer tokens and sizes")
    parser.add_argument("--gpu", action="store_true", help="an 8B shape on the GPU instead (writes 8 GB once)")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--models", nargs="+", choices=("llama1b", "demo"), default=["llama1b", "demo"])
    parser.add_argument(
        "--peers", choices=("auto", "none"), default="auto", help="HF with SAELens, where `make bench-env` was run"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="generated tokens")
    parser.add_argument("--latents", type=int, nargs="+", help="sizes of the SAEs")
    parser.add_argument("--folder", help="where the model is kept (default: the user's cache)")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
