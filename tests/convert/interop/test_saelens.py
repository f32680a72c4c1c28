"""SAELens folders of version 6 and before against its equations in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from sae.errors import FormatError

from .oracles import F, draw, f8, imported, jump, layer_norm, relu, same, topk, write

HOOK = "blocks.3.hook_resid_post"


def config(architecture, **more):
    metadata = {"hook_name": HOOK, "model_name": "gpt2", "sae_lens_version": "6.54.12"}
    base = {"architecture": architecture, "d_in": 12, "d_sae": F, "apply_b_dec_to_input": True, "metadata": metadata}
    return base | {"normalize_activations": "none", "reshape_activations": "none"} | more


def tensors(a, **more):
    return {"W_enc": a["W_enc_FD"].T, "b_enc": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"]} | more


def folder(path, settings, arrays):
    return write(path / "sae", "cfg.json", settings, "sae_weights.safetensors", arrays)


def pre(a, subtract=True):
    x, W, b, b_dec = f8(a["x"], a["W_enc_FD"], a["b_enc"], a["b_dec"])
    return (x - b_dec * subtract) @ W.T + b


def out(a, acts):
    W, b = f8(a["W_dec_FD"], a["b_dec"])
    return acts @ W + b


@pytest.mark.parametrize("subtract", [True, False])
def test_a_standard_sae_is_relu(tmp_path, subtract):
    a = draw()
    found = imported(folder(tmp_path, config("standard", apply_b_dec_to_input=subtract), tensors(a)))
    acts = relu(pre(a, subtract))
    same(found.weights, a["x"], acts, out(a, acts))
    assert (found.format, found.weights.hook, found.k_known) == ("saelens", HOOK, False)
    assert found.weights.host == {"name": "gpt2", "n_embd": 12}


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_compares_with_decoder_norms_where_the_config_says_so(tmp_path, rescale):
    a = draw()
    settings = config("topk", k=5, rescale_acts_by_decoder_norm=rescale)
    w = imported(folder(tmp_path, settings, tensors(a))).weights
    norm = np.linalg.norm(a["W_dec_FD"].astype("f8"), axis=1) if rescale else np.ones(F)
    acts = topk(relu(pre(a) * norm), 5)
    same(w, a["x"], acts, out(a, acts / norm))
    assert w.k == 5


@pytest.mark.parametrize("logarithm", [True, False])
def test_jumprelu_reads_thresholds_or_their_logarithms(tmp_path, logarithm):
    a = draw()
    a["threshold"][:4] = 0.05 if logarithm else -0.3  # a negative one means ReLU
    theirs = {"log_threshold": np.log(a["threshold"])} if logarithm else {"threshold": a["threshold"]}
    w = imported(folder(tmp_path, config("jumprelu"), tensors(a, **theirs))).weights
    acts = jump(pre(a), a["threshold"])
    same(w, a["x"], acts, out(a, acts))


def test_a_gate_becomes_thresholds_exactly(tmp_path):
    a, r = draw(), np.random.default_rng(5)
    gates = {name: (r.standard_normal(F) / 3).astype("f4") for name in ("r_mag", "b_gate", "b_mag")}
    arrays = tensors(a, **gates)
    del arrays["b_enc"]
    w = imported(folder(tmp_path, config("gated"), arrays)).weights
    z = pre(a) - a["b_enc"]
    r_mag, b_gate, b_mag = f8(*gates.values())
    acts = (z + b_gate > 0) * relu(np.exp(r_mag) * z + b_mag)
    same(w, a["x"], acts, out(a, acts))
    assert ((z + b_gate > 0) != (acts > 0)).any()
    assert ((np.exp(r_mag) * z + b_mag > 0) != (acts > 0)).any()  # both conditions bind somewhere


def test_a_checkpoint_of_batchtopk_uses_its_running_threshold(tmp_path):
    a = draw()
    settings = config("batchtopk", k=4, rescale_acts_by_decoder_norm=True)
    w = imported(folder(tmp_path, settings, tensors(a, topk_threshold=np.float32(0.6)))).weights
    norm = np.linalg.norm(a["W_dec_FD"].astype("f8"), axis=1)
    acts = jump(pre(a) * norm, np.float32(0.6))
    same(w, a["x"], acts, out(a, acts / norm))


def test_layer_norm_is_undone_after_decoding(tmp_path):
    a = draw()
    w = imported(folder(tmp_path, config("topk", k=6, normalize_activations="layer_norm"), tensors(a))).weights
    n, mu, sigma = layer_norm(a["x"].astype("f8"))
    acts = topk(relu((n - a["b_dec"]) @ a["W_enc_FD"].T.astype("f8") + a["b_enc"]), 6)
    same(w, a["x"], acts, out(a, acts) * sigma + mu)


def test_an_average_norm_is_folded_where_its_factor_is_there(tmp_path):
    a = draw()
    place = folder(
        tmp_path,
        config("jumprelu", normalize_activations="expected_average_only_in"),
        tensors(a, threshold=a["threshold"]),
    )
    found = imported(place)
    assert "the files do not say by how much" in found.notes[0]
    same(found.weights, a["x"], jump(pre(a), a["threshold"]), out(a, jump(pre(a), a["threshold"])))
    (place / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
    scaled = a | {"x": a["x"] * 0.4}
    acts = jump(pre(scaled), a["threshold"])
    same(imported(place).weights, a["x"], acts, out(a, acts) / 0.4)


def test_a_factor_that_saelens_knows_beside_the_files_is_folded_by_the_place_s_name(tmp_path):
    a, settings = draw(), config("standard", normalize_activations="expected_average_only_in")
    settings["metadata"]["hook_name"] = "blocks.9.hook_mlp_out"
    place = folder(tmp_path, settings, tensors(a))
    for repo, scale in (("somebody/else", 1), ("tommmcgrath/gpt2-small-mlp-out-saes", 0.695534)):
        found = imported(place, label=f"{repo}/sae_group_gpt2_blocks.9.hook_mlp_out_24576:v0")
        x = (a["x"] - (a["x"].mean(1, keepdims=True) if scale != 1 else 0)) * scale  # and its rows were centred
        acts = relu(pre(a | {"x": x}))
        same(found.weights, a["x"], acts, out(a, acts) / scale)


@pytest.mark.parametrize("where", ["settings", "name", "nowhere"])
@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_centred_writing_weights_are_folded_into_the_encoder(tmp_path, where, kind):
    a = draw()
    a["x"] += np.linspace(-2, 3, len(a["x"]), dtype="f4")[:, None]  # a mean that differs from row to row
    settings = config(kind, k=5)
    if where == "settings":
        settings["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    label = "jbloom/GPT2-Small-SAEs-Reformatted/blocks.3.hook_resid_post" if where == "name" else "a/b"
    found = imported(folder(tmp_path, settings, tensors(a)), label=label)
    x = a["x"] - a["x"].mean(1, keepdims=True) if where != "nowhere" else a["x"]
    acts = relu(pre(a | {"x": x}))
    acts = topk(acts, 5) if kind == "topk" else acts
    same(found.weights, a["x"], acts, out(a, acts))
    assert ["centred" in note for note in found.notes] == [True] * (where != "nowhere")


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_reads_one_point_and_gives_another(tmp_path, skip):
    a, r = draw(), np.random.default_rng(2)
    W_dec, b_dec, W_skip = (r.standard_normal(s).astype("f4") for s in ((F, 7), (7,), (7, 12)))
    arrays = tensors(a, W_dec=W_dec, b_dec=b_dec, threshold=a["threshold"]) | ({"W_skip": W_skip} if skip else {})
    settings = config(
        "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder", d_out=7, apply_b_dec_to_input=False
    )
    settings["metadata"] |= {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"}
    w = imported(folder(tmp_path, settings, arrays)).weights
    acts = jump(pre(a, subtract=False), a["threshold"])
    wanted = acts @ W_dec.astype("f8") + b_dec + (a["x"].astype("f8") @ W_skip.T if skip else 0)
    same(w, a["x"], acts, wanted)
    assert (w.hook, w.hook_out) == ("blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out")


def test_the_flat_configs_of_before_version_6(tmp_path):
    a = draw()
    flat = {
        "d_in": 12, "d_sae": F, "hook_point": HOOK, "hook_point_head_index": None, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 7}, "model_name": "gpt2-small", "normalize_activations": False,
        "finetuning_scaling_factor": True,
    }  # fmt: skip
    factor = np.random.default_rng(1).uniform(0.5, 2, F).astype("f4")
    w = imported(folder(tmp_path, flat, tensors(a, scaling_factor=factor))).weights
    acts = topk(relu(pre(a)), 7)
    same(w, a["x"], acts, out(a, acts * factor.astype("f8")))
    flat["finetuning_scaling_factor"] = False
    with pytest.raises(FormatError, match="scaling_factor"):
        imported(folder(tmp_path, flat, tensors(a, scaling_factor=factor)))


def test_log_frequencies_are_read(tmp_path):
    a = draw()
    place = folder(tmp_path, config("standard"), tensors(a))
    save_file({"sparsity": np.linspace(-9, -1, F, dtype="f4")}, place / "sparsity.safetensors")
    found = imported(place)
    np.testing.assert_allclose(found.weights.freq_F, 10.0 ** np.linspace(-9, -1, F), rtol=1e-4)
    assert found.published == {"l0": pytest.approx((10.0 ** np.linspace(-9, -1, F)).sum(), rel=1e-4)}


@pytest.mark.parametrize(("change", "said"), [
    ({"architecture": "temporal"}, "'temporal' is not read"),
    ({"normalize_activations": "constant_norm_rescale"}, "cannot be folded"),
    ({"metadata": {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 3}}, "one head"),
    ({"metadata": {"hook_name": "blocks.1.ln2.hook_scale"}}, "convert.hook="),
    ({"metadata": {}}, "do not say which hook point"),
    ({"architecture": "topk", "k": 0}, "from 1 to 40"),
    ({"architecture": "topk", "k": F + 1}, "from 1 to 40"),
    ({"architecture": "jumprelu"}, "no tensor 'threshold'"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(tmp_path, change, said):
    place = folder(tmp_path, config("standard") | change, tensors(draw()))
    with pytest.raises(FormatError, match=said):
        imported(place)


@pytest.mark.parametrize(
    ("left_out", "prepended", "expected"),
    [(True, True, True), (True, False, True), (False, True, False), (False, False, None), ([1, 2], True, None), (None, True, None)],
)  # fmt: skip
def test_whether_special_tokens_were_left_out_is_kept_where_the_settings_say_it(
    tmp_path, left_out, prepended, expected
):
    settings = config("standard", prepend_bos=prepended)
    if left_out is not None:
        settings["exclude_special_tokens"] = left_out
    training = imported(folder(tmp_path, settings, tensors(draw()))).weights.training
    assert training.get("bos_excluded") is expected
    assert training["prepend_bos"] is prepended


def test_a_named_hook_wins(tmp_path):
    place = folder(tmp_path, config("standard", metadata={"hook_name": "somewhere"}), tensors(draw()))
    assert imported(place, hook="blocks.1.hook_mlp_out").weights.hook == "blocks.1.hook_mlp_out"
    with pytest.raises(FormatError, match="expected a hook point"):
        imported(place, hook="nowhere")
