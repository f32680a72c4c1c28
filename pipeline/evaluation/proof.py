"""How well an SAE of unknown origin does on rows of the model it is to be used with."""

from __future__ import annotations

import numpy as np

from sae.metrics import ReconstructionMetrics
from sae.runtime import decode, encode
from sae.weights import SAEWeights


def proof(weights: SAEWeights, probe_ND: np.ndarray, target_NO: np.ndarray) -> dict[str, float]:
    """How well the SAE reconstructs the probe: `fvu` (of a transcoder against what the model computed), `l0`, `rows`."""
    idx_NK, vals_NK = encode(weights, probe_ND)
    metrics = ReconstructionMetrics(weights.d_out, weights.num_latents)
    metrics.update(target_NO, decode(weights, idx_NK, vals_NK, probe_ND), idx_NK, vals_NK)
    found = metrics.result()
    return {key: found[key] for key in ("fvu", "l0", "rows")}
