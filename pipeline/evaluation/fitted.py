"""The baselines that are fitted on rows the SAE was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sae.errors import ModelMismatchError
from sae.untrained import untrained_weights
from sae.weights import SAEWeights

from .baselines import Replacement, SAEReplacement, fit_pca

PCA_ROWS = 200_000  # of the store, spread evenly
SAMPLE_ROWS = 4096  # for the untrained SAE's scale

RowSource = Callable[[int], Iterable[np.ndarray]]  # at most so many unflagged training rows, chunk by chunk


def first_rows(parts: Iterable[np.ndarray], rows: int) -> Iterable[np.ndarray]:
    """The parts until there are `rows` rows."""
    for x_ND in parts:
        yield x_ND[:rows]
        rows -= len(x_ND)
        if rows <= 0:
            return


def fitted_baselines(
    weights: SAEWeights, rows: RowSource, seed: int, random_model: SAEWeights | None = None
) -> dict[str, Replacement]:
    """PCA with k components, an untrained SAE (of `seed`), and the SAE of a random model where there is one.

    ModelMismatchError where that one has another width or k.
    """
    sample_ND = np.concatenate(list(first_rows(rows(SAMPLE_ROWS), SAMPLE_ROWS)))[:SAMPLE_ROWS]
    untrained = untrained_weights(
        weights.d_in, weights.num_latents, weights.k, weights.mean_D, weights.variance, weights.hook,
        weights.host, seed, sample_ND=sample_ND,
    )  # fmt: skip
    found: dict[str, Replacement] = {
        "pca": fit_pca(rows(PCA_ROWS), min(weights.k, weights.d_in)),
        "untrained": SAEReplacement(untrained),
    }
    if other := random_model:
        same_k = other.k == weights.k or "threshold" in (other.variant, weights.variant)  # there k is what came out
        if other.d_in != weights.d_in or not same_k:
            raise ModelMismatchError(
                f"evaluate.random_sae: expected width {weights.d_in} and k={weights.k}, got {other.d_in} and k={other.k}"
            )
        found["random_model"] = SAEReplacement(dataclasses.replace(other, host=weights.host))
    return found
