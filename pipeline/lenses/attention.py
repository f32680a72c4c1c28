"""Attention patterns of one prompt: from where each head takes what it writes, as numbers and as a picture.

Shape letters: H heads, T positions (of the query, then of the key).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sae.errors import ConfigError

from ..llama.hooks import HookPoint
from ..llama.session import Session, capture

PER_LINE = 8  # heads side by side
PANEL_INCHES = (1.7, 6.0)  # least and most
INCHES_PER_TOKEN = 0.17
MOST_LABELS = 40  # tokens that are written at the axes; positions where there are more
MOST_PIXELS = 30_000  # of one side


def attention(session: Session, tokens: np.ndarray, blocks: Sequence[int]) -> dict[int, np.ndarray]:
    """Weights (H, T, T) float32 of each block, whose rows sum to 1 and are 0 after their own position.

    ConfigError for a block the model lacks; HookError where its graph has no pattern (flash attention).
    """
    count = session.model.n_layer
    if wrong := [block for block in blocks if not 0 <= block < count]:
        raise ConfigError(f"lens.attention: the model has blocks 0..{count - 1}, got {', '.join(map(str, wrong))}")
    points = {block: HookPoint("pattern", block) for block in blocks}
    (found,) = capture(session, [tokens], list(points.values()))
    return {block: np.ascontiguousarray(found[str(point)].transpose(1, 0, 2)) for block, point in points.items()}


def draw_attention(path: Path, patterns: Mapping[int, np.ndarray], labels: Sequence[str]) -> None:
    """Write a PNG: a panel for each head, the query's token down, the key's across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(block, head) for block, weights_HTT in patterns.items() for head in range(len(weights_HTT))]
    columns = min(PER_LINE, max(len(weights_HTT) for weights_HTT in patterns.values()))
    lines = -(-len(panels) // columns)
    side = min(max(PANEL_INCHES[0], INCHES_PER_TOKEN * len(labels)), PANEL_INCHES[1])
    size = (1.6 + side * columns, 1.2 + (side + 0.3) * lines)
    figure = Figure(figsize=size, dpi=min(110.0, MOST_PIXELS / max(size)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle("attention weights: query down, key across", fontsize=10)
    grid = figure.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")
    for place, ((block, head), ax) in enumerate(zip(panels, grid.flat, strict=False)):
        ax.imshow(patterns[block][head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(f"block {block}, head {head}", fontsize=8)
        ax.tick_params(labelsize=6, length=2)
        if len(labels) <= MOST_LABELS:
            ax.set_yticks(range(len(labels)), labels if place % columns == 0 else [])
            ax.set_xticks(range(len(labels)), labels if place + columns >= len(panels) else [], rotation=90)
    figure.colorbar(grid.flat[0].images[0], ax=grid, label="weight", shrink=min(1.0, 3.0 / size[1]), aspect=12)
    figure.savefig(path, format="png", metadata={"Software": None})
