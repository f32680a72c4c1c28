"""Gathers what the report shows: from the model, the SAE, held-out windows, the training log and the evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.analysis.promoted import direct_effect, extremes
from pipeline.analysis.steering import clearest, complete, random_directions, responses, steering_curves
from pipeline.config import ReportConfig
from pipeline.corpus.windows import WindowTable
from pipeline.evaluation.evaluate import take_windows
from pipeline.evaluation.splice import SpliceConfig, TokenWindow, split_windows
from pipeline.lenses.heads import head_sweep
from pipeline.lenses.latents import latent_sweep
from pipeline.lenses.logit_lens import logit_lens
from pipeline.lenses.patching import prompt_tokens
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session
from pipeline.llama.unembed import Unembedding
from sae.errors import FormatError
from sae.weights import SAEWeights

from .data import Completion, Effect, LatentCard, LensMap, NextTokenMap, ReportData, SteeringCurve, TrainingCurve
from .html import CONTEXT_R2, render
from .latents import Searched, Vocabulary, latent_cards, search
from .markup import count, percent

DEFAULT_PROMPT = "def read_lines(path):\n    "
LENS_TOKENS = 24
STEER_FACTORS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # times the strongest activation seen
CHOICE_FACTORS = (-0.5, 0.5, 1.0, 1.5)
CURVE_ROWS, CHOICE_ROWS = 768, 256
CANDIDATES = 10
CONTROLS = 2
PROMOTED = 8
COMPLETION_TOKENS = 40
EFFECTS, EFFECTS_TOKENS = 12, 64  # latents shown, of prompts of so many tokens at most
SIDE_BY_SIDE = 8  # prompts of a batch, which is one pass then

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """What build_report reads. `windows` are held out; `sources` maps document names to their bytes.

    `sources` (optional) lets Python documents be compared with their syntax trees; `identity` and `provenance`
    are shown as they are under "How it was made".
    """

    model: Model
    weights: SAEWeights
    windows: WindowTable
    evaluation: Mapping[str, Any]
    evaluation_picture: bytes = b""  # the PNG beside it
    config: ReportConfig = field(default_factory=ReportConfig)
    metrics_path: Path | None = None  # the metrics.jsonl of the training run
    dead_after_tokens: int = 0
    rows_captured: int = 0  # for the training; 0: not known
    corpus_name: str = "text"
    sources: Mapping[str, bytes] | None = None
    outlier_norm: float = 0.0
    identity: Sequence[tuple[str, str]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    session: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def build_report(path: Path, inputs: ReportInputs, *, progress: Progress | None = None) -> ReportData:
    """Collect everything, write one self-contained HTML file at `path` (whole or not at all), return what it shows."""
    data = collect(inputs, progress=progress)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(data), encoding="utf-8")
    os.replace(partial, path)
    return data


def collect(inputs: ReportInputs, *, progress: Progress | None = None) -> ReportData:
    """The report's data; the model runs twice over samples of the windows (contexts, steering) and on a prompt."""
    i = inputs
    vocabulary, unembedding = Vocabulary(i.model), i.model.unembed()
    searched = search(
        i.model,
        i.weights,
        i.windows,
        vocabulary,
        tokens=i.config.tokens,
        seed=i.seed,
        outlier_norm=i.outlier_norm,
        sources=i.sources,
        session=i.session,
        progress=progress,
    )
    cards = latent_cards(
        searched, i.weights, unembedding, vocabulary, count=i.config.top_latents, contexts=i.config.contexts
    )
    steering, completions = _steering(i, searched, cards, unembedding, vocabulary, progress)
    return ReportData(
        title=f"Sparse autoencoder on {i.weights.hook} of {_model_name(i.model)}",
        summary=_summary(i),
        identity=list(i.identity) or _identity(i),
        evaluation=dict(i.evaluation),
        evaluation_picture=i.evaluation_picture,
        training=(
            read_training_curve(i.metrics_path, i.weights.num_latents, i.dead_after_tokens) if i.metrics_path else None
        ),
        latents=cards,
        latent_rows=searched.firings.rows,
        lens=_lens(i, vocabulary),
        next_token=_next_token(i, vocabulary),
        completions=completions,
        steering=steering,
        provenance=list(i.provenance),
    )


def read_training_curve(path: Path, num_latents: int, dead_after_tokens: int = 0) -> TrainingCurve:
    """The curve of a metrics.jsonl: rows with `tokens`, `fvu` and, where there is one, `dead` (a number of latents).

    A run that was resumed logs some steps again: the later row of a token count counts. FormatError for a line
    that is not JSON, or whose numbers are none.
    """
    rows: dict[float, tuple[float, float | None]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if isinstance(row, dict) and row.get("tokens") is not None and row.get("fvu") is not None:
                dead = row.get("dead")
                rows[float(row["tokens"])] = (float(row["fvu"]), None if dead is None else float(dead) / num_latents)
        except (TypeError, ValueError, OverflowError):
            raise FormatError(f"{path}, line {number}: expected a JSON object of numbers; the log is damaged") from None
    tokens = sorted(rows)
    dead_shares = [rows[t][1] for t in tokens]
    return TrainingCurve(
        tokens=tokens,
        fvu=[rows[t][0] for t in tokens],
        dead_share=[d for d in dead_shares if d is not None] if None not in dead_shares else [],
        dead_after_tokens=dead_after_tokens,
    )


def _model_name(model: Model) -> str:
    return model.id.name or Path(model.path).stem


def _summary(i: ReportInputs) -> str:
    w = i.weights
    active = f"{'about' if w.variant == 'threshold' else 'at most'} {w.k} active per token"
    return (
        f"{count(w.num_latents)} latents, {active}, trained on {trained_on(w.training.get('tokens'), i.rows_captured)} "
        f"that llama.cpp computed while the model read {i.corpus_name}; judged on {judged_on(i.evaluation)}."
    )


def trained_on(rows: int | None, captured: int) -> str:
    """The rows of the training, beside those captured where that is known."""
    if not rows:
        return "activations"
    if not captured:
        return f"{count(rows)} rows of activations"
    passes = f" in {rows / captured:.1f} passes" if rows > captured else ""
    return f"{count(rows)} rows, drawn{passes} from {count(captured)} activations"


def judged_on(evaluation: Mapping[str, Any]) -> str:
    """The documents of the evaluation, and how many of them the training had too."""
    seen = evaluation.get("documents_trained_on")
    if seen is None:  # nobody looked
        return "held-out documents"
    if seen == 0:
        return "documents kept out of the training"
    were = "1 of which was" if seen == 1 else f"{count(seen)} of which were"
    return f"held-out documents, {were} trained on too"


def _identity(i: ReportInputs) -> list[tuple[str, str]]:
    m, w = i.model.id, i.weights
    return [
        (
            "model",
            f"{_model_name(i.model)}: {m.architecture}, {m.n_layer} blocks, {m.n_embd} wide, sha256 {m.sha256[:16]}",
        ),
        ("hook point", w.hook),
        ("SAE", f"{w.variant}, {w.num_latents} latents" + (f", k = {w.k}" if w.variant != "threshold" else "")),
    ]


def _steering(
    i: ReportInputs,
    searched: Searched,
    cards: list[LatentCard],
    unembedding: Unembedding,
    vocabulary: Vocabulary,
    progress: Progress | None,
) -> tuple[SteeringCurve | None, list[Completion]]:
    """Curve and completions of one latent: the one asked for, or of the cards' the one with the largest effect."""
    if not cards and i.config.steer_latent < 0:
        return None, []
    rng = np.random.default_rng(i.seed)
    order_W, all_windows = rng.permutation(i.windows.n_windows), split_windows(i.windows)
    hook = HookPoint.parse(i.weights.hook)
    config = SpliceConfig(outlier_norm=i.outlier_norm, session=i.session)

    def sample(rows: int) -> list[TokenWindow]:
        return [all_windows[w] for w in take_windows(i.windows, order_W, rows)]

    def up(latent: int) -> np.ndarray:
        effect_V = direct_effect(unembedding, i.weights.W_dec_FD[latent])[: len(vocabulary.bytes)]
        return extremes(effect_V, PROMOTED, vocabulary.special_V)[0]

    candidates = [i.config.steer_latent] if i.config.steer_latent >= 0 else candidate_latents(cards)
    latent = candidates[0]
    if len(candidates) > 1:
        tried = {f: (i.weights.W_dec_FD[f], _scale(searched, f), up(f)) for f in candidates}
        changes = responses(i.model, sample(CHOICE_ROWS), hook, tried, CHOICE_FACTORS, config=config)
        latent = clearest(changes, CHOICE_FACTORS)
    scale, direction_D = _scale(searched, latent), i.weights.W_dec_FD[latent]
    directions = {"own": direction_D, **random_directions(direction_D, CONTROLS, rng)}
    coeffs = [round(f * scale, 3) for f in STEER_FACTORS]
    curves = steering_curves(i.model, sample(CURVE_ROWS), hook, directions, up(latent), coeffs, config=config)
    controls = [curve for name, curve in curves.items() if name != "own"]
    if progress is not None:
        progress("steering", 1, 1)
    steering = SteeringCurve(
        latent=latent,
        coeffs=coeffs,
        promoted=[vocabulary.text(int(t)) for t in up(latent)],
        log_prob=curves["own"].log_prob,
        kl=curves["own"].kl,
        control_log_prob=np.mean([c.log_prob for c in controls], axis=0).tolist(),
        control_kl=np.mean([c.kl for c in controls], axis=0).tolist(),
        max_activation=scale,
        controls=len(controls),
        positions=curves["own"].positions,
        candidates=len(candidates),
    )
    return steering, _completions(i, hook, direction_D, scale)


def candidate_latents(cards: Sequence[LatentCard]) -> list[int]:
    """Of the cards, the latents whose promoted tokens stand out most from their demoted ones."""
    with_tokens = [c for c in cards if c.promoted]
    with_tokens.sort(key=lambda c: -sum(value for _, value in c.promoted[:PROMOTED]))
    return [c.latent for c in with_tokens[:CANDIDATES]] or [cards[0].latent]


def _scale(searched: Searched, latent: int) -> float:
    """The strongest activation seen; 1 for a latent that never fired, so that it can still be steered by."""
    return float(searched.stats.max_F[latent]) or 1.0


def _completions(i: ReportInputs, hook: HookPoint, direction_D: np.ndarray, scale: float) -> list[Completion]:
    prompt = i.config.prompt or DEFAULT_PROMPT

    def text(delta_D: np.ndarray | None) -> str:
        tokens = complete(i.model, prompt.encode(), hook, delta_D, max_tokens=COMPLETION_TOKENS, session=i.session)
        return tokens.decode("utf-8", "backslashreplace")

    plain = text(None)
    return [
        Completion(
            prompt=prompt, plain=plain, steered=text(np.float32(factor * scale) * direction_D), coeff=factor * scale
        )
        for factor in (0.5, 1.0)
    ]


def _lens(i: ReportInputs, vocabulary: Vocabulary) -> LensMap:
    prompt = i.config.prompt or DEFAULT_PROMPT
    bos = [i.model.bos] if i.model.add_bos and i.model.bos is not None else []
    tokens_T = np.array([*bos, *i.model.tokenize(prompt.encode()).tolist()], np.int32)
    if len(tokens_T) < LENS_TOKENS:  # a short prompt goes on as the model would
        rest = complete(
            i.model,
            prompt.encode(),
            HookPoint.parse(i.weights.hook),
            None,
            max_tokens=LENS_TOKENS - len(tokens_T),
            session=i.session,
        )
        tokens_T = np.array([*tokens_T.tolist(), *i.model.tokenize(rest).tolist()], np.int32)
    tokens_T = tokens_T[:LENS_TOKENS]
    with Session(i.model, n_ctx=len(tokens_T), **dict(i.session)) as session:
        result = logit_lens(session, i.model, tokens_T, top=1)
    labels = ["embedding", *(f"block {b}" for b in range(len(result.hooks) - 1))]
    cells = [
        [(vocabulary.text(int(t)), float(p)) for t, p in zip(tokens, probs, strict=True)]
        for tokens, probs in zip(result.top_tokens_LTK[:, :, 0], result.top_probs_LTK[:, :, 0], strict=True)
    ]
    return LensMap(tokens=[vocabulary.text(int(t)) for t in tokens_T], row_labels=labels, cells=cells)


def _next_token(i: ReportInputs, vocabulary: Vocabulary) -> NextTokenMap | None:
    """On the prompt as it is given; None for a long one. A model without attention heads has none to show."""
    prompt = i.config.prompt or DEFAULT_PROMPT
    count = len(prompt_tokens(i.model, prompt))
    if not 0 < count <= EFFECTS_TOKENS:
        return None
    n_ctx = SIDE_BY_SIDE * count
    with Session(i.model, n_ctx=n_ctx, n_seq_max=SIDE_BY_SIDE, kv_unified=False, **dict(i.session)) as session:
        found = latent_sweep(session, i.model, i.weights, prompt)
        heads = head_sweep(session, i.model, prompt) if i.model.graph.heads() else None
    answer = found.target.answer
    latents = [
        Effect(
            latent=int(found.latents_N[row]),
            label=i.weights.labels.get(int(found.latents_N[row]), ""),
            effect=float(found.effect_N[row]),
            kl=float(found.kl_N[row]),
            likeliest=vocabulary.text(int(found.likeliest_N[row])),
            token=vocabulary.text(int(found.target.tokens[found.position_N[row]])),
        )
        for row in found.ranked()[:EFFECTS]
    ]
    return NextTokenMap(
        prompt=prompt,
        answer=vocabulary.text(answer),
        probability=float(np.exp(found.target.plain)),
        latents=latents,
        active=found.active,
        blocks=list(heads.blocks) if heads else [],
        heads=[[None if np.isnan(v) else v for v in row] for row in heads.effect_LH.tolist()] if heads else [],
    )


def headline(data: ReportData) -> str:
    """One line of numbers for the console."""
    contextual = sum(card.token_r2 < CONTEXT_R2 for card in data.latents)
    recovered = percent(data.evaluation.get("ce_recovered"))
    return f"{len(data.latents)} latents shown, {contextual} of them read their surroundings; CE recovered {recovered}"
