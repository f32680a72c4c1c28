"""`bench.train --curves`: FVU of held-out rows after equal tokens, and the seconds each side takes to an FVU.

All sides of one learning rate go from mark to mark in turns. Rates are constant, the same on every side; 0 stands for
each library's own rate and schedule. Seconds are those of the steps alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.common import BenchError, Row
from bench.train_cases import PEERS, Peer, Say, Settings, Shape, Turns, add_peers, our_kernels, ours_worker, start_peers

LRS = (0.0, 1e-3, 2e-3, 4e-3)
LIBRARIES = ("sparsify", "saelens", "dictionary_learning")
PARTS = 8  # marks of a curve: the last halvings of its steps, and steps between them
HELD_OUT_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What is run: learning rates (0: each side's own), steps of a curve, libraries."""

    lrs: tuple[float, ...] = LRS
    steps: int = 200
    libraries: tuple[str, ...] = LIBRARIES

    def peers(self, lr: float) -> tuple[Peer, ...]:
        """One peer a library with TopK and Adam in float32; at its own rate sparsify's default, signum, too."""
        wanted = ("adam-f32", "topk-f32") if lr else ("adam-f32", "topk-f32", "signum-f32")
        return tuple(peer for peer in PEERS if peer.library in self.libraries and peer.name in wanted)


@dataclass(slots=True)
class Curve:
    """FVU and seconds at each mark."""

    fvu: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def seconds_to(self, fvu: float) -> float | None:
        """When it first was at `fvu` or below, linear between marks; None: never."""
        for at, value in enumerate(self.fvu):
            if value <= fvu:
                if at == 0 or self.fvu[at - 1] == value:
                    return self.seconds[at]
                share = (self.fvu[at - 1] - fvu) / (self.fvu[at - 1] - value)
                return self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1])
        return None


def marks(steps: int) -> list[int]:
    """Steps after which FVU is taken: PARTS equal parts."""
    return sorted({max(1, steps * part // PARTS) for part in range(1, PARTS + 1)})


def rows(shape: Shape, settings: Settings, wanted: Curves, say: Say, *, with_peers: bool) -> Iterator[Row]:
    """Rows at each mark for each learning rate, then the seconds to every peer's best FVU."""
    found: dict[str, dict[float, Curve]] = {}
    ours = ""
    for lr in wanted.lrs:
        with Turns(shape, settings, say, lr=lr or None, steps=wanted.steps) as turns:
            ours = _add_ours(turns, say)
            list(add_peers(turns, start_peers(turns, wanted.peers(lr) if with_peers else (), settings)))
            for name in turns.workers:
                found.setdefault(name, {})[lr] = Curve()
            for step in marks(wanted.steps):
                _advance(turns, {name: found[name][lr] for name in turns.workers}, step)
                yield from _at_mark(shape, {name: found[name][lr] for name in turns.workers}, ours, lr, step)
    yield from _seconds(shape, found, ours)


def _add_ours(turns: Turns, say: Say) -> str:
    threads = turns.settings.threads
    with ours_worker(threads) as worker:
        kernel = our_kernels(worker, say)[-1]
    turns.add(kernel, ours_worker(threads), "ours", {"kernel": kernel})
    return kernel


def _advance(turns: Turns, curves: dict[str, Curve], step: int) -> None:
    for name, worker in turns.workers.items():
        turns.say(f"{turns.shape.name}: step {step}: {name}")
        curve = curves[name]
        answer = worker.ask("advance", to_step=step)
        curve.seconds.append((curve.seconds[-1] if curve.seconds else 0.0) + answer["seconds"])
        curve.fvu.append(worker.ask("fvu", rows=HELD_OUT_ROWS)["fvu"])


def _at_mark(shape: Shape, curves: dict[str, Curve], ours: str, lr: float, step: int) -> Iterator[Row]:
    tokens = step * shape.batch
    case = (
        f"{shape.name}_{ours}_fvu_{tokens // 1000}k_lr{lr:g}"
        if lr
        else f"{shape.name}_{ours}_fvu_{tokens // 1000}k_own"
    )
    mine = curves[ours].fvu[-1]
    for name, curve in curves.items():
        if name != ours or len(curves) == 1:
            yield Row(case=case, peer=name, unit="FVU", ours=mine, theirs=curve.fvu[-1], ratio=curve.fvu[-1] / mine)


def _seconds(shape: Shape, found: dict[str, dict[float, Curve]], ours: str) -> Iterator[Row]:
    """Each at the learning rate of its lowest last FVU: seconds to what the peer reached."""
    if not found:
        raise BenchError("no learning rate was given")
    best = {name: min(curves.items(), key=lambda item: item[1].fvu[-1]) for name, curves in found.items()}
    my_lr, mine = best.pop(ours)
    for name, (lr, curve) in best.items():
        goal = curve.fvu[-1]
        seconds, theirs = mine.seconds_to(goal), curve.seconds[-1]
        note = f"to FVU {goal:.4f}; lr {my_lr:g}, theirs {lr:g}"
        if seconds is None:
            note += f"; not reached: ours ends at {mine.fvu[-1]:.4f}"
        spent = mine.seconds[-1] if seconds is None else seconds
        ratio = 0.0 if seconds is None else theirs / spent
        yield Row(
            case=f"{shape.name}_{ours}_seconds_to_fvu",
            peer=name,
            unit="s",
            ours=spent,
            theirs=theirs,
            ratio=ratio,
            note=note,
        )
