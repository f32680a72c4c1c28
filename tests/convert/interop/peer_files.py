"""Run by the libraries' own Python. No ggscope here.

python peer_files.py write FOLDER     every class saved by its library, with rows and what it makes of them (answers.npz)
python peer_files.py load FOLDER      the SAEs of FOLDER/tasks.json by SAELens's loaders, from the hub's cache
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


def write_trained_saelens(root, x):
    """Training SAEs as SAELens saves them when a run ends: what is left of batchtopk and matryoshka is a threshold."""
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae
    from sae_lens.saes.sae import SAE, SAEMetadata

    for name, kind, config in (
        ("batchtopk", batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)),
        ("scaled_batchtopk", batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, normalize_activations="expected_average_only_in")),
        ("matryoshka", matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, matryoshka_widths=[10, 40])),
    ):  # fmt: skip
        config.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="gpt2")
        sae = shaken(kind(config))
        sae.topk_threshold.fill_(0.6)
        if name.startswith("scaled"):
            sae.fold_activation_norm_scaling_factor(0.4)
        folder = root / f"saelens_{name}"
        sae.save_inference_model(folder)
        with torch.no_grad():
            made = SAE.load_from_disk(folder)
            save_answers(folder, x, made.encode(x), made(x))


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


def trainers():
    from dictionary_learning.trainers import (
        batch_top_k,
        gated_anneal,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        p_anneal,
        standard,
        top_k,
    )  # fmt: skip

    k, batch_k = {"k": K}, {"k": K, "threshold_start_step": 3, "threshold_beta": 0.5}
    ramp = {"sparsity_warmup_steps": 2}
    anneal = {"anneal_start": 5, "anneal_end": 11, "p_end": 0.2, "n_sparsity_updates": 2, **ramp}
    return {
        standard.StandardTrainer: ramp, standard.StandardTrainerAprilUpdate: ramp, p_anneal.PAnnealTrainer: anneal,
        gdm.GatedSAETrainer: ramp, gated_anneal.GatedAnnealTrainer: anneal, jumprelu.JumpReluTrainer: ramp,
        top_k.TopKTrainer: k | {"threshold_start_step": 3}, batch_top_k.BatchTopKTrainer: batch_k,
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer: batch_k | {"group_fractions": [0.25, 0.75]},
    }  # fmt: skip


def write_trained(root, x):
    """A few steps of every trainer, saved by the library's own training loop with its rows' scale folded back."""
    import inspect

    from dictionary_learning.training import trainSAE

    common = {"activation_dim": D, "dict_size": F, "layer": 2, "lm_name": "m", "submodule_name": "resid_post_layer_2"}
    common |= {"steps": 12, "warmup_steps": 2, "lr": 1e-2, "device": "cpu", "seed": 0}
    configs = []
    for trainer, more in trainers().items():
        known = inspect.signature(trainer).parameters
        configs.append({"trainer": trainer, **{key: v for key, v in (common | more).items() if key in known}})
    names, generator = [trainer.__name__ for trainer in trainers()], torch.Generator().manual_seed(3)
    batches = [torch.randn(256, D, generator=generator) * 2 + 0.5 for _ in range(13)]
    trainSAE(batches, configs, 12, save_dir=root / "trained", normalize_activations=True, device="cpu")
    for i, name in enumerate(names):
        folder = (root / "trained" / f"trainer_{i}").rename(root / f"dictionary_learning_trained_{name}")
        sae = loaded_dictionary(folder)
        save_answers(folder, x, sae.encode(x), sae(x))


def loaded_dictionary(folder):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    kind = next(getattr(m, name) for m in (dictionary, top_k, batch_top_k, matryoshka_batch_top_k) if hasattr(m, name))
    keep = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    with torch.no_grad():
        return kind.from_pretrained(str(folder / "ae.pt"), device="cpu", **keep)


def load(root):
    """SAEs as `SAE.from_pretrained` makes them, with widths of our own; the answers in FOLDER/0, FOLDER/1, ..."""
    import warnings

    from huggingface_hub import hf_hub_download
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE
    from safetensors import safe_open

    def shapes(repo, name):  # SAELens asks the hub's server for them
        with safe_open(hf_hub_download(repo, name), "np") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    loaders.get_safetensors_tensor_shapes = shapes
    x = torch.from_numpy(np.load(root / "rows.npz")["x"])
    warnings.simplefilter("ignore")
    for i, task in enumerate(json.loads((root / "tasks.json").read_text())):

        def loader(cfg_overrides, task=task, **where):
            named = loaders.NAMED_PRETRAINED_SAE_LOADERS[task["loader"]]
            return named(cfg_overrides=cfg_overrides | task["overrides"], **where)

        with torch.no_grad():
            sae = SAE.from_pretrained(task["repo"], task["inside"], converter=loader)
            if task["loader"] == "llama_scope":  # its table of scales knows releases only
                sae.fold_activation_norm_scaling_factor(D**0.5 / 10.8125)
            (root / str(i)).mkdir()
            save_answers(root / str(i), x, sae.encode(x), sae(x))


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
    if sys.argv[1] in ("read", "load"):
        {"read": read, "load": load}[sys.argv[1]](root)
        return
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    for part in (write_saelens, write_trained_saelens, write_sparsify, write_dictionary_learning, write_trained):
        part(root, x)


main()
