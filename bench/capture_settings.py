"""`python -m bench.capture_settings [--types ...]`: which batch, micro-batch, threads, KV type and attention are fastest.

llama.cpp alone on the file truncated after the hooked block, each setting changed by itself from the base, in turns
with the base: the ratio is the setting's speed to the base's in the same round.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.capture_cases import KINDS, SMALL_VOCABULARY, BenchModel, Settings, prepare
from bench.common import Row, Worker, cache_folder, compare, in_turns, machine, our_worker, report

BASE: dict[str, Any] = {"batch_tokens": 2048, "ubatch_tokens": 512}
F32 = 0  # ggml's number of the type
SETTINGS: dict[str, dict[str, Any]] = {
    "batch_512": {"batch_tokens": 512},
    "batch_1024": {"batch_tokens": 1024},
    "batch_4096": {"batch_tokens": 4096},
    "batch_8192": {"batch_tokens": 8192},
    "ubatch_128": {"ubatch_tokens": 128},
    "ubatch_256": {"ubatch_tokens": 256},
    "ubatch_1024": {"ubatch_tokens": 1024},
    "ubatch_2048": {"ubatch_tokens": 2048},
    "batch_8192_ubatch_2048": {"batch_tokens": 8192, "ubatch_tokens": 2048},
    "threads_1": {"threads": 1},
    "threads_all": {"threads": os.cpu_count() or 1},
    "kv_f32": {"options": {"type_k": F32, "type_v": F32}},
    "flash_attn_off": {"options": {"flash_attn_type": 0}},
    "flash_attn_on": {"options": {"flash_attn_type": 1}},
    "kv_f32_flash_attn_off": {"options": {"type_k": F32, "type_v": F32, "flash_attn_type": 0}},
    "kv_unified": {"options": {"kv_unified": True}},
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    kinds = tuple(options.types)
    settings = Settings(kinds=kinds, bare_kinds=kinds, context=options.context, bare_tokens=options.tokens)
    model = prepare(options.model, cache_folder(), settings, _say)
    rows = [row for kind in kinds for row in compared(model, kind, settings, options.rounds, _say)]
    facts = machine() | {"base": BASE, "context_tokens": settings.context, "threads": settings.threads}
    report(rows, facts, title="settings of capture", json_path=options.json)
    return 0


def compared(
    model: BenchModel, kind: str, settings: Settings, rounds: int, say: Callable[[str], None], *, names: Any = SETTINGS
) -> list[Row]:
    """One row for each setting; `ours` is the setting, `theirs` the base."""
    path = model.truncated(kind, model.mid + 1, vocab=SMALL_VOCABULARY)
    with our_worker(settings.threads) as worker:
        base = _side(worker, path, settings, {})
        rows = []
        for name in names:
            sides = {"setting": _side(worker, path, settings, SETTINGS[name]), "base": base}
            speeds = in_turns(sides, rounds, say=lambda text, name=name: say(f"{kind} {name}: {text}"))
            case = f"{model.name}_{kind.lower()}_{name}"
            rows.append(compare(case, "base", "tokens/s", speeds["setting"], speeds["base"]))
    return rows


def _side(worker: Worker, path: Path, settings: Settings, changed: dict[str, Any]) -> Callable[[], float]:
    shape = BASE | {name: changed[name] for name in BASE if name in changed}
    shape["batch_tokens"] = max(shape["batch_tokens"], settings.context)
    request = {"windows": settings.windows(settings.bare_tokens), "context": settings.context, "shape": shape}
    request |= {"threads": changed.get("threads", settings.threads), "options": changed.get("options", {})}
    request |= {"outputs": True, "seed": settings.seed, "path": str(path)}
    return lambda: worker.ask("bare", **request)["tokens_per_s"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.capture_settings", description=__doc__)
    parser.add_argument("--types", nargs="+", choices=KINDS, default=list(KINDS), help="GGUF types")
    parser.add_argument("--model", choices=("llama100m", "demo"), default="llama100m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="of one run")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
