"""convert with several SAEs and labels, convert verify, drift, and apply on what they wrote, through the command line."""

from __future__ import annotations

import dataclasses
import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from pipeline.config import Config, DriftConfig, ModelConfig
from pipeline.llama.identity import model_id
from pipeline.run import RunContext
from pipeline.stages.drift import model_files
from pipeline.stages.inputs import model_path
from sae.checkpoint import load_weights, save_weights
from sae.errors import ConfigError
from sae.untrained import untrained_weights
from tests.cli.conftest import ggscope, last_line

D, F, K = 256, 64, 8
FEW = ["corpus.max_documents=3", "convert.probe_tokens=300", "model.n_threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SAEs of the demo model that nobody trained: `a` at block 3, `b` at block 1; and the file made of both, with labels."""
    folder = tmp_path_factory.mktemp("format")
    host = model_id(model_path(ModelConfig())).as_dict()
    x_ND = np.random.default_rng(0).standard_normal((64, D)) * 8
    for name, block, seed in (("a", 3, 0), ("b", 1, 1)):
        hook = f"blocks.{block}.hook_resid_post"
        variance = float((x_ND**2).sum(axis=1).mean())
        save_weights(
            folder / name, untrained_weights(D, F, K, x_ND.mean(axis=0), variance, hook, host, seed, sample_ND=x_ND)
        )
    (folder / "names.json").write_text(json.dumps({str(latent): f"latent [{latent}]" for latent in range(F)}))
    done = ggscope(
        "convert", "a", "convert.also=[b]", "convert.labels=names.json", "convert.encoder_type=Q8_0", "convert.decoder_type=Q4_1",
        "run_dir=made", *FEW, cwd=folder,
    )  # fmt: skip
    (folder / "made.txt").write_text(done.stdout)
    return folder


def test_several_saes_are_written_into_one_file_and_each_is_verified(folder):
    said = (folder / "made.txt").read_text().splitlines()
    assert "64 of them labelled" in said[0]
    assert said[0].count("sha256") == 2
    assert "(sha256 )" not in said[0]
    assert all(f"blocks.{block}.hook_resid_post: on " in said[1] for block in (3, 1))
    first, second = (read_sae_gguf(folder / "made" / "sae.gguf", entry) for entry in (0, 1))
    assert (first.hook, second.hook) == ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
    assert (len(first.labels), second.labels) == (F, {})
    manifest = json.loads((folder / "made" / "manifest.json").read_text())
    assert [entry["hook"] for entry in manifest["metrics"]["entries"]] == [first.hook, second.hook]
    assert all(len(manifest["inputs"][name]["sha256"]) == 64 for name in ("sae", "also_0"))


def test_a_file_is_verified_against_what_its_run_read(folder):
    done = ggscope("convert", "verify", "made", "corpus.max_documents=3", "model.n_threads=1", cwd=folder)
    given, numbers, output = done.stdout.splitlines()
    assert given.count("64 latents x 256") == 2
    assert "encoder Q8_0, decoder Q4_1" in numbers
    assert numbers.endswith("allowed: FVU +-0.05, overlap 0.95 or more")
    assert "they match" in output
    (run,) = folder.glob("runs/convert/*/manifest.json")
    report = json.loads(run.read_text())["metrics"]
    made = json.loads((folder / "made" / "manifest.json").read_text())["metrics"]
    assert {key: made[key] for key in ("fvu_source", "fvu_file", "l0", "topk_overlap")} == {
        key: report[key] for key in ("fvu_source", "fvu_file", "l0", "topk_overlap")
    }


def test_a_file_of_other_weights_fails_with_exit_code_3_and_one_without_a_source_is_told_to_name_it(folder):
    sae = read_sae_gguf(folder / "made" / "sae.gguf")
    changed = dataclasses.replace(sae, W_dec_FD=sae.W_dec_FD * np.float32(1.2))
    write_sae_gguf(folder / "changed.gguf", changed)
    done = ggscope("convert", "verify", "changed.gguf", "convert.source=a", *FEW, cwd=folder, code=3)
    assert "does not match its source: relative.W_enc_FD" in last_line(done)  # rounded to Q8_0, then called F16
    assert "relative.W_dec_FD 2.2" in last_line(done)
    done = ggscope("convert", "verify", "changed.gguf", *FEW, cwd=folder, code=2)
    assert "name what changed.gguf was made from: convert.source=SAE" in last_line(done)


def test_apply_takes_the_run_folder_of_convert_and_shows_labels_beside_numbers(folder):
    done = ggscope("apply", "sae.path=made", "--prompt", "import os", cwd=folder, code=2)
    assert "made/sae.gguf holds 2 SAEs; choose one: made/sae.gguf#0 (blocks.3.hook_resid_post)" in last_line(done)
    short = ["apply.max_tokens=2", "model.n_threads=1", "--prompt", "import os"]
    first = ["apply", "sae.path=made/sae.gguf#blocks.3.hook_resid_post"]
    text = ggscope(*first, *short, cwd=folder).stdout
    read = [json.loads(line) for line in ggscope(*first, "apply.format=jsonl", *short, cwd=folder).stdout.splitlines()]
    latent, activation = read[2]["latents"][0]
    assert f"{latent} (latent [{latent}]): {activation:.2f}" in text
    assert read[2]["labels"] == {str(latent): f"latent [{latent}]" for latent, _ in read[2]["latents"]}
    other = ggscope("apply", "sae.path=made/sae.gguf#1", "apply.format=jsonl", *short, cwd=folder).stdout.splitlines()
    assert "labels" not in json.loads(other[2])
    assert json.loads(other[2])["readings"][0]["hook"] == "blocks.1.hook_resid_post"
    done = ggscope("apply", "sae.path=nowhere", *short, cwd=folder, code=2)
    assert "nowhere does not exist" in last_line(done)


def test_drift_measures_every_type_on_every_file_and_says_the_worst(folder):
    done = ggscope(
        "drift", "sae.path=a", "drift.requantise=[Q4_0]", "drift.types=[F32,Q4_0]", "drift.tokens=300", "drift.splice_tokens=200",
        "corpus.max_documents=3", "model.n_threads=1", "run_dir=drift", cwd=folder,
    )  # fmt: skip
    result = json.loads((folder / "drift" / "drift.json").read_text())
    assert [model["name"] for model in result["models"]] == ["F16", "Q4_0"]
    cells = [form for model in result["models"] for form in model["forms"]]
    assert [form["types"] for form in cells] == ["F32", "Q4_0", "F32", "Q4_0"]
    assert cells[0]["top_k_overlap"] == 1 > cells[2]["top_k_overlap"] > cells[3]["top_k_overlap"]
    worst = max(cells, key=lambda form: form["fvu"])
    lines = done.stdout.splitlines()
    assert f"at worst FVU {worst['fvu']:.4f} ({worst['types']} on " in lines[-2]
    for form in cells:
        assert any(f"{form['fvu']:.4f}" in line and f"{form['kl']:.4f}" in line for line in lines[:-3])
    made = gguf.GGUFReader(folder / "drift" / "models" / "pylm-Q4_0.gguf")
    assert "Q4_0" in {tensor.tensor_type.name for tensor in made.tensors}
    assert (folder / "drift" / "drift.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"requantise": ["Q1"]}, "drift.requantise: expected F16, BF16, .*, got Q1"),
        ({"models": ["nothing.gguf"]}, r"drift.models: nothing\.gguf does not exist"),
    ],
)
def test_files_that_drift_cannot_have_are_refused_before_any_is_written(settings, said, tmp_path):
    context = RunContext(command="drift", folder=tmp_path, config=Config(drift=DriftConfig(**settings)))
    with pytest.raises(ConfigError, match=said):
        model_files(context)
    assert not list(tmp_path.iterdir())


def test_text_of_a_hostile_file_is_shown_not_obeyed(folder):
    """Names with a terminal's escapes and with rich's markup: in a warning, in an error, of a file and of a folder."""
    evil, spelled = "[/red]\x1b[2J\x07\n[link=x]", "[/red]\\x1b[2J\\x07"
    w = load_weights(folder / "a")
    short = ["apply.max_tokens=1", "model.n_threads=1", "--prompt", "import"]
    for name, host in (("warned", {"file_type": evil}), ("refused", {"vocab_sha256": evil})):
        write_sae_gguf(folder / "evil.gguf", dataclasses.replace(w, host={**w.host, "name": evil, **host}))
        done = ggscope("apply", "sae.path=evil.gguf", *short, cwd=folder, code=0 if name == "warned" else 2)
        assert "\x1b" not in done.stdout + done.stderr
        assert (spelled if name == "warned" else "[/red]\\x1b[2J") in done.stderr
    (folder / "theirs").mkdir()
    (folder / "theirs" / "cfg.json").write_text('{"d_sae": 4, "hook_name": "blocks.1.hook_resid_post"}')
    save_file({evil: np.zeros(3, "f4")}, folder / "theirs" / "sae_weights.safetensors")
    done = ggscope("convert", "convert.source=theirs", cwd=folder, code=2)
    assert f"it holds '{spelled}" in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_is_not_written_over_what_it_is_made_from(folder):
    before = (folder / "made" / "sae.gguf").read_bytes()
    done = ggscope(
        "convert", "convert.source=made/sae.gguf#1", "convert.out=made/../made/sae.gguf", *FEW, cwd=folder, code=2
    )
    assert "made/sae.gguf is what is read; name another file" in last_line(done)
    assert (folder / "made" / "sae.gguf").read_bytes() == before


def test_a_misspelt_verb_is_no_path(folder):
    assert "got 'verfy'; did you mean verify?" in last_line(ggscope("convert", "verfy", "made", cwd=folder, code=2))
