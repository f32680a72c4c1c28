"""What every benchmark shares: worker processes asked in turns, medians, the table, the JSON, the machine.

Each side runs in a process of its own (torch and llama.cpp each keep threads of their own), loads once and then
answers one request at a time, so that the sides alternate and a busy minute of the machine hits all of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
TRAIN_PEER_PYTHON = ROOT / ".venv-bench-train" / "bin" / "python"
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class BenchError(RuntimeError):
    """A side that could not do what it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison; `ratio` > 1 where we are better. `target` is what the ratio is to reach, 0: none."""

    case: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    target: float = 0.0
    note: str = ""


class Worker:
    """One side in its own process: a JSON request a line in, a JSON answer a line out."""

    def __init__(self, command: Sequence[str], *, threads: int, settings: Mapping[str, str] | None = None) -> None:
        environment = dict(os.environ) | dict.fromkeys(THREAD_SETTINGS, str(threads)) | {"PYTHONPATH": str(ROOT)}
        environment |= settings or {}
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to one request. BenchError with the other side's words when it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{op}: the process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{op}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def our_worker(threads: int) -> Worker:
    return Worker([sys.executable, "-m", "bench.ours"], threads=threads)


def peer_worker(threads: int) -> Worker:
    return Worker([str(PEER_PYTHON), "-P", str(ROOT / "bench" / "peers.py")], threads=threads)


def in_turns(
    sides: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, list[float]]], None] = lambda speeds: None,
) -> dict[str, list[float]]:
    """Speed of each side in each round. Every other round goes backwards, so that no side always follows another.

    `keep` gets the speeds so far after every round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            say(f"round {number + 1} of {rounds}: {name}")
            speeds[name].append(sides[name]())
            time.sleep(0.1)  # idle OpenMP threads spin for a while
        keep(speeds)
    return speeds


def compare(
    case: str,
    peer: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    target: float = 0.0,
    note: str = "",
) -> Row:
    """A row of speeds taken in turns: medians of both, and the median of the rounds' own ratios."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Row(
        case=case,
        peer=peer,
        unit=unit,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=ratio,
        target=target,
        note=note,
    )


def machine() -> dict[str, Any]:
    """The processor, its flags that decide here, cores, memory and versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "features": [name for name in wanted if name in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def report(rows: Sequence[Row], facts: Mapping[str, Any], *, title: str, json_path: Path | None = None) -> None:
    """Print the table; `write_json` where asked."""
    table = Table(title=title)
    for name in ("case", "peer", "unit", "ours", "theirs", "ratio", "target", ""):
        table.add_column(name, justify="right" if name in ("ours", "theirs", "ratio", "target") else "left")
    for row in rows:
        target = f">= {row.target:g}" if row.target else ""
        missed = " !" if row.target and row.ratio < row.target else ""
        numbers = _short(row.ours), _short(row.theirs), f"{row.ratio:.3f}{missed}"
        table.add_row(row.case, row.peer, row.unit, *numbers, target, row.note)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("ratio > 1: ours is better; ! misses its target. " + json.dumps(dict(facts)))
    if json_path is not None:
        write_json(json_path, rows, facts)


def _short(value: float) -> str:
    """Speeds to a tenth, shares and errors to four digits."""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"


def write_json(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """`{"rows": [...], "machine": {...}}`, whole or not at all: an interrupted run keeps what it had."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"rows": [asdict(row) for row in rows], "machine": dict(facts)}, indent=1) + "\n")
    partial.replace(path)


def cache_folder() -> Path:
    """Where models and stores of the benchmarks lie; safe to delete."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "ggscope" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- the other end: what a worker process runs ---


def peak_bytes() -> int:
    """The largest resident size since the last `forget_peak` (Linux)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"/proc/self/status has no {key}: memory is measured on Linux only")


def serve(operations: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests until the input ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request)
        except Exception as error:  # noqa: BLE001 - told to the other end
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def forget_peak() -> None:
    """Start measuring the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def random_windows(windows: int, context: int, vocab: int, seed: int) -> np.ndarray:
    """(windows, context) token ids, 1 (BOS) first, the rest drawn; the same on both sides."""
    tokens_BT = np.random.default_rng(seed).integers(3, vocab, (windows, context), dtype=np.int64)
    tokens_BT[:, 0] = 1
    return tokens_BT
