"""From a searched table of windows to the latents' cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.analysis.choose import choose_latents
from pipeline.analysis.concepts import Agreement, agreements, row_properties
from pipeline.analysis.firings import Firings, LatentStats, collect_firings, latent_stats, of_latent, strongest_rows
from pipeline.analysis.promoted import direct_effect, extremes
from pipeline.corpus.windows import FLAGS_ALL, WindowTable
from pipeline.evaluation.evaluate import captured_rows, take_windows
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.unembed import Unembedding
from sae import runtime
from sae.weights import SAEWeights

from .data import Context, LatentCard
from .markup import piece_text

BEFORE, AFTER = 24, 10  # tokens shown around the strongest one
SHOWN_TOKENS = 12  # promoted and demoted
BINS = 24
FEW_DOCUMENTS = 20  # below, a latent's breadth is counted in windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """Latents over a sample of the windows: firings, statistics, known properties."""

    table: WindowTable
    firings: Firings
    stats: LatentStats
    window_N: np.ndarray
    document_N: np.ndarray
    agreements: dict[int, Agreement]
    sources: Mapping[str, bytes]


class Vocabulary:
    """Token texts of a model, each asked for once."""

    def __init__(self, model: Model) -> None:
        self.bytes = [model.piece(token) for token in range(model.n_vocab)]
        self.special_V = np.array([model.is_special(token) for token in range(model.n_vocab)])
        self.length_V = np.array([len(piece) for piece in self.bytes])

    def text(self, token: int) -> str:
        """The token as text; specials and bytes on their own become readable escapes."""
        return piece_text(self.bytes[token])


def search(
    model: Model,
    weights: SAEWeights,
    table: WindowTable,
    vocabulary: Vocabulary,
    *,
    tokens: int,
    seed: int,
    outlier_norm: float = 0.0,
    sources: Mapping[str, bytes] | None = None,
    session: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Searched:
    """Capture at most `tokens` rows of the table (in the order of even_order), encode, and count."""
    order_W = even_order(table, np.random.default_rng(seed))
    chosen_W = take_windows(table, order_W, tokens)
    total = int(np.diff(table.window_starts)[chosen_W].sum())

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        done = 0
        hook = HookPoint.parse(weights.hook)
        for part in captured_rows(model, table, chosen_W, hook, outlier_norm=outlier_norm, session=session):
            yield (part.row_N, *runtime.encode(weights, part.x_ND))
            done += part.rows
            if progress is not None:
                progress("contexts", done, total)

    firings = collect_firings(parts(), table, weights.num_latents)
    window_N, document_N = table.window_N[firings.table_row_N], table.doc_N[firings.table_row_N]
    few = len(np.unique(document_N)) < FEW_DOCUMENTS
    found: dict[int, Agreement] = {}
    if sources:
        lengths_N = vocabulary.length_V[firings.token_N]
        properties_CN, known_N = row_properties(table, firings.table_row_N, lengths_N, sources)
        found = agreements(firings, properties_CN, known_N)
    return Searched(
        table=table,
        firings=firings,
        stats=latent_stats(firings, window_N if few else document_N),
        window_N=window_N,
        document_N=document_N,
        agreements=found,
        sources=sources or {},
    )


def even_order(table: WindowTable, rng: np.random.Generator) -> np.ndarray:
    """All windows, the documents in turn: a long document does not crowd out the others at the front."""
    shuffled_W = rng.permutation(table.n_windows)
    document_W = table.doc_N[table.window_starts[shuffled_W]]
    by_document = np.argsort(document_W, kind="stable")
    starts = np.searchsorted(document_W[by_document], document_W[by_document])
    turn_W = np.empty(table.n_windows, np.int64)
    turn_W[by_document] = np.arange(table.n_windows) - starts
    return shuffled_W[np.argsort(turn_W, kind="stable")]


def latent_cards(
    searched: Searched,
    weights: SAEWeights,
    unembedding: Unembedding,
    vocabulary: Vocabulary,
    *,
    count: int,
    contexts: int,
) -> list[LatentCard]:
    """Cards of the latents worth reading, those that read their surroundings first; a few labelled ones are preferred."""
    stats, rows = searched.stats, searched.firings.rows
    labelled = weights.labels if len(weights.labels) <= count else {}  # all of them labelled says nothing
    wanted = dict.fromkeys([*labelled, *_by_agreement(searched)])
    named = [f for f in wanted if stats.count_F[f] >= contexts]
    chosen = choose_latents(stats, rows, count, preferred=named)
    if not chosen:
        return []
    where = of_latent(searched.firings, np.array(sorted(chosen)))
    return [_card(f, searched, weights, unembedding, vocabulary, where[f], contexts) for f in chosen]


def _by_agreement(searched: Searched) -> list[int]:
    """Latents with a known property, properties in turn, within one the clearest first."""
    by_name: dict[str, list[int]] = {}
    for latent, agreement in sorted(searched.agreements.items(), key=lambda item: (-item[1].share, item[0])):
        by_name.setdefault(agreement.name, []).append(latent)
    longest = max((len(group) for group in by_name.values()), default=0)
    return [group[i] for i in range(min(longest, 2)) for group in by_name.values() if i < len(group)]


def _card(
    latent: int,
    searched: Searched,
    weights: SAEWeights,
    unembedding: Unembedding,
    vocabulary: Vocabulary,
    where: tuple[np.ndarray, np.ndarray],
    contexts: int,
) -> LatentCard:
    row_E, value_E = where
    stats = searched.stats
    effect_V = direct_effect(unembedding, weights.W_dec_FD[latent])[: len(vocabulary.bytes)]
    up, down = extremes(effect_V, SHOWN_TOKENS, vocabulary.special_V)
    agreement = searched.agreements.get(latent)
    counts_B, _ = np.histogram(value_E, bins=BINS, range=(0, float(stats.max_F[latent])))
    peaks = strongest_rows(row_E, value_E, searched.window_N, searched.document_N, contexts)
    return LatentCard(
        latent=latent,
        density=float(stats.count_F[latent] / max(1, searched.firings.rows)),
        max_activation=float(stats.max_F[latent]),
        median_activation=float(np.median(value_E)),
        token_r2=float(stats.token_r2_F[latent]),
        top_token=vocabulary.text(int(stats.top_token_F[latent])),
        top_token_share=float(stats.top_share_F[latent]),
        contexts=[_context(int(row), searched, vocabulary, row_E, value_E) for row in peaks],
        promoted=[(vocabulary.text(int(t)), float(effect_V[t])) for t in up],
        demoted=[(vocabulary.text(int(t)), float(effect_V[t])) for t in down],
        histogram=counts_B.tolist(),
        concept=agreement.name if agreement else "",
        concept_share=agreement.share if agreement else 0.0,
        concept_base=agreement.base if agreement else 0.0,
        label=weights.labels.get(latent, ""),
    )


def _context(row: int, searched: Searched, vocabulary: Vocabulary, row_E: np.ndarray, value_E: np.ndarray) -> Context:
    """The tokens around a searched row, within its window, and the latent's activation on each."""
    table, at = searched.table, int(searched.firings.table_row_N[row])
    window = int(table.window_N[at])
    first = max(int(table.window_starts[window]), at - BEFORE)
    stop = min(int(table.window_starts[window + 1]), at + AFTER + 1)
    first += int(table.flags_N[first] & FLAGS_ALL != 0)  # BOS says nothing here
    near = slice(*np.searchsorted(row_E, [row - BEFORE, row + AFTER + 1]))
    values = np.zeros(stop - first)
    places = searched.firings.table_row_N[row_E[near]] - first
    inside = (places >= 0) & (places < len(values))
    values[places[inside]] = value_E[near][inside]
    document, offset = table.documents[int(table.doc_N[at])].name, int(table.byte_offset_N[at])
    source = searched.sources.get(document)
    return Context(
        pieces=[vocabulary.text(t) for t in table.token_N[first:stop].tolist()],
        values=values.tolist(),
        peak=at - first,
        document=document,
        byte_offset=offset,
        line=source.count(b"\n", 0, offset) + 1 if source is not None else 0,
    )
