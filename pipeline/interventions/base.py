"""What an intervention is, where it acts, and how several of them become hooks of a session.

Shape letters: N rows of one callback (any order, any mix of sequences), D width of the hook point, P named positions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sae.errors import ConfigError, ShapeError
from sae.rows import RowMatrix
from sae.weights import SAEWeights

from ..llama.hooks import HookPoint
from ..llama.session import Hook, Rows
from .inputs import InputRows

LARGEST = float(np.finfo(np.float32).max)
PHASES = ("all", "prompt", "response")


@dataclass(slots=True)
class Sequences:
    """What is known of the sequences in the context: prompt length and flagged (BOS, special, outlier) positions."""

    prompt_tokens: dict[int, int] = field(default_factory=dict)
    flags: dict[int, list[bool]] = field(default_factory=dict)

    def start(self, seq: int, flags: Iterable[bool]) -> None:
        """A prompt of as many tokens as there are flags; position 0 is the first."""
        self.flags[seq] = [bool(flag) for flag in flags]
        self.prompt_tokens[seq] = len(self.flags[seq])

    def append(self, seq: int, flag: bool) -> None:
        """One generated token."""
        self.flags[seq].append(bool(flag))

    def prompt_lengths(self, seq_N: np.ndarray) -> np.ndarray:
        """Prompt length of each row's sequence. Raises ConfigError for a sequence that was not started."""
        return self._per_row(seq_N, self.prompt_tokens)

    def flagged(self, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        """True where the row's token is flagged; positions beyond the known tokens are not."""
        flagged_N = np.zeros(len(seq_N), dtype=bool)
        for seq in np.unique(seq_N):
            known = np.asarray(self.flags.get(int(seq), ()), dtype=bool)
            rows = np.flatnonzero((seq_N == seq) & (pos_N < len(known)))
            flagged_N[rows] = known[pos_N[rows]]
        return flagged_N

    @staticmethod
    def _per_row(seq_N: np.ndarray, table: dict[int, int]) -> np.ndarray:
        found, inverse_N = np.unique(seq_N, return_inverse=True)
        missing = [int(seq) for seq in found if int(seq) not in table]
        if missing:
            raise ConfigError(f"sequences {missing} were not started, only {sorted(table)} have a known prompt length")
        return np.array([table[int(seq)] for seq in found], dtype=np.int64)[inverse_N]


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The rows an intervention touches.

    phase: `prompt` is pos < prompt length; `response` is pos >= prompt length - 1, because the last prompt position
    makes the first answer token; `all` is both. positions: RoPE positions within the phase, None for all of them.
    Flagged rows (BOS, special, outlier) are left alone unless `positions` names them or `flagged` takes them too.
    sequences: None for all.
    """

    phase: str = "all"
    positions: tuple[int, ...] | None = None
    sequences: tuple[int, ...] | None = None
    flagged: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"phase: expected one of {', '.join(PHASES)}, got {self.phase!r}")
        if self.positions is not None and any(position < 0 for position in self.positions):
            raise ConfigError(f"positions count from 0, got {list(self.positions)}")

    def mask(self, rows: Rows, sequences: Sequences) -> np.ndarray:
        """Boolean (N,): the rows to change."""
        return self.covers(rows.seq_N, rows.pos_N, sequences)

    def covers(self, seq_N: np.ndarray, pos_N: np.ndarray, sequences: Sequences) -> np.ndarray:
        """Boolean (N,): which rows at these places are to be changed."""
        if self.positions is not None:
            mask_N = np.isin(pos_N, self.positions)
        elif self.flagged:
            mask_N = np.ones(len(pos_N), dtype=bool)
        else:
            mask_N = ~sequences.flagged(seq_N, pos_N)
        if self.phase != "all":
            length_N = sequences.prompt_lengths(seq_N)
            mask_N &= pos_N < length_N if self.phase == "prompt" else pos_N >= length_N - 1
        if self.sequences is not None:
            mask_N &= np.isin(seq_N, self.sequences)
        return mask_N

    def key(self) -> str:
        return f"{self.phase};pos={self.positions};seq={self.sequences}{';flagged' if self.flagged else ''}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention(ABC):
    """A change of one hook point's rows: x' = x + delta(x) on the rows of `where`, nothing elsewhere."""

    point: HookPoint
    where: Where = Where()
    sets_value: ClassVar[bool] = False  # x' is a given value whatever x is: acting twice is acting once
    source: InputRows | None = field(init=False, default=None)  # rows of another hook point that the change depends on

    @property
    def reads(self) -> HookPoint | None:
        """The hook point of `source`."""
        return None if self.source is None else self.source.point

    @abstractmethod
    def key(self) -> str:
        """Text that names everything that changes the numbers: equal keys, equal forward pass."""

    @abstractmethod
    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        """delta_ND, float32, for rows that are all to be changed."""

    def delta(self, rows: Rows, sequences: Sequences) -> np.ndarray | None:
        """delta_ND for all rows of a callback, zero outside `where`; None when nothing changes."""
        mask_N = self.where.mask(rows, sequences)
        if not mask_N.any():
            return None
        changed = self.change(rows.values_ND[mask_N], rows.seq_N[mask_N], rows.pos_N[mask_N])
        if not changed.any():
            return None
        delta_ND = np.zeros(rows.values_ND.shape, dtype=changed.dtype)
        delta_ND[mask_N] = changed
        return delta_ND


def edit_hooks(interventions: Sequence[Intervention], sequences: Sequences) -> list[Hook]:
    """The interventions as editing hooks. At one point they act in the order given, each on the result of the one
    before; across points they act in the order of the graph, each on what the edits before it led to. A transcoder's
    input is read after all edits there."""
    hooks = []
    for intervention in interventions:
        hook = Hook(point=intervention.point, edit=_edit(intervention, sequences))
        # float32 x + (target - x) can miss the target by a rounding; the second pass adds what is left
        hooks += [hook, hook] if intervention.sets_value else [hook]
    return hooks + [i.source.hook() for i in interventions if i.source is not None]


def _edit(intervention: Intervention, sequences: Sequences) -> Callable[[Rows], np.ndarray | None]:
    return lambda rows: intervention.delta(rows, sequences)


def edits_key(interventions: Sequence[Intervention], sequences: Sequences) -> str:
    """Names the forward pass a KV cache was made by; "" without interventions."""
    if not interventions:
        return ""
    names = " + ".join(f"{intervention.key()}" for intervention in interventions)
    lengths = sequences.prompt_tokens if any(i.where.phase != "all" for i in interventions) else {}
    return f"{names} prompts={sorted(lengths.items())}" if lengths else names


def digest(*arrays: np.ndarray | RowMatrix | None) -> str:
    """16 hex digits that name the arrays' bytes and shapes."""
    total = hashlib.sha256()
    for array in arrays:
        if isinstance(array, RowMatrix):
            total.update(f"{array.shape}{array.type_name}".encode())
            for piece in array.pieces():
                total.update(piece.data)
        elif array is not None:
            total.update(f"{array.shape}{array.dtype}".encode())
            total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:16]


def sae_digest(w: SAEWeights) -> str:
    """Names everything of an SAE that changes its activations or its reconstruction."""
    arrays = digest(w.W_enc_FD, w.b_enc_F, w.W_dec_FD, w.b_dec_D, w.threshold_F, w.W_skip_OD)
    norm = "" if w.norm_mode == "none" else f"/{w.norm_mode}/{w.norm_eps}/{w.norm_correction}"
    across = f"/{w.hook}" if w.hook_out else ""  # an SAE reads the point that is changed
    return f"{arrays}/{w.variant}/{w.k}/{w.b_dec_subtracted}{norm}{across}"


def check_latents(w: SAEWeights, latents: Sequence[int], values: Sequence[float], word: str) -> None:
    """Raises ConfigError for latents the SAE lacks, latents named twice, or a value per latent missing."""
    wrong = [latent for latent in latents if not 0 <= latent < w.num_latents]
    if wrong:
        raise ConfigError(f"latents {wrong} do not exist, the SAE has latents 0..{w.num_latents - 1}")
    if len(set(latents)) != len(latents):
        raise ConfigError(f"a latent is named twice in {list(latents)}; name each once")
    if len(latents) != len(values):
        raise ConfigError(f"expected one {word} per latent, got {len(latents)} latents and {len(values)} values")
    if not all(abs(float(value)) <= LARGEST for value in values):
        raise ConfigError(f"{word} must be finite in float32, got {list(values)}")


def check_width(x_ND: np.ndarray, width: int, what: str) -> None:
    """Raises ShapeError when the rows of the hook point are not as wide as `what`."""
    if x_ND.shape[1] != width:
        raise ShapeError(f"{what} is {width} wide, the hook point {x_ND.shape[1]}; is it for another hook or model?")
