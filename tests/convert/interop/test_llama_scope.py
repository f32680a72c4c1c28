"""Llama Scope and what came after it: dataset norms and decoder norms folded, against their equations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .oracles import F, draw, f8, imported, jump, relu, same, topk, write
from .test_formats import linear, pre


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("out_norm", [10.0, 4.0])
def test_llama_scope_is_folded_as_its_own_loader_did(tmp_path, by_norm, out_norm):
    a = draw()
    config = {
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post", "d_model": 12, "d_sae": F,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.35, "sparsity_include_decoder_norm": by_norm,
        "dataset_average_activation_norm": {"in": 10.0, "out": out_norm}, "norm_activation": "dataset-wise",
    }  # fmt: skip
    if out_norm != 10.0:
        config["hook_point_out"] = "blocks.15.hook_mlp_out"
    place = write(
        tmp_path / "L", "hyperparams.json", config, "checkpoints/final.safetensors", linear(a, "decoder.bias")
    )
    found = imported(place)
    W_enc, b_enc, W_dec, b_dec, x = f8(a["W_enc_FD"], a["b_enc"], a["W_dec_FD"], a["b_dec"], a["x"])
    s_in, s_out = np.sqrt(12) / 10.0, np.sqrt(12) / out_norm
    b_enc, b_dec, W_dec = b_enc / s_in, b_dec / s_out, W_dec * s_in / s_out
    if by_norm:
        m = np.linalg.norm(W_dec, axis=1)
        W_dec, W_enc, b_enc = W_dec / m[:, None], W_enc * m[:, None], b_enc * m
    acts = jump(x @ W_enc.T + b_enc, 0.35)
    same(found.weights, a["x"], acts, acts @ W_dec + b_dec)
    assert (found.format, found.weights.hook) == ("llama_scope", "blocks.15.hook_resid_post")
    assert bool(found.weights.hook_out) == (out_norm != 10.0)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("function", ["jumprelu", "topk", "relu"])
def test_llamascopium_and_r1_distill_llama_scope(tmp_path, old, by_norm, function):
    a, hook = draw(), "blocks.4.hook_resid_post"
    config = {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": 12, "act_fn": function, "top_k": 5,
        "sparsity_include_decoder_norm": by_norm, "norm_activation": "dataset-wise",
    }  # fmt: skip
    if old:
        arrays = linear(a, "decoder.bias")
        config["dataset_average_activation_norm"] = {"in": 9.0, "out": 9.0}
    else:
        arrays = {"W_E": a["W_enc_FD"].T, "b_E": a["b_enc"], "W_D": a["W_dec_FD"], "b_D": a["b_dec"]}
        arrays[f"dataset_average_activation_norm.{hook}"] = np.float32(9.0)
    if function == "jumprelu":
        arrays["log_jumprelu_threshold" if old else "activation_function.log_jumprelu_threshold"] = np.log(
            a["threshold"]
        )
    found = imported(write(tmp_path / "m", "config.json", config, "sae_weights.safetensors", arrays))
    scale = np.sqrt(12) / 9
    norm = np.linalg.norm(a["W_dec_FD"].astype("f8"), axis=1) if by_norm else np.ones(F)
    scored = pre(a | {"x": a["x"].astype("f8") * scale}) * norm
    chosen = {
        "jumprelu": lambda: jump(scored, a["threshold"].astype("f8")), "topk": lambda: topk(relu(scored), 5), "relu": lambda: relu(scored),
    }[function]()  # fmt: skip
    acts = chosen / norm
    ours = chosen if function == "topk" else acts  # ours keep the norm there
    same(found.weights, a["x"], ours, (acts @ a["W_dec_FD"].astype("f8") + a["b_dec"]) / scale)
    assert found.format == "llamascopium"
    if not old and function == "jumprelu":  # the same as a torch file
        (tmp_path / "m" / "sae_weights.safetensors").unlink()
        tensors = {key: torch.from_numpy(np.array(value, "f4")) for key, value in arrays.items()}
        torch.save({"sae": tensors, "version": "2.0"}, tmp_path / "m" / "sae_weights.pt")
        again = imported(tmp_path / "m")
        assert again.format == "llamascopium"
        same(again.weights, a["x"], ours, (acts @ a["W_dec_FD"].astype("f8") + a["b_dec"]) / scale)
