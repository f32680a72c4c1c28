"""Run by the Python that has llamascopium and circuit-tracer. No ggscope here.

python circuit_files.py llamascopium|circuit_tracer FOLDER    SAEs saved by the library, each with rows and what the
library makes of the saved file (answers.npz)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

D, F, N, K = 16, 48, 64, 5
POST, MID, MLP = "blocks.4.hook_resid_post", "blocks.4.hook_resid_mid", "blocks.4.hook_mlp_out"


def shaken(module):
    """Weights as after training: no zeros, decoder rows of several norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return module


def rows(seed=1):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def llamascopium_cases():
    """(name, settings, whether the scales are folded into the weights, the file's name)"""
    for act_fn in ("relu", "jumprelu", "topk"):
        for by_norm in (True, False):
            settings = {"act_fn": act_fn, "sparsity_include_decoder_norm": by_norm}
            yield f"{act_fn}_{by_norm}", settings, False, "sae_weights.safetensors"
    yield "folded", {"act_fn": "jumprelu"}, True, "sae_weights.safetensors"
    yield "torch_file", {"act_fn": "jumprelu"}, False, "sae_weights.pt"
    yield "no_bias", {"act_fn": "jumprelu", "use_decoder_bias": False}, False, "sae_weights.safetensors"
    yield "transcoder", {"act_fn": "jumprelu", "hook_point_in": MID, "hook_point_out": MLP}, False, "sae_weights.pt"


def llamascopium(root):
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    x = rows()
    for name, settings, folded, file in llamascopium_cases():
        hooks = {"hook_point_in": POST, "hook_point_out": POST}
        config = SAEConfig(**{"d_model": D, "expansion_factor": F / D, "top_k": K} | hooks | settings)
        sae = shaken(SparseAutoEncoder(config))
        sae.set_dataset_average_activation_norm({config.hook_point_in: 9.0, config.hook_point_out: 7.0})
        if config.hook_point_in == config.hook_point_out:
            sae.set_dataset_average_activation_norm({config.hook_point_in: 9.0})
        folder = root / name
        folder.mkdir()
        if folded:
            sae.standardize_parameters_of_dataset_norm()
        sae.save_checkpoint(folder / file)
        config.save_hyperparameters(folder)
        with torch.no_grad():
            sae = SparseAutoEncoder.from_local(str(folder))
            batch, scales = sae.normalize_activations(
                {config.hook_point_in: x, config.hook_point_out: x}, return_scale_factor=True
            )
            acts = sae.encode(sae.prepare_input(batch)[0])
            made = {config.hook_point_out: sae.decode(acts)}
            x_hat = sae.denormalize_activations(made, scales)[config.hook_point_out]
            norm = sae.decoder_norm().numpy()
        np.savez(folder / "answers.npz", x=x.numpy(), acts=acts.numpy(), x_hat=x_hat.numpy(), norm=norm)


def circuit_tracer(root):
    import yaml
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_transcoder_set,
    )

    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    for name, thresholds, skip, dtype in (
        ("relu", False, False, torch.float32), ("threshold", True, False, torch.float32), ("skip", False, True, torch.float32),
        ("threshold_skip_bfloat16", True, True, torch.bfloat16),
    ):  # fmt: skip
        made = {}
        for layer in range(3):
            function = JumpReLU(torch.rand(F, generator=torch.Generator().manual_seed(2)).to(dtype), 0.1)
            activation = function if thresholds else torch.nn.functional.relu
            transcoder = SingleLayerTranscoder(D, F, activation, layer, skip, device=torch.device("cpu"), dtype=dtype)
            made[layer] = shaken(transcoder)
            if thresholds:
                function.threshold.data.abs_()
        folder = root / name
        TranscoderSet(made, **hooks).to_safetensors(str(folder))
        config = {"model_kind": "transcoder_set", "model_name": "org/model", **hooks}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in made}
        with torch.no_grad():
            read = load_transcoder_set(paths, "", **hooks, device=torch.device("cpu"), dtype=torch.float32)
            x = torch.stack([rows(layer) for layer in made])
            acts = read.encode(x)
            x_hat = read.decode(acts, x)
        for layer in made:
            answers = {"x": x[layer].numpy(), "acts": acts[layer].numpy(), "x_hat": x_hat[layer].numpy()}
            np.savez(folder / f"answers_{layer}.npz", **answers)


{"llamascopium": llamascopium, "circuit_tracer": circuit_tracer}[sys.argv[1]](Path(sys.argv[2]))
