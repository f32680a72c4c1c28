"""Run by the libraries' own Python. No ggscope here.

python peer_files.py write FOLDER     every class saved by its library, with rows and what it makes of them (answers.npz)
python peer_files.py read FOLDER      loads FOLDER/*/ as SAELens or sparsify SAEs, answers on FOLDER/rows.npz
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU
D, F, N, K = 12, 40, 64, 5


def shaken(module):
    """Weights as after training: no zeros, decoder rows of several norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) / 3)
            if name == "threshold":
                p.abs_()
    return module


def save_answers(folder, x, acts, x_hat):
    np.savez(folder / "answers.npz", x=x.numpy(), acts=acts.detach().numpy(), x_hat=x_hat.detach().numpy())


def saelens_cases():
    from sae_lens.saes import gated_sae, jumprelu_sae, standard_sae, topk_sae, transcoder

    hook = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"}
    across = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    one = {"d_in": D, "d_sae": F}
    two = one | {"d_out": 7, "apply_b_dec_to_input": False}
    yield "standard", standard_sae.StandardSAE, standard_sae.StandardSAEConfig(**one), hook
    yield "no_b_dec", standard_sae.StandardSAE, standard_sae.StandardSAEConfig(**one, apply_b_dec_to_input=False), hook
    yield "topk", topk_sae.TopKSAE, topk_sae.TopKSAEConfig(**one, k=K), hook
    yield "topk_norm", topk_sae.TopKSAE, topk_sae.TopKSAEConfig(**one, k=K, rescale_acts_by_decoder_norm=True), hook
    yield (
        "topk_layer_norm",
        topk_sae.TopKSAE,
        topk_sae.TopKSAEConfig(**one, k=K, normalize_activations="layer_norm"),
        hook,
    )
    yield "jumprelu", jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig(**one), hook
    yield "gated", gated_sae.GatedSAE, gated_sae.GatedSAEConfig(**one), hook
    yield "transcoder", transcoder.Transcoder, transcoder.TranscoderConfig(**two), across
    yield "skip", transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig(**two), across
    yield "jump_transcoder", transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig(**two), across


def write_saelens(root, x):
    from sae_lens.saes.sae import SAEMetadata

    for name, kind, config, metadata in saelens_cases():
        config.metadata = SAEMetadata(**metadata)
        sae = shaken(kind(config))
        folder = root / f"saelens_{name}"
        sae.save_model(folder)
        save_answers(folder, x, sae.encode(x), sae(x))


def dense(top):
    acts = torch.zeros(N, F)
    return acts.scatter_(1, top.top_indices, top.top_acts)


def write_sparsify(root, x):
    from sparsify import SparseCoder, SparseCoderConfig

    for name, module, settings in (
        ("topk", "layers.3", {}), ("groupmax", "layers.3", {"activation": "groupmax"}),
        ("transcode", "layers.3.mlp", {"transcode": True, "skip_connection": True}),
    ):  # fmt: skip
        sae = shaken(SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **settings), dtype=torch.float32))
        folder = root / f"sparsify_{name}" / module
        sae.save_to_disk(folder)
        with torch.no_grad():
            save_answers(folder, x, dense(sae.encode(x)), sae(x).sae_out)


def write_dictionary_learning(root, x):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    made = {
        "AutoEncoder": dictionary.AutoEncoder(D, F), "AutoEncoderNew": dictionary.AutoEncoderNew(D, F),
        "GatedAutoEncoder": dictionary.GatedAutoEncoder(D, F), "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": top_k.AutoEncoderTopK(D, F, K), "BatchTopKSAE": batch_top_k.BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, K, [10, 30]),
    }  # fmt: skip
    for name, sae in made.items():
        shaken(sae)
        if "BatchTopK" in name:
            sae.threshold.fill_(0.5)
        if hasattr(sae, "scale_biases"):
            sae.scale_biases(1.5)
        folder = root / f"dictionary_learning_{name}"
        folder.mkdir()
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "layer": 2, "lm_name": "m", "submodule_name": "resid_post_layer_2", "k": K}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        save_answers(folder, x, sae.encode(x), sae(x))


def read(root):
    from sae_lens.saes.sae import SAE
    from sparsify import SparseCoder

    x = torch.from_numpy(np.load(root / "rows.npz")["x"])
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        with torch.no_grad():
            if (folder / "sae_weights.safetensors").exists():
                sae = SAE.load_from_disk(folder)
                save_answers(folder, x, sae.encode(x), sae(x))
            else:
                sae = SparseCoder.load_from_disk(folder)
                save_answers(folder, x, dense(sae.encode(x)), sae(x).sae_out)


def main():
    root = Path(sys.argv[2])
    if sys.argv[1] == "read":
        read(root)
        return
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    for part in (write_saelens, write_sparsify, write_dictionary_learning):
        part(root, x)


main()
