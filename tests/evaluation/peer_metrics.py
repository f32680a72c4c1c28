"""Run by the peers' own Python: their metric functions on arrays of a file, as JSON. No ggscope here.

python peer_metrics.py arrays.npz: x_BTD, x_hat_BTD, acts_BTF (batches of windows of tokens).
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch


class FromFile:
    """Stands where these functions expect a model, an SAE and a store of tokens; it hands out the arrays batch by batch."""

    def __init__(self, arrays) -> None:
        self.x_BTD, self.x_hat_BTD, self.acts_BTF = (
            torch.from_numpy(arrays[k]) for k in ("x_BTD", "x_hat_BTD", "acts_BTF")
        )
        self.batch = -1
        hook = {"hook_name": "blocks.0.hook_resid_post", "hook_head_index": None}
        self.cfg = SimpleNamespace(
            d_sae=self.acts_BTF.shape[-1], hook_layer=0, metadata=SimpleNamespace(**hook), **hook
        )
        self.device, self.normalize_activations = torch.device("cpu"), "none"

    def get_batch_tokens(self, _prompts):
        self.batch += 1
        return torch.ones((1, self.x_BTD.shape[1]), dtype=torch.int64)

    def run_with_cache(self, *_args, **_kwargs):
        return None, {self.cfg.hook_name: self.x_BTD[self.batch][None]}

    def encode(self, _x):
        return self.acts_BTF[self.batch][None]

    def decode(self, _acts):
        return self.x_hat_BTD[self.batch][None]


def lens_like(module, arrays, **more):
    source = FromFile(arrays)
    function = module.get_sparsity_and_variance_metrics
    found, features = function(
        source, source, source, **more, n_batches=len(source.x_BTD), compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=1, model_kwargs={},
    )  # fmt: skip
    return found | {"feature_density": features["feature_density"]}


def dictionary_learning(arrays):
    source = FromFile(arrays)
    batches = iter(range(len(source.x_BTD)))

    class Dictionary:
        dict_size, activation_dim = source.cfg.d_sae, source.x_BTD.shape[-1]

        def __call__(self, _x, output_features):
            return source.x_hat_BTD[source.batch], source.acts_BTF[source.batch]

    def rows():
        for source.batch in batches:
            yield source.x_BTD[source.batch]

    evaluation = importlib.import_module("dictionary_learning.evaluation")
    return evaluation.evaluate(Dictionary(), rows(), n_batches=len(source.x_BTD))


def main(path):
    arrays = np.load(path)
    found = {}
    evals = importlib.import_module("sae_lens.evals")
    scaler = SimpleNamespace(scale=lambda x: x, unscale=lambda x: x)
    found["sae_lens"] = lens_like(evals, arrays, activation_scaler=scaler)
    found["dictionary_learning"] = dictionary_learning(arrays)
    try:
        bench = importlib.import_module("sae_bench.evals.core.main")
    except ImportError:
        bench = None
    if bench is not None:
        found["sae_bench"] = lens_like(bench, arrays)
        geometry = SimpleNamespace(W=torch.from_numpy(arrays["W_DF"]))
        found["sae_bench"]["max_cosine_sim"] = bench.calculate_max_cosine_sim(geometry.W).tolist()
        found["sae_bench"] |= bench.calculate_misc_metrics(
            {
                "max_encoder_cosine_sim": torch.zeros(1),
                "max_decoder_cosine_sim": torch.zeros(1),
                "feature_density": torch.tensor(found["sae_bench"]["feature_density"]),
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
