"""`python -m bench.capture [--quick] [--json FILE]`: capture against llama.cpp alone, HF hooks, TransformerLens, nnsight.

Same weights, same tokens, same threads, sides in turns. The peers live in an environment of their own (`make
bench-env`); without it the cases against them are left out and the table says so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import capture_cases as cases
from bench import capture_storage as storage
from bench.capture_cases import Settings
from bench.common import PEER_PYTHON, BenchError, Row, cache_folder, machine, report, write_json

GROUPS = ("bare", "peers", "growth", "reading")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    settings = Settings.quick() if options.quick else Settings()
    settings = settings.changed(threads=options.threads, rounds=options.rounds, kinds=options.types)
    folder = Path(options.folder) if options.folder else cache_folder()
    facts: dict[str, Any] = machine() | {
        "threads": settings.threads,
        "context_tokens": settings.context,
        "rounds": settings.rounds,
    }
    started = time.monotonic()
    rows: list[Row] = []
    for name in options.models:
        own = settings.for_demo() if name == "demo" else settings
        model = cases.prepare(name, folder, own, _say)
        for group in options.only:
            once = group in ("growth", "reading")
            if once and name != options.models[-1]:
                continue
            try:
                rows += _group(group, model, own, facts)
            except BenchError as error:  # the other groups' rows are worth their time
                facts.setdefault("failed", []).append(f"{name} {group}: {error}")
            facts["seconds"] = round(time.monotonic() - started)
            if options.json:
                write_json(options.json, rows, facts)
    report(rows, facts, title="capture", json_path=options.json)
    return 3 if "failed" in facts else 0


def _group(group: str, model: cases.BenchModel, settings: Settings, facts: dict[str, Any]) -> list[Row]:
    if group == "peers" and not PEER_PYTHON.exists():
        facts["left out"] = "other tools: run `make bench-env` first"
        return []
    if group == "bare":
        return cases.against_bare(model, settings, _say)
    if group == "peers":
        found = cases.against_peers(model, settings, _say)
        facts[f"{model.name} difference to hf-f32"] = found.differences
        facts[f"{model.name} best shapes"] = found.shapes
        return found.rows
    if group == "growth":
        return storage.memory_growth(model, settings, _say)
    folder = Path(tempfile.mkdtemp(dir=cache_folder(), prefix="reading-"))
    try:
        return storage.reading(folder / "store", settings, _say)
    finally:
        shutil.rmtree(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.capture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and types, some minutes")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--models", nargs="+", choices=("llama100m", "demo"), default=["llama100m", "demo"])
    parser.add_argument("--types", nargs="+", choices=cases.KINDS, help="GGUF types")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", help="where the models are kept (default: the user's cache)")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
