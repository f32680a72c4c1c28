"""Where latents fire, as flat sparse arrays, and what follows from that: rates, token dependence, contexts.

N rows searched, F latents, K slots, E firings (entries with a > 0), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.corpus.windows import WindowTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Firings:
    """Every (row, latent, activation > 0), and the columns of the rows."""

    row_E: np.ndarray  # int32, ascending; index of the searched row
    latent_E: np.ndarray  # int32
    value_E: np.ndarray  # float32
    table_row_N: np.ndarray  # int64: the searched row's place in the window table
    token_N: np.ndarray  # int32
    num_latents: int

    @property
    def rows(self) -> int:
        return len(self.token_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStats:
    """Per latent, over the rows searched."""

    count_F: np.ndarray  # firings
    max_F: np.ndarray
    mean_square_F: np.ndarray  # E[a^2] over all rows
    breadth_F: np.ndarray  # effective number of groups (documents or windows): 1 / sum p_g^2, p_g its share of sum a^2
    groups: int  # that there are
    token_r2_F: np.ndarray  # see token_r2
    top_token_F: np.ndarray  # the token it fires on most often; -1 where it never fires
    top_share_F: np.ndarray  # share of its firings on that token


def collect_firings(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], table: WindowTable, num_latents: int
) -> Firings:
    """Firings of streamed (table_row_N, idx_NK, vals_NK); rows must come in the table's order."""
    rows, row_parts, latent_parts, value_parts, seen = [], [], [], [], 0
    for table_row_N, idx_NK, vals_NK in parts:
        row_E, slot_E = np.nonzero(vals_NK > 0)
        row_parts.append((row_E + seen).astype(np.int32))
        latent_parts.append(idx_NK[row_E, slot_E].astype(np.int32))
        value_parts.append(vals_NK[row_E, slot_E].astype(np.float32))
        rows.append(table_row_N)
        seen += len(table_row_N)
    table_row_N = np.concatenate([np.empty(0, np.int64), *rows])
    return Firings(
        row_E=np.concatenate([np.empty(0, np.int32), *row_parts]),
        latent_E=np.concatenate([np.empty(0, np.int32), *latent_parts]),
        value_E=np.concatenate([np.empty(0, np.float32), *value_parts]),
        table_row_N=table_row_N,
        token_N=table.token_N[table_row_N],
        num_latents=num_latents,
    )


def latent_stats(firings: Firings, group_N: np.ndarray) -> LatentStats:
    """`group_N` is the document or the window of each searched row."""
    f = firings
    count_F = np.bincount(f.latent_E, minlength=f.num_latents)
    max_F = np.zeros(f.num_latents, np.float32)
    np.maximum.at(max_F, f.latent_E, f.value_E)
    square_F = np.bincount(f.latent_E, weights=f.value_E.astype(np.float64) ** 2, minlength=f.num_latents)
    n_groups = int(group_N.max(initial=0)) + 1
    key_E = f.latent_E.astype(np.int64) * n_groups + group_N[f.row_E]
    keys, inverse = np.unique(key_E, return_inverse=True)
    mass = np.bincount(inverse, weights=f.value_E.astype(np.float64) ** 2, minlength=len(keys))
    together_F = np.bincount(keys // n_groups, weights=mass**2, minlength=f.num_latents)
    pair_token, pair_latent, pair_count, r2_F = _per_token(f)
    order = np.lexsort((pair_token, -pair_count, pair_latent))  # the commonest token of a latent first, ties: lowest
    latents, first = np.unique(pair_latent[order], return_index=True)
    top_token_F = np.full(f.num_latents, -1, np.int64)
    top_share_F = np.zeros(f.num_latents)
    top_token_F[latents] = pair_token[order][first]
    top_share_F[latents] = pair_count[order][first] / count_F[latents]
    return LatentStats(
        count_F=count_F,
        max_F=max_F,
        mean_square_F=square_F / max(1, f.rows),
        breadth_F=np.divide(square_F**2, together_F, out=np.zeros(f.num_latents), where=together_F > 0),
        groups=len(np.unique(group_N)),
        token_r2_F=r2_F,
        top_token_F=top_token_F,
        top_share_F=top_share_F,
    )


def _per_token(f: Firings) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token, latent, firings) of every pair that occurs, and the leave-one-out R^2 of token -> a_f.

    Predict a of row i by the mean activation of the OTHER rows with the same token (of all other rows where the
    token occurs once); R^2 = 1 - sum (a_i - prediction_i)^2 / sum (a_i - mean)^2. With n rows of a token, S = sum a,
    Q = sum a^2, the residuals of that token sum to (n / (n-1))^2 (Q - S^2 / n): no loop over rows. Leaving the row
    itself out keeps rare tokens from predicting themselves. NaN for a latent that never fires.
    """
    vocabulary = int(f.token_N.max(initial=0)) + 1
    key_E = f.latent_E.astype(np.int64) * vocabulary + f.token_N[f.row_E]
    keys, inverse = np.unique(key_E, return_inverse=True)
    value_E = f.value_E.astype(np.float64)
    pair_count = np.bincount(inverse, minlength=len(keys))
    pair_sum = np.bincount(inverse, weights=value_E, minlength=len(keys))
    pair_square = np.bincount(inverse, weights=value_E**2, minlength=len(keys))
    pair_latent, pair_token = keys // vocabulary, keys % vocabulary

    rows = f.rows
    total_F = np.bincount(pair_latent, weights=pair_sum, minlength=f.num_latents)
    square_F = np.bincount(pair_latent, weights=pair_square, minlength=f.num_latents)
    token_rows = np.bincount(f.token_N, minlength=vocabulary)
    n = token_rows[pair_token].astype(np.float64)
    single = n == 1
    safe_n = np.where(single, 2.0, n)
    residual = (safe_n / (safe_n - 1)) ** 2 * (pair_square - pair_sum**2 / safe_n)
    others_mean = (total_F[pair_latent] - pair_sum) / max(1, rows - 1)
    residual = np.where(single, (pair_sum - others_mean) ** 2, residual)
    residual_F = np.bincount(pair_latent, weights=residual, minlength=f.num_latents)
    # Tokens that occur once without the latent firing: predicted by the mean of all other rows.
    quiet_F = (token_rows == 1).sum() - np.bincount(pair_latent[single], minlength=f.num_latents)
    residual_F += quiet_F * (total_F / max(1, rows - 1)) ** 2
    centred_F = square_F - total_F**2 / max(1, rows)
    r2_F = np.full(f.num_latents, np.nan)
    np.divide(residual_F, centred_F, out=r2_F, where=centred_F > 0)
    return pair_token, pair_latent, pair_count, 1 - r2_F


def of_latent(firings: Firings, latents: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(rows, values) of the firings of each named latent, rows ascending."""
    wanted_F = np.zeros(firings.num_latents, bool)
    wanted_F[latents] = True
    keep = np.flatnonzero(wanted_F[firings.latent_E])
    keep = keep[np.argsort(firings.latent_E[keep], kind="stable")]
    edges = np.searchsorted(firings.latent_E[keep], latents), np.searchsorted(firings.latent_E[keep], latents, "right")
    return {
        int(latent): (firings.row_E[keep[a:b]], firings.value_E[keep[a:b]])
        for latent, a, b in zip(latents, *edges, strict=True)
    }


def strongest_rows(
    row_E: np.ndarray, value_E: np.ndarray, window_N: np.ndarray, document_N: np.ndarray, limit: int
) -> np.ndarray:
    """The rows of the strongest firings of one latent, strongest first.

    At most one of a window, and one of a document where there are enough documents; then further windows.
    """
    order = np.lexsort((row_E, -value_E))
    ranked = row_E[order]
    _, in_window = np.unique(window_N[ranked], return_index=True)
    candidates = np.sort(in_window)  # the best row of each window, strongest first
    _, in_document = np.unique(document_N[ranked[candidates]], return_index=True)
    first = np.sort(in_document)[:limit]
    rest = np.setdiff1d(np.arange(len(candidates)), first)[: limit - len(first)]
    return ranked[candidates[np.sort(np.r_[first, rest])]]
