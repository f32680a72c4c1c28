"""What is shown of each token: one event per token, the same for the terminal, JSONL and the report.

Shape letters: N rows, D width, K slots for active latents.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from sae.encoders import PAIR, Encoder, RowReading, encoder_of, squared_gap
from sae.errors import ConfigError
from sae.runtime import decode
from sae.weights import SAEWeights

from .interventions.base import check_width
from .interventions.inputs import input_point, output_point
from .llama.hooks import HookPoint
from .llama.session import Hook, Rows


@final
class Reading:
    """One SAE's view of one token.

    hook: where it reads; hook_out: where a transcoder's reconstruction is compared, "" of an SAE. l0: latents above
    zero. fvu: ||x - x_hat||^2 / variance of the SAE; of a transcoder ||y - y_hat||^2 / variance of y.
    """

    __slots__ = ("_pairs", "fvu", "hook", "hook_out", "l0")

    def __init__(self, hook: str, pairs: bytes, l0: int, fvu: float, hook_out: str = "") -> None:
        """`pairs`: the latents listed and their activations (`sae.encoders.PAIR`), strongest first."""
        self.hook, self._pairs, self.l0, self.fvu, self.hook_out = hook, pairs, l0, fvu, hook_out

    @property
    def latents(self) -> tuple[tuple[int, float], ...]:
        """(latent, activation a), strongest first; made when it is asked for."""
        return tuple(PAIR.iter_unpack(self._pairs))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `hook_out` of transcoders only."""
        across = {"hook_out": self.hook_out} if self.hook_out else {}
        latents = [list(pair) for pair in self.latents]
        return {"hook": self.hook} | across | {"latents": latents, "l0": self.l0, "fvu": self.fvu}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadoutEvent:
    """One token of the prompt (phase `prompt`) or of the generation (`response`).

    text: the characters this token completes; bytes of an unfinished character come with the token that ends it.
    logprob: log p(token | tokens before) in nats at temperature 1, interventions included; None for the first token.
    readings: one per reader, in the readers' order; empty for flagged (BOS, special) tokens.
    """

    token: int
    text: str
    pos: int
    phase: str
    flagged: bool
    logprob: float | None
    readings: tuple[Reading, ...] = ()

    @property
    def latents(self) -> tuple[tuple[int, float], ...]:
        """(latent, activation) of the first reader, strongest first."""
        return self.readings[0].latents if self.readings else ()

    @property
    def l0(self) -> int | None:
        """Active latents of the first reader, None for a token without a reading."""
        return self.readings[0].l0 if self.readings else None

    @property
    def fvu(self) -> float | None:
        """Token FVU of the first reader, None for a token without a reading."""
        return self.readings[0].fvu if self.readings else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; latents, l0 and fvu of the first reader on top, all readers under `readings`."""
        return {
            "token": self.token,
            "text": self.text,
            "pos": self.pos,
            "phase": self.phase,
            "flagged": self.flagged,
            "logprob": self.logprob,
            "latents": [list(pair) for pair in self.latents],
            "l0": self.l0,
            "fvu": self.fvu,
            "readings": [reading.to_dict() for reading in self.readings],
        }

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


class Reader:
    """Reads an SAE's latents at a hook point, the value before any edit of that point: the model's own.

    Of a transcoder `point` is the output, which is compared with what the latents make of the input. The input is what
    the model goes on with there, after the edits at that point: the output is computed from it.
    """

    def __init__(
        self, weights: SAEWeights, *, point: HookPoint | None = None, top: int = 3, encoder: Encoder | None = None
    ) -> None:
        """`point` defaults to the one the SAE reconstructs; `top` is how many latents a reading lists; `encoder`: numpy if None."""
        if top < 0:
            raise ConfigError(f"top latents: expected a number of at least 0, got {top}")
        self.weights, self.top, self.encoder = weights, top, encoder_of(weights, encoder)
        self.point = point if point is not None else output_point(weights)
        self.source = input_point(weights)
        self._name, self._name_out = str(self.source or self.point), "" if self.source is None else str(self.point)
        self._rows: dict[tuple[int, int], np.ndarray] = {}
        self._inputs: dict[tuple[int, int], np.ndarray] = {}  # a transcoder's
        self._row = row = self.encoder.row_reading()
        self._place: _Place | None = None
        self._input_place: _Place | None = None  # a transcoder's
        if row is not None and self.source is None:
            self._place = _Place(row, row.width, 0 if row.tensor else row.x_D.ctypes.data, row.tensor)
        elif row is not None:
            self._place = _Place(row, row.y_O.size, row.y_O.ctypes.data)
            self._input_place = _Place(row, row.width, row.x_D.ctypes.data)

    def hook(self) -> Hook:
        return Hook(point=self.point, read=self._read, place=self._place)

    def input_hook(self) -> Hook | None:
        """To be put behind the edits; None of an SAE."""
        return None if self.source is None else Hook(point=self.source, read=self._read_input, place=self._input_place)

    def _read(self, rows: Rows) -> None:
        _keep(rows, self._rows)

    def _read_input(self, rows: Rows) -> None:
        _keep(rows, self._inputs)

    def take(self, seq: int, positions: list[int]) -> list[Reading]:
        """Readings of the positions just decoded, in that order; forgets all captured rows."""
        if self._row is not None and self._place is not None and self._place.held is not None:
            held, self._place.held = self._place.held, None
            input_held = held
            if self._input_place is not None:
                input_held, self._input_place.held = self._input_place.held, None
            if not self._rows and positions == [held[1]] and seq == held[0] and held == input_held:
                found = self._row.found(self.top)
                if found is not None:
                    pairs, l0, error = found
                    return [Reading(self._name, pairs, l0, error / self.weights.variance, self._name_out)]
            # a row that came by the general way is newer: while this one was held, none came here
            self._rows.setdefault(held, self._row.y_O.copy())
            if self._input_place is not None and input_held is not None:
                self._inputs.setdefault(input_held, self._row.x_D.copy())
        rows = [self._rows[seq, pos] for pos in positions]
        inputs = [] if self.source is None else [self._inputs[seq, pos] for pos in positions]
        self._rows.clear()
        self._inputs.clear()
        if not rows:
            return []
        x_ND = np.array(rows)
        if self.source is None:
            idx_NK, vals_NK = self.encoder.encode(x_ND)
            error_N = self.encoder.squared_error(x_ND, idx_NK, vals_NK)
        else:
            check_width(x_ND, self.weights.d_out, "the transcoder's output")
            input_ND = np.array(inputs)
            idx_NK, vals_NK = self.encoder.encode(input_ND)
            error_N = squared_gap(x_ND, decode(self.weights, idx_NK, vals_NK, input_ND))
        fvu_N = error_N / self.weights.variance
        l0_N = np.count_nonzero(vals_NK > 0, axis=1)  # sorted: these come first
        return [self._reading(*row) for row in zip(idx_NK, vals_NK, l0_N.tolist(), fvu_N.tolist(), strict=True)]

    def _reading(self, idx_K: np.ndarray, vals_K: np.ndarray, l0: int, fvu: float) -> Reading:
        shown = min(l0, self.top)
        listed = zip(idx_K[:shown].tolist(), vals_K[:shown].tolist(), strict=True)
        return Reading(self._name, b"".join(PAIR.pack(*pair) for pair in listed), l0, fvu, self._name_out)


def _keep(rows: Rows, into: dict[tuple[int, int], np.ndarray]) -> None:
    values_ND = rows.values_ND.copy()  # the view ends with the callback
    for row_D, seq, pos in zip(values_ND, rows.seq_N.tolist(), rows.pos_N.tolist(), strict=True):
        into[seq, pos] = row_D


class _Place:
    """Where a session puts the row of a single token (`RowPlace`)."""

    def __init__(self, row: RowReading, width: int, address: int, tensor: int = 0) -> None:
        self.width, self.address, self.tensor, self.call = width, address, tensor, row.call
        self._row = row  # its memory is written to as long as a session has this place
        self.held: tuple[int, int] | None = None  # (sequence, position) of the row that is there

    def is_free(self) -> bool:
        return self.held is None

    def written(self, seq: int, pos: int) -> None:
        self.held = seq, pos


class TextPieces:
    """Bytes of tokens to text: a character is handed out with the token that completes it, bad bytes as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes, *, last: bool = False) -> str:
        """The text that `piece` completes; `last` also gives up what is still held back."""
        return self._decoder.decode(piece, last)
