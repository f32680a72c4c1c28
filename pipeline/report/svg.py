"""Small charts as inline SVG. Colours are CSS classes, so that they follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import escape

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 12, 42

Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line; `style` is a CSS class (s1, s2, s3)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "s1"
    markers: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """Labels and ranges; None ranges fit the data."""

    x_label: str
    y_label: str
    x_format: Format = lambda v: f"{v:g}"
    y_format: Format = lambda v: f"{v:g}"
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    guides_x: tuple[tuple[float, str], ...] = ()


def short(value: float) -> str:
    """1500000 as 1.5M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `target` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, first + 3 * target) if i * step <= high + 1e-9 * step]
    return [t + 0.0 for t in ticks]


def line_chart(series: Sequence[Series], axes: Axes, *, title: str) -> str:
    """Lines over a common x axis; points that are not finite are left out."""
    lines = [[(x, y) for x, y in zip(s.x, s.y, strict=True) if _finite(x, y)] for s in series]
    points = [p for line in lines for p in line]
    if not points:
        return '<p class="none">no data</p>'
    x_low, x_high = _widen(*(axes.x_range or (min(p[0] for p in points), max(p[0] for p in points))))
    y_low, y_high = axes.y_range or _padded(min(p[1] for p in points), max(p[1] for p in points))

    def at(x: float, y: float) -> tuple[float, float]:
        inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        y = min(max(y, y_low), y_high)
        return LEFT + (x - x_low) / (x_high - x_low) * inner_w, TOP + (y_high - y) / (y_high - y_low) * inner_h

    body = _frame(axes, (x_low, x_high), (y_low, y_high), at)
    for s, line in zip(series, lines, strict=True):
        placed = [at(x, y) for x, y in line]
        body.append(f'<polyline class="{s.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if s.markers:
            body += [
                f'<circle class="{s.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(s.label)}: '
                f"{escape(axes.x_format(px))}, {escape(f'{py:.4g}')}</title></circle>"
                for (x, y), (px, py) in zip(placed, line, strict=True)
            ]
    legend = "" if len(series) < 2 else _legend(series)
    return f"<figure>{legend}{_svg(body, title, WIDTH, HEIGHT)}<figcaption>{escape(title)}</figcaption></figure>"


def bar_chart(edges: Sequence[float], counts: Sequence[float], axes: Axes, *, title: str) -> str:
    """A histogram: counts[i] between edges[i] and edges[i+1]."""
    if not counts or not any(counts):
        return '<p class="none">no data</p>'
    low, high, top = edges[0], edges[-1], max(counts)

    def at(x: float, y: float) -> tuple[float, float]:
        inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + (x - low) / (high - low) * inner_w, TOP + (1 - y / top) * inner_h

    body = _frame(axes, (low, high), (0.0, float(top)), at)
    for i, n in enumerate(counts):
        (x0, y), (x1, base) = at(edges[i], n), at(edges[i + 1], 0)
        body.append(
            f'<rect class="bar" x="{x0:.1f}" y="{y:.1f}" width="{max(x1 - x0 - 1, 0.5):.1f}" height="{base - y:.1f}">'
            f"<title>{escape(axes.x_format(edges[i]))} to {escape(axes.x_format(edges[i + 1]))}: {n:g}</title></rect>"
        )
    return f"<figure>{_svg(body, title, WIDTH, HEIGHT)}<figcaption>{escape(title)}</figcaption></figure>"


def spark_bars(counts: Sequence[int], *, title: str) -> str:
    """A histogram of 120 x 26 without axes, heights in logarithms."""
    if not counts or not any(counts):
        return ""
    width, height = 120, 26
    top = math.log1p(max(counts))
    step = width / len(counts)
    bars = [
        f'<rect class="bar" x="{i * step:.1f}" y="{height - h:.1f}" width="{step - 0.8:.1f}" height="{h:.1f}"/>'
        for i, n in enumerate(counts)
        if (h := height * math.log1p(n) / top) > 0
    ]
    return _svg(bars, title, width, height, "spark")


def _frame(
    axes: Axes,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    at: Callable[[float, float], tuple[float, float]],
) -> list[str]:
    out: list[str] = []
    bottom = HEIGHT - BOTTOM
    for tick in nice_ticks(*y_range):
        _, y = at(x_range[0], tick)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(axes.y_format(tick))}</text>')
    for tick in nice_ticks(*x_range):
        x, _ = at(tick, y_range[0])
        out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(axes.x_format(tick))}</text>')
    for value, label in axes.guides_x:
        if x_range[0] <= value <= x_range[1]:
            x, _ = at(value, y_range[0])
            out.append(f'<line class="guide" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            out.append(f'<text x="{x + 4:.1f}" y="{TOP + 10}">{escape(label)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="l" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axes.x_label)}</text>')
    y_middle = (TOP + bottom) / 2
    out.append(
        f'<text class="l" transform="translate(13 {y_middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return out


def _svg(body: Sequence[str], title: str, width: int, height: int, style: str = "chart") -> str:
    label = escape(title)
    return f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _legend(series: Sequence[Series]) -> str:
    items = "".join(f'<span><span class="key {s.style}"></span>{escape(s.label)}</span>' for s in series)
    return f'<div class="legend">{items}</div>'


def _finite(x: float, y: float) -> bool:
    return math.isfinite(x) and math.isfinite(y)


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _widen(low, high)
    pad = 0.06 * (high - low)
    return (low if low == 0 else low - pad), high + pad
