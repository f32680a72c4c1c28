"""The cases of `bench.capture`, one function each: what runs against what, on which files."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import models
from bench.common import ROOT, BenchError, Row, Worker, compare, in_turns, our_worker, peer_worker

KINDS = tuple(models.FILE_TYPES)
LIBRARIES = ("hf", "transformerlens", "nnsight")
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
SMALL_VOCABULARY = 64
# Windows at a time where memory is measured: what each side is fastest with (ours is as fast with one as with four).
OUR_MEMORY_BATCH, MEMORY_BATCH, MEMORY_WINDOWS = 1, 4, 8
# ||ours - hf f32|| / ||hf f32|| of one activation; F16 KV and the kernels' own rounding are in it;
# another model would be off by 1.4. Gaussian weights lose more in Q4_0 than trained ones
TOLERANCES = {"F32": 3e-3, "F16": 5e-3, "BF16": 2e-2, "Q8_0": 5e-2, "Q4_0": 0.5, "f32": 1e-4, "bf16": 3e-2}
QUICK_SIDES = ("capture mid", "bare mid", "capture mid, busy", "bare mid, busy", "capture last", "bare whole")
BARE_TARGET, BUSY_TARGET, MEMORY_TARGET = 0.97, 0.95, 2.0
SPEED_TARGETS = {"hf-f32": 2.5, "hf-bf16": 1.0, "transformerlens-f32": 1.0, "transformerlens-bf16": 1.0}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes; the defaults are the full run."""

    threads: int = 2
    context: int = 512
    rounds: int = 7
    bare_tokens: int = 16384  # of one side in one round, against llama.cpp alone
    run_tokens: int = 16384  # ... and against other tools
    kinds: tuple[str, ...] = KINDS
    bare_kinds: tuple[str, ...] = KINDS
    shapes: tuple[tuple[int, int], ...] = ((512, 512), (2048, 512), (2048, 1024), (2048, 2048), (4096, 512))
    peer_batches: tuple[int, ...] = (1, 4, 8, 16)
    tries: int = 2  # of each setting while looking for the best
    libraries: tuple[str, ...] = LIBRARIES
    without_stop: tuple[str, ...] = LIBRARIES  # those that are run to the last block as well
    growth_tokens: int = 65536
    store_rows: int = 1_048_576
    seed: int = 1
    short: bool = False

    @classmethod
    def quick(cls) -> Self:
        return cls(
            rounds=3,
            bare_tokens=8192,
            run_tokens=2048,
            kinds=("BF16", "Q8_0", "Q4_0"),
            bare_kinds=("BF16",),
            shapes=((2048, 512),),
            peer_batches=(4,),
            libraries=("hf", "transformerlens"),
            tries=1,
            without_stop=("hf",),
            growth_tokens=8192,
            store_rows=262_144,
            short=True,
        )

    def changed(self, *, threads: int | None = None, rounds: int | None = None, kinds: Any = None) -> Settings:
        """With what was given on the command line."""
        chosen = {"kinds": tuple(kinds), "bare_kinds": tuple(kinds), "short": False} if kinds else {}
        return replace(self, threads=threads or self.threads, rounds=rounds or self.rounds, **chosen)

    def for_demo(self) -> Settings:
        """The quick run takes the small model with one peer, one type and shorter runs."""
        if not self.short:
            return self
        return replace(self, kinds=("F16",), bare_kinds=("F16",), libraries=("hf",))

    def windows(self, tokens: int) -> int:
        return max(1, tokens // self.context)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchModel:
    """One model in every GGUF type, and as an HF folder."""

    name: str
    folder: Path
    hf: Path
    blocks: int

    @property
    def mid(self) -> int:
        return self.blocks // 2

    def hf_folder(self, dtype: str) -> Path:
        """The HF model with its weights in f32 or bf16."""
        return self.hf if dtype == "f32" else self.hf.with_name(f"hf-{dtype}")

    def file(self, kind: str) -> Path:
        return self.folder / f"{kind}.gguf"

    def truncated(self, kind: str, blocks: int, *, vocab: int = 0) -> Path:
        """Made when first asked for."""
        path = self.folder / f"{kind}-b{blocks}{f'-v{vocab}' if vocab else ''}.gguf"
        return path if path.exists() else models.write_truncated(self.file(kind), path, blocks, vocab=vocab)


def prepare(name: str, folder: Path, settings: Settings, say: Say, shape: models.Shape | None = None) -> BenchModel:
    """The files of a model, made where they are missing."""
    source = ROOT / "pipeline" / "data" / "pylm.gguf"
    demo = name == "demo"
    shape = models.read_shape(source) if demo else shape or models.Shape()
    place = folder / (f"demo-{source.stat().st_size}" if demo else shape.name)
    model = BenchModel(name=name, folder=place, hf=place / "hf", blocks=shape.blocks)
    for kind in dict.fromkeys((*settings.kinds, *settings.bare_kinds)):
        if not model.file(kind).exists():
            say(f"writing {model.file(kind)}")
            if demo:
                models.write_requantised(source, model.file(kind), kind)
            else:
                models.write_gguf(model.file(kind), shape, kind)
    if not (model.hf / "config.json").exists():
        say(f"writing {model.hf}")
        models.write_hf_twin(source, model.hf) if demo else models.write_hf(model.hf, shape)
    return model


def point_of(block: int) -> str:
    return f"blocks.{block}.hook_resid_post"


def _speed(worker: Worker, op: str, **request: Any) -> float:
    return worker.ask(op, **request)["tokens_per_s"]


# --- against llama.cpp alone ---


def against_bare(model: BenchModel, settings: Settings, say: Say) -> list[Row]:
    """Capture into a store against `llama_decode` alone.

    `bare`: the file truncated after the hooked block, every token computed to its end (a small vocabulary makes the
    logits free): the work capture cannot avoid. `bare-no-output`: no logits asked for, where llama.cpp leaves out
    the last block's MLP, which a hook after that block needs.
    """
    rows = []
    for kind in settings.bare_kinds:
        with our_worker(settings.threads) as ours, our_worker(settings.threads) as theirs:
            sides = _bare_sides(model, kind, settings, ours, theirs)
            if settings.short:
                sides = {name: sides[name] for name in QUICK_SIDES}
            speeds = in_turns(sides, settings.rounds, say=lambda text, kind=kind: say(f"{model.name} {kind}: {text}"))
        case = f"{model.name}_{kind.lower()}"
        last = model.blocks - 1
        pairs = [
            (f"b{model.mid}", "capture mid", "bare mid", "bare", BARE_TARGET),
            (f"b{model.mid}", "capture mid", "bare mid, no output", "bare-no-output", 0.0),
            (f"b{model.mid}_busy", "capture mid, busy", "bare mid, busy", "bare", BUSY_TARGET),
            (f"b{last - 1}", "capture deep", "bare whole, no output", "bare-no-output", BARE_TARGET),
            (f"b{last}", "capture last", "bare whole", "bare", BARE_TARGET),
            (f"b{last}", "capture last", "bare whole, no output", "bare-no-output", 0.0),
            (f"b{last - 1}_layer_inp", "capture deep, layer_inp", "capture deep", "ours-callback", 0.0),
        ]
        for suffix, mine, other, peer, target in pairs:
            if mine in speeds and other in speeds:
                rows.append(compare(f"{case}_{suffix}", peer, "tokens/s", speeds[mine], speeds[other], target=target))
    return rows


def _bare_sides(
    model: BenchModel, kind: str, settings: Settings, ours: Worker, theirs: Worker
) -> dict[str, Callable[[], float]]:
    batch, ubatch = 2048, 512  # what extract does when nothing is set
    common = {
        "windows": settings.windows(settings.bare_tokens),
        "context": settings.context,
        "threads": settings.threads,
    }
    common |= {"shape": {"batch_tokens": max(batch, settings.context), "ubatch_tokens": ubatch}, "seed": settings.seed}
    depth, last = model.mid + 1, model.blocks - 1

    def capture(block: int, **more: Any) -> Callable[[], float]:
        path = str(model.file(kind))
        return lambda: _speed(ours, "run", path=path, points=[point_of(block)], **common, **more)

    def bare(path: Path, **more: Any) -> Callable[[], float]:
        return lambda: _speed(theirs, "bare", path=str(path), **common, **more)

    same = model.truncated(kind, depth, vocab=SMALL_VOCABULARY)
    whole = model.truncated(kind, model.blocks, vocab=SMALL_VOCABULARY)
    return {
        "capture mid": capture(model.mid),
        "bare mid": bare(same, outputs=True),
        "bare mid, no output": bare(model.truncated(kind, depth)),
        "capture mid, busy": capture(model.mid, busy=True),
        "bare mid, busy": bare(same, outputs=True, busy=True),
        "capture deep": capture(last - 1, settings={"backend": "callback"}),
        "capture deep, layer_inp": capture(last - 1, settings={"backend": "layer_inp"}),
        "bare whole, no output": bare(model.file(kind)),
        "capture last": capture(last),
        "bare whole": bare(whole, outputs=True),
    }


# --- against other tools ---


@dataclass(slots=True)
class Found:
    """What one run against the peers gives beside the rows."""

    rows: list[Row]
    differences: dict[str, float]  # of one activation to hf-f32's
    shapes: dict[str, Any]  # the best of each side


def against_peers(model: BenchModel, settings: Settings, say: Say) -> Found:
    """Every GGUF type at its best shape against every peer at its best batch: peak memory first, then speed.

    One hook at mid depth. We write a store, the peers keep their tensors. The targets are for our fastest type, and
    for the type of the peer's own precision.
    """
    _write_bf16(model, settings, say)
    with contextlib.ExitStack() as stack:
        ours = {kind: stack.enter_context(our_worker(settings.threads)) for kind in settings.kinds}
        theirs = {name: stack.enter_context(peer_worker(settings.threads)) for name in _peer_names(settings)}
        peaks = {kind: _our_peak(worker, model, kind, settings, say) for kind, worker in ours.items()}
        peaks |= {name: _their_peak(worker, model, name, settings, say) for name, worker in theirs.items()}
        differences = _check_equal(model, settings, ours, theirs)
        sides, shapes = {}, {}
        for name, tried in _speed_settings(model, settings, ours, theirs).items():
            shapes[name] = _best(tried, settings.tries, f"{model.name} {name}", say)
            sides[name] = tried[shapes[name]]
        speeds = in_turns(sides, settings.rounds, say=lambda text: say(f"{model.name}: {text}"))
    rows = _speed_rows(model, settings, speeds) + _memory_rows(model, settings, peaks)
    return Found(rows, differences, shapes)


def _write_bf16(model: BenchModel, settings: Settings, say: Say) -> None:
    folder = model.hf_folder("bf16")
    if not (folder / "config.json").exists():
        say(f"writing {folder}")
        partial = folder.with_name(folder.name + ".partial")
        with peer_worker(settings.threads) as worker:
            worker.ask("save_as", folder=str(model.hf), out=str(partial), dtype="bfloat16")
        partial.rename(folder)


def _peer_names(settings: Settings) -> list[str]:
    return [f"{library}-{dtype}" for library, dtype in itertools.product(settings.libraries, DTYPES)]


def _our_peak(worker: Worker, model: BenchModel, kind: str, settings: Settings, say: Say) -> int:
    """Peak resident bytes above the imports of a fresh process: load, by default settings, and capture 8 windows."""
    say(f"{model.name}: memory of {kind}")
    shape = {"batch_tokens": OUR_MEMORY_BATCH * settings.context, "ubatch_tokens": 512}
    request = {"context": settings.context, "threads": settings.threads, "seed": settings.seed, "shape": shape}
    request |= {"path": str(model.file(kind)), "points": [point_of(model.mid)], "windows": MEMORY_WINDOWS}

    worker.ask("start_memory")
    worker.ask("run", **request)
    return worker.ask("memory")["bytes"]


def _their_peak(worker: Worker, model: BenchModel, name: str, settings: Settings, say: Say) -> int:
    say(f"{model.name}: memory of {name}")
    library, dtype = name.split("-")
    worker.ask(
        "load", library=library, folder=str(model.hf_folder(dtype)), dtype=DTYPES[dtype], threads=settings.threads
    )
    request = {"context": settings.context, "block": model.mid, "stop": True, "seed": settings.seed}
    worker.ask("run", windows=MEMORY_WINDOWS, batch=MEMORY_BATCH, **request)
    return worker.ask("memory")["bytes"]


def _check_equal(
    model: BenchModel, settings: Settings, ours: Mapping[str, Worker], theirs: Mapping[str, Worker]
) -> dict[str, float]:
    """Relative difference of one activation of every side to HF's in float32. BenchError beyond its tolerance."""
    request = {"windows": 2, "context": min(64, settings.context), "seed": settings.seed}
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "values.npy")
        for name, worker in theirs.items():
            worker.ask("activation", path=out, block=model.mid, stop=True, **request)
            found[name] = np.load(out)
        for kind, worker in ours.items():
            where = {"path": str(model.file(kind)), "out": out, "point": point_of(model.mid)}
            worker.ask("activation", threads=settings.threads, **where, **request)
            found[kind] = np.load(out)
    oracle = found.pop("hf-f32").astype(np.float64)
    differences = {k: float(np.linalg.norm(x - oracle) / np.linalg.norm(oracle)) for k, x in found.items()}
    for name, off in differences.items():
        if not off <= TOLERANCES[name.rpartition("-")[2]]:
            raise BenchError(f"{model.name}: {name} differs from hf-f32 by {off:.2g}: the sides run different models")
    return {name: float(f"{off:.2g}") for name, off in differences.items()}


def _speed_settings(
    model: BenchModel, settings: Settings, ours: Mapping[str, Worker], theirs: Mapping[str, Worker]
) -> dict[str, dict[Any, Callable[[], float]]]:
    """Side -> setting -> what runs it."""
    found: dict[str, dict[Any, Callable[[], float]]] = {}
    for kind, worker in ours.items():
        found[kind] = {shape: _our_side(model, kind, worker, settings, shape) for shape in settings.shapes}
    for name, worker in theirs.items():
        for stop in (False, True) if name.split("-")[0] in settings.without_stop else (True,):
            batches = {batch: _peer_side(model, worker, settings, batch, stop) for batch in settings.peer_batches}
            found[name + ("-stop" if stop else "")] = batches
    return found


def _best(tried: Mapping[Any, Callable[[], float]], tries: int, name: str, say: Say) -> Any:
    """The fastest setting, by its best try."""
    if len(tried) == 1:
        return next(iter(tried))
    say(f"{name}: looking for the best of {', '.join(map(str, tried))}")
    return max(tried, key=lambda setting: max(tried[setting]() for _ in range(tries)))


def _our_side(
    model: BenchModel, kind: str, worker: Worker, settings: Settings, shape: tuple[int, int]
) -> Callable[[], float]:
    request = {"windows": settings.windows(settings.run_tokens), "context": settings.context, "seed": settings.seed}
    request |= {"path": str(model.file(kind)), "points": [point_of(model.mid)], "threads": settings.threads}
    sizes = {"batch_tokens": shape[0], "ubatch_tokens": shape[1]}
    return lambda: _speed(worker, "run", shape=sizes, **request)


def _peer_side(model: BenchModel, worker: Worker, settings: Settings, batch: int, stop: bool) -> Callable[[], float]:
    request = {"windows": settings.windows(settings.run_tokens), "context": settings.context, "seed": settings.seed}
    return lambda: _speed(worker, "run", batch=batch, block=model.mid, stop=stop, **request)


def _speed_rows(model: BenchModel, settings: Settings, speeds: dict[str, list[float]]) -> list[Row]:
    best = max(settings.kinds, key=lambda kind: float(np.median(speeds[kind])))
    rows = []
    for peer, kind in itertools.product([name for name in speeds if name not in settings.kinds], settings.kinds):
        plain = peer.removesuffix("-stop")
        own_precision = peer.startswith("transformerlens") and plain.endswith(f"-{kind.lower()}")
        target = SPEED_TARGETS.get(plain, 0.0) if kind == best or own_precision else 0.0
        case = f"{model.name}_{kind.lower()}_b{model.mid}"
        note = "our fastest type" if kind == best else ""
        rows.append(compare(case, peer, "tokens/s", speeds[kind], speeds[peer], target=target, note=note))
    return rows


def _memory_rows(model: BenchModel, settings: Settings, peaks: Mapping[str, int]) -> list[Row]:
    return [
        Row(
            case=f"{model.name}_{kind.lower()}_memory",
            peer=peer,
            unit="MB peak",
            ours=peaks[kind] / 1e6,
            theirs=peaks[peer] / 1e6,
            ratio=peaks[peer] / peaks[kind],
            target=MEMORY_TARGET if kind in ("Q8_0", "Q4_0") else 0.0,
        )
        for peer, kind in itertools.product(_peer_names(settings), settings.kinds)
    ]
