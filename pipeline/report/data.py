"""What the report shows, as plain data. Strings are raw text of the model or the corpus: html.py escapes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCurve:
    """Points of the training log over the tokens trained on. dead_share may be empty."""

    tokens: list[float]
    fvu: list[float]
    dead_share: list[float] = field(default_factory=list)
    dead_after_tokens: int = 0  # what "dead" means in this curve

    @property
    def start(self) -> int:
        """The first point that a chart of the FVU shows: those before lie far above the rest and would flatten it."""
        return min(len(self.tokens) // 20, 20)

    @property
    def left_out(self) -> str:
        """`, the first 5 % left out`; nothing where all points are shown."""
        return f", the first {100 * self.start / len(self.tokens):.2g} % left out" if self.start else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A stretch of text around a token where the latent fires strongly. values[i] is a_f at pieces[i]."""

    pieces: list[str]
    values: list[float]
    peak: int
    document: str = ""
    byte_offset: int = -1
    line: int = 0  # counted from 1; 0: not known


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCard:
    """All there is to read about one latent."""

    latent: int
    density: float  # share of rows it fires on
    max_activation: float
    median_activation: float  # of the rows it fires on
    token_r2: float  # share of its variance known from the current token alone, cross-validated
    top_token: str
    top_token_share: float  # share of its firings on that token
    contexts: list[Context]
    promoted: list[tuple[str, float]]
    demoted: list[tuple[str, float]]
    histogram: list[int] = field(default_factory=list)  # firings per bin of (0, max_activation]
    concept: str = ""  # a ground-truth property of the text where it fires, where one was found
    concept_share: float = 0.0  # of its strong firings
    concept_base: float = 0.0  # of all rows
    label: str = ""  # what somebody called it


@dataclass(frozen=True, kw_only=True, slots=True)
class LensMap:
    """Logit lens: cells[row][position] = (most likely next token, its probability), rows from early to late."""

    tokens: list[str]
    row_labels: list[str]
    cells: list[list[tuple[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """A latent switched off: what that does to the next token."""

    latent: int
    label: str
    effect: float  # change of the log-probability, nats
    kl: float  # nats
    likeliest: str  # next token without it
    token: str  # where its activation is largest


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenMap:
    """What the likeliest next token after a prompt hangs on: latents and heads, each switched off alone."""

    prompt: str
    answer: str
    probability: float
    latents: list[Effect]  # the largest effects
    active: int  # latents that fire in the prompt
    blocks: list[int]
    heads: list[list[float | None]]  # [block][head] change of the log-probability, nats; None: no such head


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A plain and a steered completion of the same prompt, chosen greedily."""

    prompt: str
    plain: str
    steered: str
    coeff: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeringCurve:
    """x' = x + coeff * direction over a range of coefficients, for a latent and for random directions."""

    latent: int
    coeffs: list[float]
    promoted: list[str]
    log_prob: list[float]  # mean over positions and promoted tokens, nats
    kl: list[float]  # mean KL(plain || steered) per token, nats
    control_log_prob: list[float]
    control_kl: list[float]
    max_activation: float  # the strongest a_f seen in the text: the natural scale of coeff
    controls: int = 1
    positions: int = 0
    candidates: int = 1  # latents tried before this one was chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """One report. `evaluation` is the dictionary of pipeline.evaluation.evaluate."""

    title: str
    summary: str
    identity: list[tuple[str, str]]
    evaluation: dict[str, Any]
    evaluation_picture: bytes = b""  # a PNG
    training: TrainingCurve | None = None
    latents: list[LatentCard] = field(default_factory=list)
    latent_rows: int = 0  # rows searched for contexts
    lens: LensMap | None = None
    next_token: NextTokenMap | None = None
    completions: list[Completion] = field(default_factory=list)
    steering: SteeringCurve | None = None
    provenance: list[tuple[str, str]] = field(default_factory=list)
