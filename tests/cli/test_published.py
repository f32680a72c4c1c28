"""`ggscope convert` on published SAEs: folders, files and the hub's cache; and out again to other libraries' folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.interop.registry import import_sae
from convert.sae_gguf import read_sae_gguf
from pipeline.stages.hub import parse_address
from pipeline.stages.published import is_named
from sae.errors import ConfigError
from sae.runtime import decode, encode

from .conftest import ggscope, last_line

FEW = [
    "corpus.max_documents=3",
    "convert.probe_tokens=500",
    "model.n_threads=1",
    "convert.encoder_type=F32",
    "convert.decoder_type=F32",
]
D, F = 256, 300


def published(folder, d=D, architecture="jumprelu", **more):
    """A random SAELens SAE of the demo model's width."""
    r = np.random.default_rng(0)
    W = r.standard_normal((F, d)).astype("f4")
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    arrays = {
        "W_enc": W.T.copy(),
        "b_enc": np.zeros(F, "f4"),
        "W_dec": W,
        "b_dec": np.zeros(d, "f4"),
        "threshold": np.full(F, 2, "f4"),
    }
    metadata = {"hook_name": "blocks.2.hook_resid_post", "model_name": "pylm", "sae_lens_version": "6.54.12"}
    folder.mkdir(parents=True)
    save_file(arrays, folder / "sae_weights.safetensors")
    config = {"architecture": architecture, "d_in": d, "d_sae": F, "metadata": metadata | more}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_a_saelens_folder_becomes_a_gguf_with_what_no_file_said_measured_on_the_probe(tmp_path):
    published(tmp_path / "theirs")
    done = ggscope("convert", "convert.source=theirs", "convert.export=saelens", "run_dir=out", *FEW, cwd=tmp_path)
    assert "saelens" in done.stdout
    w, theirs = read_sae_gguf(tmp_path / "out" / "sae.gguf"), import_sae(tmp_path / "theirs").weights
    x = np.random.default_rng(1).standard_normal((50, D)).astype("f4") * 3
    for found, wanted in zip(encode(w, x), encode(theirs, x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(decode(w, *encode(w, x)), decode(theirs, *encode(theirs, x)), rtol=1e-6)
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]
    assert w.k == max(1, round(metrics["l0"])) > 1
    assert w.variance > 1
    assert np.linalg.norm(w.mean_D) > 0
    assert w.host["name"] == "pylm"
    assert w.host["n_layer"] == 6
    assert w.training["imported_from"] == "saelens"
    assert "every text" not in done.stderr
    said = json.loads((tmp_path / "out" / "saelens" / "cfg.json").read_text())["metadata"]
    assert (said["prepend_bos"], said["context_size"]) == (True, 256)  # as the demo model's texts
    exported = load_file(tmp_path / "out" / "saelens" / "sae_weights.safetensors")
    np.testing.assert_array_equal(exported["W_dec"], theirs.W_dec_FD)
    ggscope(
        "apply",
        "sae.path=out/sae.gguf",
        "--prompt",
        "import os",
        "apply.max_tokens=2",
        "model.n_threads=1",
        cwd=tmp_path,
    )


def test_texts_that_start_otherwise_than_in_its_training_are_said(tmp_path):
    published(tmp_path / "theirs", prepend_bos=True)
    more = ["convert.source=theirs", "convert.export=saelens", *FEW]
    assert "every text" not in ggscope("convert", "run_dir=out", *more, cwd=tmp_path).stderr
    done = ggscope("convert", "run_dir=never", "corpus.bos=never", *more, cwd=tmp_path)
    said = " ".join(done.stderr.split())
    assert "its training put a BOS before every text, this model's texts get none; corpus.bos=always" in said
    assert read_sae_gguf(tmp_path / "never" / "sae.gguf").training["prepend_bos"] is True
    exported = json.loads((tmp_path / "never" / "saelens" / "cfg.json").read_text())["metadata"]
    assert exported["prepend_bos"] is False


def test_a_transcoder_is_measured_on_what_it_reconstructs(tmp_path):
    across = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    published(tmp_path / "theirs", architecture="jumprelu_transcoder", **across)
    ggscope("convert", "convert.source=theirs", "run_dir=out", *FEW, cwd=tmp_path)
    transcoder = read_sae_gguf(tmp_path / "out" / "sae.gguf")
    assert (transcoder.hook, transcoder.hook_out) == tuple(across.values())
    published(tmp_path / "at_out", hook_name="blocks.1.hook_mlp_out")
    ggscope("convert", "convert.source=at_out", "run_dir=out2", *FEW, cwd=tmp_path)
    at_out = read_sae_gguf(tmp_path / "out2" / "sae.gguf")  # its own rows are the transcoder's targets
    np.testing.assert_array_equal(transcoder.mean_D, at_out.mean_D)
    assert transcoder.variance == at_out.variance > 0
    ablate = ["intervention=ablate", "intervention.latents=[3]", "apply.max_tokens=2", "model.n_threads=1"]
    done = ggscope("apply", "sae.path=out/sae.gguf", *ablate, "--prompt", "import os", cwd=tmp_path)
    assert "out/sae.gguf at blocks.1.hook_resid_mid -> blocks.1.hook_mlp_out" in done.stdout


def test_an_sae_proves_itself_beside_what_its_publisher_says(tmp_path):
    """FVU and L0 of an SAE that is the identity, of one of another place, and of a transcoder, known in advance."""
    eye = np.concatenate([np.eye(D, dtype="f4"), -np.eye(D, dtype="f4")])
    arrays = {"W_enc": eye.T, "b_enc": np.zeros(2 * D, "f4"), "W_dec": eye, "b_dec": np.zeros(D, "f4")}
    hook = {"hook_name": "blocks.2.hook_resid_post", "model_name": "pylm", "sae_lens_version": "6.54.12"}
    config = {"architecture": "standard", "d_in": D, "d_sae": 2 * D, "metadata": hook}

    def proof(log10_share, changed, architecture="standard", **more):
        folder = tmp_path / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(
            {k: np.ascontiguousarray(v) for k, v in (arrays | changed).items()}, folder / "sae_weights.safetensors"
        )
        save_file({"sparsity": np.full(2 * D, log10_share, "f4")}, folder / "sparsity.safetensors")
        settings = config | {"architecture": architecture, "metadata": hook | more, "apply_b_dec_to_input": False}
        (folder / "cfg.json").write_text(json.dumps(settings))
        done = ggscope("convert", "convert.source=theirs", "run_dir=out", *FEW, cwd=tmp_path)
        shutil.move(tmp_path / "out" / "manifest.json", tmp_path / "manifest.json")
        shutil.rmtree(tmp_path / "out")
        metrics = json.loads((tmp_path / "manifest.json").read_text())["metrics"]
        return metrics["proof"], done.stdout + done.stderr

    found, said = proof(np.log10(0.5), {})  # x = relu(x) - relu(-x): every row whole, one of each pair fires
    assert found["fvu"] < 1e-10
    assert found["l0"] == pytest.approx(D, abs=1)
    assert found["published"]["l0"] == pytest.approx(D, rel=1e-3)
    assert f"FVU 0.0000 and L0 {found['l0']:.1f}; published: L0 256" in said
    assert "warning: it" not in said
    found, said = proof(np.log10(0.01), {"W_dec": -eye})  # x_hat = -x, five times sparser published
    assert found["fvu"] > 4
    assert "its files name" not in said
    assert "no better than their mean does and with an L0 far from the published one" in " ".join(said.split())
    across = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_resid_post"}
    residual, said = proof(np.log10(0.5), {}, "transcoder", **across | {"model_name": "meta-llama/Llama-3.1-8B"})
    assert "its files name the model meta-llama/Llama-3.1-8B, this one is pylm" in " ".join(said.split())
    nothing, _ = proof(np.log10(0.5), {"W_dec": 0 * eye}, "transcoder", **across)
    assert 1e-3 < residual["fvu"] < 1 < nothing["fvu"]  # the block's MLP is what the identity leaves out


@pytest.mark.parametrize(("named", "model", "same"), [
    ("meta-llama/Llama-3.1-8B-Instruct", "Meta Llama 3.1 8B Instruct", True), ("gpt2", "GPT-2 small", True),
    ("Qwen/Qwen3-8B-Base", "Qwen3 8B", True), ("meta-llama/Llama-3.1-8B", "Mistral 7B v0.3", False),
])  # fmt: skip
def test_a_model_s_name_is_told_from_another(named, model, same):
    assert is_named(named, model) == same


def test_an_sae_of_another_width_or_an_unknown_place_is_one_line(tmp_path):
    published(tmp_path / "narrow", d=128)
    done = ggscope("convert", "convert.source=narrow", *FEW, cwd=tmp_path, code=2)
    assert "width 128" in last_line(done)
    published(tmp_path / "odd", hook_name="nowhere")
    done = ggscope("convert", "convert.source=odd", *FEW, cwd=tmp_path, code=2)
    assert "convert.hook=" in last_line(done)
    done = ggscope("convert", "convert.source=odd", "convert.hook=blocks.1.mlp.hook_post", *FEW, cwd=tmp_path, code=2)
    assert "this SAE reads 256 numbers" in last_line(done)
    done = ggscope("convert", "convert.source=odd", "convert.format=sparsify", *FEW, cwd=tmp_path, code=2)
    assert "sae.safetensors is missing" in last_line(done)


@pytest.fixture
def cached(tmp_path):
    """A hub cache that holds owner/name with a folder sae/layer_2, and a way to run against it without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    for name in ("main", "v1"):
        (cache / "refs" / name).write_text(commit)
    shutil.copytree(published(tmp_path / "theirs"), cache / "snapshots" / commit / "sae" / "layer_2")

    def convert(source):
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "convert", f"convert.source={source}", "run_dir=out", *FEW], cwd=tmp_path,
            capture_output=True, text=True, timeout=120, check=False,
            env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        )  # fmt: skip

    return convert


def test_a_folder_and_a_file_of_a_hub_repository(tmp_path, cached):
    for source in ("hf://owner/name/sae/layer_2", "hf://owner/name@v1/sae/layer_2/sae_weights.safetensors"):
        done = cached(source)
        assert done.returncode == 0, done.stderr
        w = read_sae_gguf(tmp_path / "out" / "sae.gguf")
        assert w.training["source"] == source.removeprefix("hf://")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(("source", "said"), [
    ("hf://owner/other/sae", "cannot be had from the hub"), ("hf://owner/name/nothing", "the repository has none of"),
    ("hf://owner/name/../../x", "expected hf://owner/repo"),
])  # fmt: skip
def test_what_the_hub_does_not_have_is_one_line(cached, source, said):
    done = cached(source)
    assert done.returncode == 2
    assert said in last_line(done)


def test_addresses_of_the_hub():
    assert parse_address("hf://owner/na.me") == ("owner/na.me", None, "")
    assert parse_address("hf://owner/name@v1/a/b.pt") == ("owner/name", "v1", "a/b.pt")
    for bad in ("hf://owner", "hf://owner/name/a/../b", "hf://owner/name//b", "https://x/y"):
        with pytest.raises(ConfigError, match="expected hf://"):
            parse_address(bad)
