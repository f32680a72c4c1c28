"""The cases of `bench.train`: what runs against what, at which sizes, and the targets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from bench.common import ROOT, TRAIN_PEER_PYTHON, BenchError, Row, Worker, compare, in_turns
from pipeline.waits import SHORT, SPINS

Say = Callable[[str], None]
Keep = Callable[[str, dict[str, list[float]]], None]  # name of a case, tokens/s of every side in the rounds so far
KERNELS = ("torch", "native")
SHORT_TURNS = 4  # of AuxK's sides in a round
AUXK_TARGETS = {0.05: 0.8, 0.0: 0.98}  # at 5 % dead at most 20 % of the step, at none dead 2 %
BATCHTOPK_TARGET = 1 / 1.15
MEMORY_TARGET = 1.0
AGREEMENT_ROWS, AGREEMENT_TARGET = 512, 0.995


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one case."""

    d_in: int
    num_latents: int
    k: int
    batch: int

    @property
    def name(self) -> str:
        return f"d{self.d_in}_n{self.num_latents}_k{self.k}_b{self.batch}"

    def request(self) -> dict[str, int]:
        return {"d_in": self.d_in, "num_latents": self.num_latents, "k": self.k, "batch": self.batch}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One trainer of a library, as `bench.train_peers` builds it; `name` is completed by the library's version."""

    library: str
    name: str
    options: dict[str, Any]

    def label(self, version: str) -> str:
        short = version if self.library == "sparsify" else ".".join(version.split(".")[:2])
        return f"{self.library}-{short}-{self.name}"


MAIN, SMALL, LARGE = (
    Shape(d_in=512, num_latents=8192, k=32, batch=2048),
    Shape(d_in=256, num_latents=2048, k=32, batch=2048),
    Shape(d_in=2048, num_latents=32768, k=64, batch=2048),
)
ADAM = Peer(library="sparsify", name="adam-f32", options={"optimizer": "adam"})
PEERS = (
    ADAM,
    Peer(library="sparsify", name="signum-f32", options={"optimizer": "signum"}),
    Peer(library="saelens", name="topk-f32", options={"kind": "topk"}),
    Peer(library="saelens", name="topk-autocast-bf16", options={"kind": "topk", "autocast": True}),
    Peer(library="saelens", name="batchtopk-f32", options={"kind": "batchtopk"}),
    Peer(library="dictionary_learning", name="topk-f32", options={"kind": "topk"}),
    Peer(library="dictionary_learning", name="batchtopk-f32", options={"kind": "batchtopk"}),
)
# (shape, kernel, library) -> least ratio; of the peers in float32 with TopK and Adam
TARGETS = {
    (MAIN, "torch", "sparsify"): 3.5,
    (MAIN, "native", "sparsify"): 6.0,
    (MAIN, "native", "saelens"): 20.0,
    (MAIN, "native", "dictionary_learning"): 20.0,
    (SMALL, "native", "sparsify"): 7.0,
    (LARGE, "native", "sparsify"): 10.0,
}
FLOOR_TARGETS = {(MAIN, "native"): 0.8, (SMALL, "native"): 0.65}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The defaults are the full run."""

    threads: int = 2
    rounds: int = 7
    seconds: float = 2.0  # of one side in one round, about; at least one step
    shapes: tuple[Shape, ...] = (MAIN, SMALL, LARGE)
    seed: int = 0
    short: bool = False
    device: str = "cpu"  # or cuda: bench.train_gpu
    keep: Keep = lambda case, speeds: None  # after every round, so that a timeout loses nothing

    @classmethod
    def quick(cls) -> Self:
        return cls(rounds=5, seconds=0.5, short=True)

    def changed(self, *, threads: int | None, rounds: int | None, shapes: tuple[Shape, ...], keep: Keep) -> Settings:
        """With what was given on the command line."""
        return replace(self, threads=threads or self.threads, rounds=rounds or self.rounds, shapes=shapes, keep=keep)

    def peers(self, shape: Shape) -> tuple[Peer, ...]:
        """The large case holds gigabytes a side: its peer is sparsify's Adam alone."""
        if shape.num_latents > MAIN.num_latents:
            return (ADAM,)
        return (ADAM, *(p for p in PEERS if p.name == "topk-f32")) if self.short else PEERS


def ours_worker(threads: int) -> Worker:
    """Its threads wait as those of `ggscope train`."""
    return Worker([sys.executable, "-m", "bench.train_ours"], threads=threads, settings={SPINS: SHORT})


def library_worker(library: str, threads: int) -> Worker:
    return Worker([str(TRAIN_PEER_PYTHON), "-P", str(ROOT / "bench" / "train_peers.py"), library], threads=threads)


def our_kernels(worker: Worker, say: Say) -> list[str]:
    """The kernels that can be had on this machine."""
    answers = {name: worker.ask("accepts", settings={"kernel": name}) for name in KERNELS}
    for name, answer in answers.items():
        if not answer["accepted"]:
            say(f"left out: kernel {name}: {answer['why']}")
    return [name for name, answer in answers.items() if answer["accepted"]]


class Turns:
    """Sides of one case in processes of their own, and their speeds in the same rounds."""

    def __init__(self, shape: Shape, settings: Settings, say: Say, lr: float | None = 1e-3, steps: int = 10**6) -> None:
        self.shape, self.settings, self.say, self.lr, self.steps = shape, settings, say, lr, steps
        self._stack = ExitStack()
        self.workers: dict[str, Worker] = {}
        self._steps: dict[str, int] = {}
        self._checksum: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def start(self, worker: Worker) -> Worker:
        """A side that is added later: its imports take seconds, in which others load."""
        return self._stack.enter_context(worker)

    def add(self, name: str, worker: Worker, side: str, options: dict[str, Any]) -> None:
        """Load a side. BenchError when its rows are not those of the others."""
        self.say(f"{self.shape.name}: {name}")
        self.workers[name] = self.start(worker)
        settings = self.settings
        request = {
            "shape": self.shape.request(),
            "threads": settings.threads,
            "steps": self.steps,
            "seed": settings.seed,
            "device": settings.device,
        }
        answer = worker.ask("load", side=side, lr=self.lr, options=options, **request)
        self._checksum = self._checksum or answer["checksum"]
        if answer["checksum"] != self._checksum:
            raise BenchError(f"{name}: its toy rows differ from those of the other sides")

    def speeds(self, what: str = "") -> dict[str, list[float]]:
        """tokens/s of every side in every round. A first pass warms up and finds how many steps take the time given."""
        settings = self.settings
        sides: dict[str, Callable[[], float]] = {}
        for name, worker in self.workers.items():
            op = "floor" if name == "floor" else "run"
            per_step = self.shape.batch / worker.ask(op, steps=1)["tokens_per_s"]
            if per_step < settings.seconds:  # else one step is a round, however long the first took
                per_step = self.shape.batch / worker.ask(op, steps=1)["tokens_per_s"]
            steps = max(1, round(settings.seconds / per_step))
            sides[name] = lambda worker=worker, op=op, steps=steps: worker.ask(op, steps=steps)["tokens_per_s"]
        name = self.shape.name + what
        return in_turns(
            sides,
            settings.rounds,
            say=lambda text: self.say(f"{name}: {text}"),
            keep=lambda speeds: settings.keep(name, speeds),
        )


def against_peers(shape: Shape, settings: Settings, say: Say, *, with_peers: bool) -> Iterator[Row]:
    """Speed against every peer and the floor, and peak memory: all sides in the same rounds."""
    with Turns(shape, settings, say) as turns:
        peers = settings.peers(shape) if with_peers else ()
        started = start_peers(turns, peers, settings)
        kernels = _add_ours(turns, settings, say)
        turns.add("floor", ours_worker(settings.threads), "floor", {})
        labels = dict(add_peers(turns, started))
        speeds = turns.speeds()
        for kernel in kernels:
            case = f"{shape.name}_{kernel}"
            for label, peer in labels.items():
                comparable = peer.name in ("adam-f32", "topk-f32")
                target = TARGETS.get((shape, kernel, peer.library), 0.0) if comparable else 0.0
                yield compare(case, label, "tokens/s", speeds[kernel], speeds[label], target=target)
            target = FLOOR_TARGETS.get((shape, kernel), 0.0)
            yield compare(case, "floor", "tokens/s", speeds[kernel], speeds["floor"], target=target)
        peaks = {name: turns.workers[name].ask("memory")["bytes"] / 1e6 for name in (*kernels, *labels)}
        for kernel in kernels:
            share = turns.workers[kernel].ask("agreement", rows=AGREEMENT_ROWS)["share"]
            yield Row(
                case=f"{shape.name}_{kernel}_selection", peer="float64", unit="share", ours=share,
                theirs=1.0, ratio=share, target=AGREEMENT_TARGET, note="latents taken that exact values take too",
            )  # fmt: skip
    for kernel in kernels:
        for label in labels:
            ratio = peaks[label] / peaks[kernel]
            yield Row(
                case=f"{shape.name}_{kernel}_memory",
                peer=label,
                unit="MB peak",
                ours=peaks[kernel],
                theirs=peaks[label],
                ratio=ratio,
                target=MEMORY_TARGET,
            )


def _add_ours(turns: Turns, settings: Settings, say: Say) -> list[str]:
    with ours_worker(settings.threads) as worker:
        kernels = our_kernels(worker, say)
    for kernel in kernels:
        turns.add(kernel, ours_worker(settings.threads), "ours", {"kernel": kernel})
    return kernels


def start_peers(turns: Turns, peers: tuple[Peer, ...], settings: Settings) -> list[tuple[Peer, Worker]]:
    return [(peer, turns.start(library_worker(peer.library, settings.threads))) for peer in peers]


def add_peers(turns: Turns, started: list[tuple[Peer, Worker]]) -> Iterator[tuple[str, Peer]]:
    for peer, worker in started:
        label = peer.label(worker.ask("version", library=peer.library)["version"])
        turns.add(label, worker, peer.library, peer.options)
        yield label, peer


def own_parts(shape: Shape, settings: Settings, say: Say) -> Iterator[Row]:
    """What AuxK, BatchTopK and the loop around the step cost: ours against ours without."""
    with ours_worker(settings.threads) as worker:
        kernels = our_kernels(worker, say)
        other = {"variant": "batchtopk"}
        has = {name: worker.ask("accepts", settings=other | {"kernel": name})["accepted"] for name in kernels}
    for kernel in kernels:
        yield from _beside_the_step(shape, kernel, other if has[kernel] else {}, settings, say)
        yield _whole_trainer(shape, kernel, settings, say)


def _part(case: str, speeds: list[float], without: list[float], target: float) -> Row:
    row = compare(case, "ours-without", "tokens/s", speeds, without)
    return replace(row, target=target, note=f"{1 / row.ratio - 1:+.1%} time")


def _beside_the_step(
    shape: Shape, kernel: str, batchtopk: dict[str, Any], settings: Settings, say: Say
) -> Iterator[Row]:
    """AuxK, and with its settings BatchTopK, against the step without, in one process and short turns: how fast memory is
    at the moment is worth as much as either, and for AuxK, whose arrays are the step's own, where they happen to lie."""
    base = {"kernel": kernel}
    with Turns(shape, settings, say) as turns:
        turns.add("step", ours_worker(settings.threads), "ours", base)
        worker = turns.workers["step"]
        per_step = shape.batch / worker.ask("run", steps=2)["tokens_per_s"]
        steps = max(2, round(settings.seconds / SHORT_TURNS / per_step))

        def run(share: float | None, number: int = 0) -> float:
            worker.ask("choose", number=number)
            worker.ask("count_dead", share=share)
            return worker.ask("run", steps=steps)["tokens_per_s"]

        names = {share: f"{shape.name}_{kernel}_auxk_dead{100 * share:g}" for share in AUXK_TARGETS}
        sides = {"step": lambda: run(None)} | {name: lambda share=share: run(share) for share, name in names.items()}
        if batchtopk:
            second = worker.ask("beside", side="ours", options=base | batchtopk)["number"]
            sides["batchtopk"] = lambda: run(None, second)
        speeds = in_turns(
            sides,
            SHORT_TURNS * settings.rounds,
            say=lambda text: say(f"{shape.name}: {text}"),
            keep=lambda found: settings.keep(f"{shape.name}_{kernel}_parts", found),
        )
    for share, target in AUXK_TARGETS.items():
        yield _part(names[share], speeds[names[share]], speeds["step"], target)
    if batchtopk:
        yield _part(f"{shape.name}_{kernel}_batchtopk", speeds["batchtopk"], speeds["step"], BATCHTOPK_TARGET)


def _whole_trainer(shape: Shape, kernel: str, settings: Settings, say: Say) -> Row:
    """`Trainer.fit` on rows in memory, reading thread and counters included, against its step alone."""
    base = {"kernel": kernel}
    with Turns(shape, settings, say) as turns:
        turns.add("step", ours_worker(settings.threads), "ours", base)
        worker = turns.workers["step"]
        per_step = shape.batch / worker.ask("run", steps=2)["tokens_per_s"]
        steps = max(4, round(settings.seconds / per_step))
        request = {"shape": shape.request(), "threads": settings.threads, "steps": steps, "options": base}
        sides: dict[str, Callable[[], float]] = {
            "trainer": lambda: worker.ask("fit", **request)["tokens_per_s"],
            "step": lambda: worker.ask("run", steps=steps)["tokens_per_s"],
        }
        speeds = in_turns(sides, settings.rounds, say=lambda text: say(f"{shape.name}: {text}"))
    return compare(f"{shape.name}_{kernel}_trainer", "step-alone", "tokens/s", speeds["trainer"], speeds["step"])
