"""What the changes that depend on an SAE's latents have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae.encoders import Encoder, encoder_name
from sae.weights import SAEWeights

from .base import Intervention, check_width, sae_digest
from .inputs import InputRows, input_point


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentEdit(Intervention):
    """A change at the hook point that an SAE reconstructs, which depends on the latents of the row.

    An SAE's latents are those of the row that is changed. A transcoder's are those of its input: what the model goes on
    with there, after the edits at that point.
    """

    weights: SAEWeights
    encoder: Encoder | None = None  # what computes the latents; None: numpy

    def __post_init__(self) -> None:
        if (point := input_point(self.weights)) is not None:
            object.__setattr__(self, "source", InputRows(point))

    def sae_key(self) -> str:
        return sae_digest(self.weights) + encoder_name(self.encoder)

    def encoded_rows(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        """The rows the latents are of, for rows x_ND that are to be changed. ShapeError where widths do not fit."""
        check_width(x_ND, self.weights.d_out, "the SAE")
        if self.source is None:
            return x_ND
        rows_NI = self.source.take(seq_N, pos_N)
        check_width(rows_NI, self.weights.d_in, "the transcoder's input")
        return rows_NI
