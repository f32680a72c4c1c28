"""Hand-made files of the documented shape of every other format, against that library's equations in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from convert.interop.registry import FORMATS, NAMES
from sae.errors import ConfigError, FormatError

from .oracles import F, draw, f8, imported, jump, layer_norm, relu, same, topk, write


def pre(a, b_dec=None):
    x, W, b = f8(a["x"], a["W_enc_FD"], a["b_enc"])
    return (x if b_dec is None else x - b_dec) @ W.T + b


def out(a, acts):
    W, b = f8(a["W_dec_FD"], a["b_dec"])
    return acts @ W + b


def torch_file(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}, path)
    return path


def test_gemma_scope_1_takes_layer_and_site_from_the_name(tmp_path):
    a = draw()
    place = tmp_path / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    names = {"W_enc": a["W_enc_FD"].T, "W_dec": a["W_dec_FD"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    np.savez(place / "params.npz", threshold=a["threshold"], **names)
    acts = jump(pre(a), a["threshold"])
    for path in (place, place / "params.npz"):
        found = imported(path)
        same(found.weights, a["x"], acts, out(a, acts))
        assert (found.format, found.weights.hook) == ("gemma_scope", "blocks.20.hook_resid_post")
        assert found.weights.host["name"] == "google/gemma-2-2b"
        assert found.published == {"l0": 71}
    sites = {"gemma-scope-9b-it-att": "attn.hook_z", "gemma-scope-9b-pt-mlp": "hook_mlp_out"}
    for repo, site in sites.items():
        w = imported(place, label=f"google/{repo}/layer_7/width_16k/average_l0_1").weights
        assert w.hook == f"blocks.7.{site}"
        assert ("n_embd" in w.host) == (site == "hook_mlp_out")  # heads side by side are not as wide as the model
    with pytest.raises(FormatError, match=r"convert\.hook="):
        imported(place, label="somebody/copy")


def test_gemma_scope_1_of_the_embedding_carries_the_model_s_scale(tmp_path):
    a = draw()
    names = {"W_enc": a["W_enc_FD"].T, "W_dec": a["W_dec_FD"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    np.savez(tmp_path / "params.npz", threshold=a["threshold"], **names)
    w = imported(tmp_path, label="google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6").weights
    root = np.sqrt(12.0)
    acts = jump(pre(a | {"x": a["x"] / root}), a["threshold"])
    same(w, a["x"], acts, out(a, acts) * root)


@pytest.mark.parametrize("affine", [True, False])
def test_gemma_scope_2_reads_hugging_face_s_hook_names(tmp_path, affine):
    a, skip_DO = draw(), np.random.default_rng(4).standard_normal((12, 12)).astype("f4")
    config = {
        "architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": affine,
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
    }  # fmt: skip
    arrays = {
        "w_enc": a["W_enc_FD"].T, "w_dec": a["W_dec_FD"], "b_enc": a["b_enc"], "b_dec": a["b_dec"],
        "threshold": a["threshold"],
    } | ({"affine_skip_connection": skip_DO} if affine else {})  # fmt: skip
    found = imported(write(tmp_path / "x", "config.json", config, "params.safetensors", arrays))
    acts = jump(pre(a), a["threshold"])
    same(found.weights, a["x"], acts, out(a, acts) + (a["x"].astype("f8") @ skip_DO if affine else 0))
    assert (found.format, found.weights.hook) == ("gemma_scope_2", "ggml:ffn_norm-7")
    assert found.weights.hook_out == "blocks.7.hook_mlp_out"


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_subtracts_b_dec_and_takes_the_size_from_the_tensor(tmp_path, activation):
    a = draw()
    config = {"d_in": 12, "num_latents": 0, "expansion_factor": 32, "k": 5, "activation": activation}
    arrays = {"encoder.weight": a["W_enc_FD"], "encoder.bias": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"]}
    place = write(tmp_path / "layers.10", "cfg.json", config, "sae.safetensors", arrays)
    values = relu(pre(a, a["b_dec"]))
    acts = topk(values, 5)
    if activation == "groupmax":
        groups = values.reshape(len(values), 5, F // 5)
        acts = (groups * (groups == groups.max(2, keepdims=True))).reshape(values.shape)
    found = imported(place)
    same(found.weights, a["x"], acts, out(a, acts))
    assert (found.format, found.weights.hook) == ("sparsify", "blocks.10.hook_resid_post")
    assert imported(place / "sae.safetensors", format_name="sparsify").weights.hook == found.weights.hook
    (place / "cfg.json").write_text(json.dumps({"d_in": 12, "activation": "topk"}))
    assert imported(place).weights.k == 32  # the library's default


def test_a_sparsify_transcoder_with_skip_reads_the_module_s_input(tmp_path):
    a, skip_OD = draw(), np.random.default_rng(4).standard_normal((12, 12)).astype("f4")
    arrays = {
        "encoder.weight": a["W_enc_FD"], "encoder.bias": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"], "W_skip": skip_OD,
    }  # fmt: skip
    for transcode, module in ((True, "layers.3.mlp"), (False, "layers.3")):
        config = {"d_in": 12, "k": 4, "transcode": transcode, "skip_connection": True}
        w = imported(write(tmp_path / module, "cfg.json", config, "sae.safetensors", arrays)).weights
        acts = topk(relu(pre(a, None if transcode else a["b_dec"])), 4)
        same(w, a["x"], acts, out(a, acts) + a["x"].astype("f8") @ skip_OD.T)
        hooks = ("ggml:ffn_norm-3", "blocks.3.hook_mlp_out") if transcode else ("blocks.3.hook_resid_post",) * 2
        assert (w.hook, w.hook_out) == hooks


def linear(a, b_dec):
    return {
        "encoder.weight": a["W_enc_FD"], "encoder.bias": a["b_enc"], "decoder.weight": a["W_dec_FD"].T.copy(), b_dec: a["b_dec"],
    }  # fmt: skip


def parameters(a):
    return {"W_enc": a["W_enc_FD"].T.copy(), "b_enc": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"]}


def gates(a):
    return {
        "encoder.weight": a["W_enc_FD"], "decoder.weight": a["W_dec_FD"].T.copy(), "decoder_bias": a["b_dec"],
        "r_mag": a["threshold"] - 0.4, "gate_bias": a["b_enc"], "mag_bias": a["b_enc"][::-1].copy(),
    }  # fmt: skip


def gated_acts(a):
    z = (a["x"].astype("f8") - a["b_dec"]) @ a["W_enc_FD"].T.astype("f8")
    return (z + a["b_enc"] > 0) * relu(np.exp((a["threshold"] - 0.4).astype("f4").astype("f8")) * z + a["b_enc"][::-1])


BUFFERS = {"k": torch.tensor(6, dtype=torch.int), "threshold": torch.tensor(0.5)}
DICTIONARIES = {
    "AutoEncoder": (lambda a: linear(a, "bias"), lambda a: relu(pre(a, a["b_dec"]))),
    "AutoEncoderNew": (lambda a: linear(a, "decoder.bias"), lambda a: relu(pre(a))),
    "AutoEncoderTopK": (lambda a: linear(a, "b_dec") | BUFFERS, lambda a: topk(relu(pre(a, a["b_dec"])), 6)),
    "BatchTopKSAE": (lambda a: linear(a, "b_dec") | BUFFERS, lambda a: jump(pre(a, a["b_dec"]), 0.5)),
    "MatryoshkaBatchTopKSAE": (
        lambda a: parameters(a) | BUFFERS | {"group_sizes": torch.tensor([10, 30])}, lambda a: jump(pre(a, a["b_dec"]), 0.5),
    ),
    "JumpReluAutoEncoder": (lambda a: parameters(a) | {"threshold": a["threshold"]}, lambda a: jump(pre(a), a["threshold"])),
    "GatedAutoEncoder": (gates, gated_acts),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_every_class_of_dictionary_learning(tmp_path, kind):
    a = draw()
    stored, acts = DICTIONARIES[kind][0](a), DICTIONARIES[kind][1](a)
    torch_file(tmp_path / "ae.pt", stored)
    trainer = {
        "dict_class": kind,
        "layer": 8,
        "lm_name": "EleutherAI/pythia-160m",
        "submodule_name": "resid_post_layer_8",
        "k": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    found = imported(tmp_path)
    same(found.weights, a["x"], acts, out(a, acts))
    assert (found.format, found.weights.hook) == ("dictionary_learning", "blocks.8.hook_resid_post")
    (tmp_path / "eval_results.json").write_text('{"l0": 58.5, "frac_variance_explained": 0.75, "frac_alive": 1e400}')
    assert (found.published, imported(tmp_path).published) == ({}, {"l0": 58.5, "fvu": 0.25})
    for odd in ('{"l0": 1e400, "frac_variance_explained": "much"}', '{"l0": NaN}', '{"frac_variance_explained": [1]}'):
        (tmp_path / "eval_results.json").write_text(odd)
        assert imported(tmp_path).published == {}
    assert found.weights.host["name"] == "EleutherAI/pythia-160m"
    if kind in (
        "AutoEncoder",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ):  # the tensors' names suffice
        (tmp_path / "config.json").unlink()
        again = imported(tmp_path, hook="blocks.8.hook_resid_post")
        same(again.weights, a["x"], acts, out(a, acts))


def test_an_interrupted_run_of_dictionary_learning_has_its_norm_factor_beside_it(tmp_path):
    a, factor = draw(), 3.0
    weights = {
        k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v
        for k, v in DICTIONARIES["BatchTopKSAE"][0](a).items()
    }
    torch.save({"step": 5, "ae": weights, "optimizer": {}, "config": {}, "norm_factor": factor}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "layer": 1}}))
    scaled = a | {name: a[name] * np.float32(factor) for name in ("b_enc", "b_dec")}  # the library's scale_biases
    acts = jump(pre(scaled, scaled["b_dec"]), 0.5 * factor)
    same(imported(tmp_path).weights, a["x"], acts, out(scaled, acts))


def test_a_threshold_that_was_never_set_lets_every_positive_latent_through(tmp_path):
    a = draw()
    torch_file(tmp_path / "ae.pt", linear(a, "b_dec") | BUFFERS | {"threshold": torch.tensor(-1.0)})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "layer": 1}}))
    found = imported(tmp_path)
    acts = relu(pre(a, a["b_dec"]))
    same(found.weights, a["x"], acts, out(a, acts))
    assert "never set" in found.notes[0]


@pytest.mark.parametrize(("version", "location", "hook"), [
    ("resid_post_mlp_v5_32k", "TopK", "blocks.6.hook_resid_post"), ("resid_delta_attn_v5_128k", "TopK", "blocks.6.hook_attn_out"),
    ("mlp_post_act", "ReLU", "blocks.6.mlp.hook_post"), ("resid_delta_mlp_v4", "ReLU", "blocks.6.hook_mlp_out"),
])  # fmt: skip
def test_openai_s_of_gpt2(tmp_path, version, location, hook):
    a, activation = draw(), location
    stored = {
        "pre_bias": a["b_dec"], "latent_bias": a["b_enc"], "encoder.weight": a["W_enc_FD"],
        "decoder.weight": a["W_dec_FD"].T.copy(), "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": activation,
    }  # fmt: skip
    if activation == "TopK":
        stored["activation_state_dict"] = {"k": 4}
    found = imported(torch_file(tmp_path / version / "autoencoders" / "6.pt", stored))
    if activation == "TopK":
        n, mu, sigma = layer_norm(a["x"].astype("f8"))
        acts = topk(relu((n - a["b_dec"]) @ a["W_enc_FD"].T.astype("f8") + a["b_enc"]), 4)
        same(found.weights, a["x"], acts, out(a, acts) * sigma + mu)
        assert (found.weights.norm_eps, found.weights.norm_correction) == (1e-5, 1)
    else:
        acts = relu(pre(a, a["b_dec"]))
        same(found.weights, a["x"], acts, out(a, acts))
    assert (found.format, found.weights.hook) == ("openai", hook)


def test_a_tied_openai_decoder_is_the_encoder_transposed(tmp_path):
    a = draw()
    stored = {"pre_bias": a["b_dec"], "latent_bias": a["b_enc"], "encoder.weight": a["W_enc_FD"]}
    found = imported(torch_file(tmp_path / "resid_delta_mlp" / "autoencoders" / "0.pt", stored))
    acts = relu(pre(a, a["b_dec"]))
    same(found.weights, a["x"], acts, acts @ a["W_enc_FD"].astype("f8") + a["b_dec"])
    assert "tied" in found.notes[0]


def test_goodfire_and_r1_distill_are_relu_on_raw_rows(tmp_path):
    a = draw()
    acts = relu(pre(a))
    layers = {"encoder": (a["W_enc_FD"], a["b_enc"]), "decoder": (a["W_dec_FD"].T.copy(), a["b_dec"])}
    for form, file, hook in (
        ("{}_linear.{}", "Llama-3.1-8B-Instruct-SAE-l19.pth", "blocks.19.hook_resid_post"),
        ("{}.{}", "DeepSeek-R1-Distill-Llama-8B-SAE-l37.pt", "blocks.37.hook_resid_post"),
    ):
        stored = {
            form.format(n, kind): v
            for n, pair in layers.items()
            for kind, v in zip(("weight", "bias"), pair, strict=True)
        }
        found = imported(torch_file(tmp_path / file, stored))
        same(found.weights, a["x"], acts, out(a, acts))
        assert found.weights.hook == hook
        (tmp_path / file).rename(torch_file(tmp_path / f"only-{hook}" / file, stored))
        assert imported(tmp_path / f"only-{hook}").weights.hook == hook  # a folder with that file alone
        assert found.weights.host["name"] in (
            "meta-llama/Llama-3.1-8B-Instruct",
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        )


def test_qwen_scope_has_its_k_in_the_repository_s_name(tmp_path):
    a = draw()
    stored = {"W_enc": a["W_enc_FD"], "W_dec": a["W_dec_FD"].T.copy(), "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    path = torch_file(tmp_path / "layer3.sae.pt", stored)
    found = imported(path, label="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6/layer3.sae.pt")
    acts = topk(relu(pre(a)), 6)
    same(found.weights, a["x"], acts, out(a, acts))
    assert (found.format, found.weights.hook, found.weights.k) == ("qwen_scope", "blocks.3.hook_resid_post", 6)
    assert found.weights.host["name"] == "Qwen/Qwen3-1.7B-Base"
    assert found.published == {"l0": 6}
    folder = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6"
    assert imported(tmp_path, label=folder).weights.hook == "blocks.3.hook_resid_post"
    with pytest.raises(FormatError, match="repository's name"):
        imported(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    a = draw()
    stored = {"W_enc": torch.from_numpy(a["W_enc_FD"]).mul(9).to(dtype), "W_dec": a["W_dec_FD"].T.copy()}
    path = torch_file(tmp_path / "layer3.sae.pt", stored | {"b_enc": a["b_enc"], "b_dec": a["b_dec"]})
    with pytest.raises(FormatError, match="'W_enc' holds whole numbers, expected floating-point ones"):
        imported(path, label="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6/layer3.sae.pt")


@pytest.mark.parametrize("form", ["relu", "threshold", "skip"])
def test_circuit_tracer_s_transcoders_say_their_layer_in_the_file_s_name(tmp_path, form):
    a, skip_OD = draw(), np.random.default_rng(4).standard_normal((12, 12)).astype("f4")
    arrays = {"W_enc": a["W_enc_FD"], "W_dec": a["W_dec_FD"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    arrays |= {"activation_function.threshold": a["threshold"]} if form == "threshold" else {}
    arrays |= {"W_skip": skip_OD} if form == "skip" else {}
    place = write(tmp_path / "qwen3-4b-transcoders", "", None, "layer_11.safetensors", arrays)
    for config, read, name in (
        ("", "ggml:ffn_norm-11", ""),
        ("feature_input_hook: hook_mlp_in\n# feature_output_hook: x\n", "blocks.11.hook_resid_mid", ""),
        ("feature_input_hook: ln2.hook_normalized\n", "blocks.11.ln2.hook_normalized", ""),
        ("model_name: Qwen/Qwen3-4B\nfeature_input_hook: 'hook_resid_mid'  # before the norm\ntranscoders:\n  - a: b\n", "blocks.11.hook_resid_mid", "Qwen/Qwen3-4B"),
    ):  # fmt: skip
        (place / "config.yaml").write_text(config)
        found = imported(place / "layer_11.safetensors")
        acts = jump(pre(a), a["threshold"]) if form == "threshold" else relu(pre(a))
        same(found.weights, a["x"], acts, out(a, acts) + (a["x"].astype("f8") @ skip_OD.T if form == "skip" else 0))
        assert (found.format, found.weights.hook, found.weights.hook_out) == (
            "circuit_tracer",
            read,
            "blocks.11.hook_mlp_out",
        )
        assert found.weights.host.get("name", "") == name
    (place / "config.yaml").write_text("feature_input_hook: ln2.hook_scale\n")
    with pytest.raises(
        FormatError, match=r"'blocks.11.ln2.hook_scale' has no counterpart here; name it with convert.hook="
    ):
        imported(place / "layer_11.safetensors")
    for text in (
        '"feature_input_hook": hook_resid_mid',
        '{"feature_input_hook": "hook_resid_mid", a: [1]}',
        "a: &a {feature_input_hook: x}\n<<: *a\nfeature_input_hook:\n  hook_resid_mid\nb:\n  feature_input_hook: x",
        "base_feature_input_hook: x\nfeature_input_hook: !!str hook_resid_mid\nfeature_output_hook: ~",
    ):
        (place / "config.yaml").write_text(text + "\n")
        found = imported(place / "layer_11.safetensors").weights
        assert (found.hook, found.hook_out) == ("blocks.11.hook_resid_mid", "blocks.11.hook_mlp_out")
    for text, why in (
        ("feature_input_hook: [a]", r"feature_input_hook should be a text, it is a sequence"),
        ("feature_input_hook: a\nfeature_input_hook: b", "feature_input_hook stands there twice"),
        ("- a", "should hold a mapping of names to settings"),
        ("a: [", "is not valid YAML"),
        ("a: *b", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("a: " + "x" * 300_000, "is larger than 256 KiB"),
    ):
        (place / "config.yaml").write_text(text + "\n")
        with pytest.raises(FormatError, match=why):
            imported(place / "layer_11.safetensors")


@pytest.mark.parametrize(("site", "hook", "hook_out"), [
    ("resid_post", "blocks.9.hook_resid_post", ""), ("attn_out_all", "blocks.9.attn.hook_z", ""), ("mlp_out", "blocks.9.hook_mlp_out", ""),
    ("transcoder", "ggml:ffn_norm-9", "blocks.9.hook_mlp_out"),
])  # fmt: skip
def test_gemma_scope_2_without_a_config_takes_the_site_from_the_name(tmp_path, site, hook, hook_out):
    a = draw()
    arrays = {
        "w_enc": a["W_enc_FD"].T,
        "w_dec": a["W_dec_FD"],
        "b_enc": a["b_enc"],
        "b_dec": a["b_dec"],
        "threshold": a["threshold"],
    }
    place = write(tmp_path / "x", "", None, "params.safetensors", arrays)
    w = imported(place, label=f"google/gemma-scope-2-4b-it/{site}/layer_9_width_16k_l0_medium").weights
    assert (w.hook, w.hook_out, w.host["name"]) == (hook, hook_out, "google/gemma-3-4b-it")
    with pytest.raises(FormatError, match=r"do not say which hook point it reads; name it with convert\.hook="):
        imported(place)


def test_formats_have_names_of_their_own_and_one_can_be_named():
    assert len(set(NAMES)) == len(FORMATS) == 12
    with pytest.raises(ConfigError, match="expected one of saelens"):
        imported(None, format_name="other")


def test_a_folder_of_nothing_known_is_one_line(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(FormatError, match="no SAE of a known format"):
        imported(tmp_path)
