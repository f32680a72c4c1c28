"""Metric rows on their way: to the loggers of each SAE, and as a note beside the progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sae.options import WITHOUT_K

from ..loggers import MetricsLogger
from ..run import ProgressCall
from .lr_search import CLOSE

if TYPE_CHECKING:
    from sae.weights import SAEWeights


class Reporter:
    """Passes the rows of each SAE to its loggers and keeps the last one. Closes the loggers when it is left."""

    def __init__(self, loggers: dict[str, list[MetricsLogger]], progress: ProgressCall) -> None:
        self.loggers, self.progress = loggers, progress
        self.last: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        for loggers in self.loggers.values():
            for logger in loggers:
                logger.close()

    def log(self, name: str, row: dict[str, Any]) -> None:
        self.last[name] = row
        for logger in self.loggers[name]:
            logger.log(row)

    def step(self, tokens: int) -> None:
        self.progress(tokens, note=note(list(self.last.values())) if self.last else "")


def note(rows: list[dict[str, Any]]) -> str:
    """`150,000/s  FVU 0.1234  L0 32.0  dead 5`, with the least and the most where there are several SAEs."""

    def span(key: str, form: str) -> str:
        low, high = (format(choice(row[key] for row in rows), form) for choice in (min, max))
        return low if low == high else f"{low}-{high}"

    return f"{span('tokens_per_s', ',.0f')}/s  FVU {span('fvu', '.4f')}  L0 {span('l0', '.1f')}  dead {span('dead', '.0f')}"


def result(found: dict[str, SAEWeights], tokens_per_s: float) -> str:
    """The numbers of one SAE, or the size and FVU of each of several; the rate is that of the whole training."""
    first = next(iter(found.values()))
    last = first.training["metrics"]
    if len(found) == 1:
        k = "" if first.training["config"]["variant"] in WITHOUT_K else f"k={first.k}, "
        return (
            f"{first.num_latents} latents, {k}{last['tokens']:,} tokens; FVU {last['fvu']:.4f} on the last training rows, "
            f"L0 {last['l0']:.1f}, {last['revived_total']} latents revived, {tokens_per_s:,.0f} tokens/s"
        )
    fvus = ", ".join(f"{name} {weights.training['metrics']['fvu']:.4f}" for name, weights in found.items())
    return f"{len(found)} SAEs, {last['tokens']:,} tokens, {tokens_per_s:,.0f} tokens/s each; FVU {fvus}"


def searched_lines(searched: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What `lr_search` found, a line an SAE."""
    for name, found in searched.items():
        tried = ", ".join(f"{lr}: {'diverged' if fvu is None else f'{fvu:.4f}'}" for lr, fvu in found["fvu"].items())
        start, best = f"{name}: " if name else "", found["best"]
        lowest = min((fvu, float(lr)) for lr, fvu in found["fvu"].items() if fvu is not None)[1]
        why = (
            "the lowest FVU" if best == lowest else f"the smallest within {CLOSE:.0%} of the lowest FVU, {lowest:g}'s,"
        )
        yield f"{start}lr {best:g} taken: {why} after {found['tokens']:,} tokens ({tried})"
