"""A local stand-in for the hub: repositories in the cache's own layout, one SAE of every published format in them.

The places are named as the publishers name theirs; the numbers are drawn. `saelens` names the loader of SAELens that
reads the same place, where there is one that computes what the format's own library does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from .oracles import D, F, draw

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(kw_only=True)
class Place:
    repo: str
    inside: str  # the folder or the file that the address names
    format: str
    hook: str
    files: dict[str, Any]  # below the repository: dict of arrays by suffix, or a plain object for JSON and text
    hook_out: str = ""
    model: str = ""
    saelens: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)  # of SAELens's config, which has the real widths
    scale: float = 1.0  # SAELens's activations are these times ours

    @property
    def address(self) -> str:
        return f"hf://{self.repo}/{self.inside}"


def write_cache(root, places):
    """`root` as HF_HOME."""
    for place in places:
        cache = root / "hub" / f"models--{place.repo.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / "main").write_text(COMMIT)
        for name, content in place.files.items():
            path = cache / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)


def write_file(path, content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file({k: np.ascontiguousarray(v, "f4") for k, v in content.items()}, path)
    elif path.suffix in (".pt", ".pth"):
        tensors = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in content.items()}
        torch.save(tensors, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def places():
    a = draw()
    unit = a["W_dec_FD"] / np.linalg.norm(a["W_dec_FD"], axis=1, keepdims=True)
    biases = {"b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    upper = {"W_enc": a["W_enc_FD"].T, "W_dec": a["W_dec_FD"], **biases}
    npz = upper | {"threshold": a["threshold"]}
    lower = {"w_enc": upper["W_enc"], "w_dec": upper["W_dec"], **biases, "threshold": a["threshold"]}
    size = {"d_in": D, "d_sae": F}
    found = gemma(a, npz, lower, size)
    found += linear_files(a, unit, size)
    skip = np.random.default_rng(4).standard_normal((D, D)).astype("f4")
    rows = {"W_enc": a["W_enc_FD"], "W_dec": a["W_dec_FD"], **biases}
    wandb = "\n".join(
        f"{key}:\n  value: {value}" for key, value in (("d_model", D), ("d_feature", F), ("batch_size", 1))
    )
    circuit = {
        "wandb-config.yaml": wandb,
        "config.yaml": 'model_name: "Qwen/Qwen3-4B"\nfeature_input_hook: mlp.hook_in\n',
    }
    across = {"hook": "ggml:ffn_norm-3", "hook_out": "blocks.3.hook_mlp_out", "format": "circuit_tracer"}
    found += [
        Place(
            repo="mwhanna/qwen3-4b-transcoders", inside="layer_3.safetensors", model="Qwen/Qwen3-4B", saelens="mwhanna_transcoder",
            files=circuit | {"layer_3.safetensors": rows}, overrides=size | {"d_out": D}, **across,
        ),
        Place(
            repo="mntss/skip-transcoders", inside="layer_3.safetensors",
            files={"layer_3.safetensors": rows | {"W_skip": skip, "activation_function.threshold": a["threshold"]}}, **across,
        ),
        saelens_folder(upper, size),
        Place(
            repo="EleutherAI/sae-llama-3-8b-32x", inside="layers.10", format="sparsify", hook="blocks.10.hook_resid_post",
            files={
                "layers.10/cfg.json": {"d_in": D, "num_latents": 0, "k": 5, "expansion_factor": 32},
                "layers.10/sae.safetensors": {
                    "encoder.weight": a["W_enc_FD"], "encoder.bias": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"],
                },
            },
        ),
    ]  # fmt: skip
    return found


def gemma(a, npz, lower, size):
    at, skip_DO = "layer_20/width_16k/average_l0_71", np.random.default_rng(5).standard_normal((D, D)).astype("f4")
    one = {"format": "gemma_scope", "model": "google/gemma-2-2b", "saelens": "gemma_2"}
    two = {"format": "gemma_scope_2", "model": "google/gemma-3-1b-pt", "saelens": "gemma_3", "overrides": size}
    post, across = "resid_post/layer_7_width_16k_l0_small", "transcoder/layer_7_width_16k_l0_small_affine"
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.7.output",
    }
    affine = config | {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output", "affine_connection": True,
    }  # fmt: skip
    mlp = "mlp_out/layer_5_width_16k_l0_small"
    return [
        Place(repo="google/gemma-scope-2b-pt-res", inside=at, hook="blocks.20.hook_resid_post", files={f"{at}/params.npz": npz}, overrides=size, **one),
        Place(repo="google/gemma-scope-2b-pt-att", inside=at, hook="blocks.20.attn.hook_z", files={f"{at}/params.npz": npz}, overrides=size | {"reshape_activations": "none"}, **one),
        Place(
            repo="google/gemma-scope-2b-pt-transcoders", inside=at, hook="blocks.20.ln2.hook_normalized", hook_out="blocks.20.hook_mlp_out",
            files={f"{at}/params.npz": npz}, overrides=size | {"d_out": D}, **one | {"saelens": "gemma_2_transcoder"},
        ),
        Place(repo="google/gemma-scope-2-1b-pt", inside=post, hook="blocks.7.hook_resid_post", files={f"{post}/params.safetensors": lower, f"{post}/config.json": config}, **two),
        Place(
            repo="google/gemma-scope-2-1b-pt", inside=across, hook="ggml:ffn_norm-7", hook_out="blocks.7.hook_mlp_out",
            files={f"{across}/params.safetensors": lower | {"affine_skip_connection": skip_DO}, f"{across}/config.json": affine},
            **two | {"overrides": size | {"d_out": D}},
        ),
        Place(repo="google/gemma-scope-2-1b-pt", inside=mlp, hook="blocks.5.hook_mlp_out", files={f"{mlp}/params.safetensors": lower}, **two),
    ]  # fmt: skip


def linear_files(a, unit, size):
    def layers(form, decoder=a["W_dec_FD"]):
        return {
            form.format("encoder", "weight"): a["W_enc_FD"], form.format("encoder", "bias"): a["b_enc"],
            form.format("decoder", "weight"): decoder.T, form.format("decoder", "bias"): a["b_dec"],
        }  # fmt: skip

    good, distill = "Llama-3.1-8B-Instruct-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    hook = "blocks.15.hook_resid_post"
    points = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "d_sae": F}
    scope = points | {
        "act_fn": "jumprelu", "jump_relu_threshold": 0.25, "sparsity_include_decoder_norm": True, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 10.8125, "out": 10.8125},
    }  # fmt: skip
    maths = points | {
        "expansion_factor": 1, "act_fn": "jumprelu", "norm_activation": "inference", "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    r1 = "800M-Slimpajama-0-OpenR1-Math-220k/L15R"
    topk = {"activation": "TopK", "activation_state_dict": {"k": 4}}
    openai = {
        "pre_bias": a["b_dec"],
        "latent_bias": a["b_enc"],
        "encoder.weight": a["W_enc_FD"],
        "decoder.weight": a["W_dec_FD"].T,
    }
    trainer = {
        "dict_class": "JumpReluAutoEncoder",
        "layer": 8,
        "lm_name": "EleutherAI/pythia-160m",
        "activation_dim": D,
        "dict_size": F,
    }
    jump = {
        "W_enc": a["W_enc_FD"].T,
        "W_dec": a["W_dec_FD"],
        "b_enc": a["b_enc"],
        "b_dec": a["b_dec"],
        "threshold": a["threshold"],
    }
    two = {"W_E": a["W_enc_FD"].T, "b_E": a["b_enc"], "W_D": a["W_dec_FD"], "b_D": a["b_dec"]}
    two |= {
        f"dataset_average_activation_norm.{hook}": np.float32(9),
        "activation_function.log_jumprelu_threshold": np.log(a["threshold"]),
    }
    open_file = "v5_32k/resid_post_mlp_v5_32k/autoencoders/6.pt"
    return [
        Place(repo=f"Goodfire/{good}", inside=f"{good}.pth", format="goodfire", hook="blocks.19.hook_resid_post", files={f"{good}.pth": layers("{}_linear.{}")}, model="meta-llama/Llama-3.1-8B-Instruct", saelens="goodfire", overrides=size),
        Place(repo=f"qresearch/{distill}", inside=f"{distill}.pt", format="r1_distill", hook="blocks.19.hook_resid_post", files={f"{distill}.pt": layers("{}.{}")}, model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", saelens="deepseek_r1", overrides=size),
        Place(
            repo="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6", inside="layer3.sae.pt", format="qwen_scope", hook="blocks.3.hook_resid_post",
            files={"layer3.sae.pt": {"W_enc": a["W_enc_FD"], "W_dec": a["W_dec_FD"].T, "b_enc": a["b_enc"], "b_dec": a["b_dec"]}},
            model="Qwen/Qwen3-1.7B-Base", saelens="qwen_scope", overrides=size,
        ),
        Place(  # rows of norm 1: where they are not, SAELens leaves the decoder's norms out
            repo="fnlp/Llama3_1-8B-Base-LXR-8x", inside="Llama3_1-8B-Base-L15R-8x", format="llama_scope", hook=hook,
            files={"Llama3_1-8B-Base-L15R-8x/hyperparams.json": scope, "Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors": layers("{}.{}", unit)},
            model="meta-llama/Llama-3.1-8B", saelens="llama_scope", scale=float(np.sqrt(D) / 10.8125),
        ),
        Place(
            repo="fnlp/Llama-Scope-R1-Distill", inside=r1, format="llamascopium", hook=hook, saelens="llama_scope_r1_distill", overrides=size,
            files={f"{r1}/config.json": maths, f"{r1}/sae_weights.safetensors": layers("{}.{}", unit) | {"log_jumprelu_threshold": np.log(a["threshold"])}},
        ),
        Place(
            repo="OpenMOSS-Team/Llama-Scope-2", inside="L15R", format="llamascopium", hook=hook,
            files={"L15R/config.json": points | {"act_fn": "jumprelu", "sae_type": "sae"}, "L15R/lm_config.json": {}, "L15R/sae_weights.safetensors": two},
        ),
        Place(repo="somebody/gpt2-openai", inside=open_file, format="openai", hook="blocks.6.hook_resid_post", files={open_file: openai | topk}, model="openai-community/gpt2"),
        Place(
            repo="canrager/lm_sae", inside="pythia/resid_post_layer_8/trainer_0", format="dictionary_learning", hook="blocks.8.hook_resid_post",
            files={"pythia/resid_post_layer_8/trainer_0/config.json": {"trainer": trainer, "buffer": {"ctx_len": 128}}, "pythia/resid_post_layer_8/trainer_0/ae.pt": jump},
            model="EleutherAI/pythia-160m", saelens="dictionary_learning_1",
        ),
    ]  # fmt: skip


def saelens_folder(upper, size):
    """Version 5, flat."""
    old = size | {
        "hook_point": "blocks.8.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "dtype": "float32",
        "model_name": "gpt2-small", "normalize_activations": "none", "architecture": "standard", "device": "cpu",
    }  # fmt: skip
    at = "blocks.8.hook_resid_pre"
    return Place(
        repo="jbloom/GPT2-Small-SAEs",
        inside=at,
        format="saelens",
        hook=at,
        model="gpt2-small",
        saelens="sae_lens",
        files={f"{at}/cfg.json": old, f"{at}/sae_weights.safetensors": upper},
    )
