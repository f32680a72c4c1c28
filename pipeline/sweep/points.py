"""The points of a sweep: what Hydra's grammar says with commas, `range`, `choice` and `interval`, as overrides."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from sae.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run: its name in the sweep and its settings."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What a search may choose for one setting: one of `choices`, or a number from `low` to `high`."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False


def split(overrides: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The settings all points share, as given, and the swept ones, parsed."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]
    return fixed, [override for override in parsed if override.is_sweep_override()]


def refuse_own(swept: Sequence[Override], ours: Collection[str]) -> None:
    """ConfigError where a setting of the sweep itself, of a group in `ours`, has several values."""
    for override in swept:
        if override.get_key_element().split(".")[0] in ours:
            raise ConfigError(f"{override.input_line}: expected one value; it is the whole sweep's, not a point's")


def grid(swept: Sequence[Override]) -> list[Point]:
    """Every combination of the values, the last setting's changing fastest.

    Raises:
        ConfigError: an interval or a glob, of which there is no list of values.
    """
    axes = []
    for override in swept:
        if not (override.is_choice_sweep() or override.is_range_sweep()):
            raise ConfigError(
                f"{override.input_line}: an interval has no list of values; give values, or a search: sweep=optuna"
            )
        axes.append([(override.get_key_element(), value) for value in override.sweep_string_iterator()])
    return named([[f"{key}={value}" for key, value in combination] for combination in itertools.product(*axes)])


def spaces(swept: Sequence[Override]) -> list[Space]:
    """What a search chooses from. ConfigError for a form it cannot use."""
    return [space(override) for override in swept]


def space(override: Override) -> Space:
    value, key = override.value(), override.get_key_element()
    if isinstance(value, ChoiceSweep):
        return Space(key=key, choices=tuple(override.sweep_string_iterator()))
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        check_interval(override.input_line or key, value.start, value.end, log=log)
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Space(key=key, low=value.start, high=value.end, log=log, whole=whole)
    if isinstance(value, RangeSweep):
        return Space(key=key, choices=tuple(override.sweep_string_iterator()))
    raise ConfigError(f"{override.input_line}: a search takes values, range(...) or interval(low,high)")


def check_interval(text: str, low: float, high: float, *, log: bool) -> None:
    """ConfigError for an interval that holds no two finite numbers, or has no logarithmic scale."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{text}: expected interval(low,high) of two numbers, low below high, got {low} and {high}")
    if log and low <= 0:
        raise ConfigError(
            f"{text}: expected a low above 0 on a logarithmic scale, got {low}; raise it or leave out log"
        )


def named(points: list[list[str]]) -> list[Point]:
    """Points with names that are short, different from each other and fit for a folder: `k16-num_latents4096`."""
    names = [name_of(overrides) for overrides in points]
    twice = len(set(names)) < len(names)
    return [
        Point(name=f"{i}-{name}" if twice else name, overrides=tuple(overrides))
        for i, (name, overrides) in enumerate(zip(names, points, strict=True))
    ]


def name_of(overrides: Sequence[str]) -> str:
    parts = [override.partition("=") for override in overrides]
    text = "-".join(f"{key.split('.')[-1].lstrip('+~')}{shortened(value)}" for key, _, value in parts)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:80] or "point"


def shortened(value: str) -> str:
    """A number of many digits with four of them."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def described(points: Sequence[Point]) -> dict[str, Any]:
    """As JSON keeps it."""
    return {point.name: list(point.overrides) for point in points}


def described_spaces(swept: Sequence[Override]) -> dict[str, str]:
    """What a search chooses each setting from, as it was typed."""
    return {override.get_key_element(): (override.input_line or "").partition("=")[2] for override in swept}
