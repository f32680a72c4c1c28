"""The tokens a decoder row promotes and demotes, read through the model's own final norm and unembedding.

D width, V vocabulary, P promoted tokens.
"""

from __future__ import annotations

import numpy as np

from pipeline.llama.unembed import Unembedding


def direct_effect(unembedding: Unembedding, direction_D: np.ndarray) -> np.ndarray:
    """Change of the logits if `direction` reached the final norm directly, less its mean over the vocabulary.

    RMS norm: W_U (g * d) up to the factor 1 / rms(x), which is positive and the same for every token; layer norm
    also takes the mean of d away first. Subtracting the mean changes nothing after the softmax. float64 (V,).
    """
    d = direction_D.astype(np.float64)
    if unembedding.kind == "layer":
        d = d - d.mean()
    effect_V = unembedding.W_VD @ (d * unembedding.weight_D).astype(np.float32) * float(unembedding.scale)
    effect_V = effect_V.astype(np.float64)
    return effect_V - effect_V.mean()


def extremes(effect_V: np.ndarray, count: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(the `count` tokens promoted most, the `count` demoted most), strongest first; `exclude` marks tokens to skip."""
    order = np.lexsort((np.arange(len(effect_V)), -effect_V))
    if exclude is not None:
        order = order[~exclude[order]]
    return order[:count], order[::-1][:count]
