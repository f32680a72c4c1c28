"""Which latents a person should read first."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from .firings import LatentStats

MIN_FIRINGS = 40
BREADTH_SHARE = 1 / 8  # of the documents, in effect
MIN_BREADTH = 4
MAX_DENSITY = 0.03
TOKEN_R2 = 0.5  # above, most of a latent's variance is known from the current token


def choose_latents(
    stats: LatentStats, rows: int, count: int, *, preferred: list[int] | None = None, max_density: float = MAX_DENSITY
) -> list[int]:
    """`count` latents worth reading, half of them not predictable from the current token, strongest kind of each first.

    Left out: latents with under 40 firings or, in effect, in under an eighth of the documents (nothing general to
    see), and the densest (above `max_density` of the rows; they carry background). The rest are ranked by E[a^2],
    what they add to the reconstruction, within their kind and within thirds of log density, so that frequent latents
    do not fill the list. `preferred` (for instance latents a property of the text was found for) take every other
    place within their kind.
    """
    density_F = stats.count_F / max(1, rows)
    eligible = (stats.count_F >= MIN_FIRINGS) & (density_F <= max_density) & np.isfinite(stats.token_r2_F)
    broad = eligible & (stats.breadth_F >= max(MIN_BREADTH, BREADTH_SHARE * stats.groups))
    eligible = broad if broad.sum() >= count else eligible & (stats.breadth_F >= MIN_BREADTH)
    if not eligible.any():  # a tiny run: better the little there is than an empty report
        eligible = stats.count_F > 0
    context = eligible & ~(stats.token_r2_F >= TOKEN_R2)
    token = eligible & ~context
    first = [f for f in preferred or [] if eligible[f]]
    contexts = _interleaved(context, stats, [f for f in first if context[f]])
    tokens = _interleaved(token, stats, [f for f in first if token[f]])
    n_context = max(count - len(tokens), min(len(contexts), (count + 1) // 2))
    return contexts[:n_context] + tokens[: count - min(n_context, len(contexts))]


def _interleaved(mask: np.ndarray, stats: LatentStats, first: list[int]) -> list[int]:
    """The latents of `mask`: `first` and the others in turn; the others one from each third of density, by E[a^2]."""
    latents = np.flatnonzero(mask)
    if not len(latents):
        return []
    by_density = latents[np.argsort(stats.count_F[latents], kind="stable")]
    thirds = [part[np.argsort(-stats.mean_square_F[part], kind="stable")] for part in np.array_split(by_density, 3)]
    turns = [int(part[i]) for i in range(max(map(len, thirds))) for part in reversed(thirds) if i < len(part)]
    mixed = [f for pair in zip_longest(first, turns) for f in pair if f is not None]
    return list(dict.fromkeys(mixed))
