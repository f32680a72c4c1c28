"""Several SAEs at several blocks through the command line: read, steered, clamped, ablated, replaced, as control vectors."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from importlib import resources

import numpy as np
import pytest

from convert.control_vector import read_control_vector
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from pipeline.cli import main
from pipeline.llama.identity import model_id
from sae.checkpoint import load_weights, save_weights
from sae.untrained import untrained_weights

BLOCKS = (1, 3, 4)
D, F = 256, 512


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Random SAEs of the demo model at three blocks: a checkpoint folder, a Q8_0 and an F16 file."""
    folder = tmp_path_factory.mktemp("saes")
    host = model_id(str(resources.files("pipeline") / "data" / "pylm.gguf")).as_dict()
    made = {}
    for block in BLOCKS:
        w = untrained_weights(D, F, 8, np.zeros(D), 1.0, f"blocks.{block}.hook_resid_post", host, block)
        if block == 1:
            save_weights(folder / "first", w)
            made[block] = folder / "first"
        else:
            kind = {3: "Q8_0", 4: "F16"}[block]
            made[block] = write_sae_gguf(folder / f"{block}.gguf", w, encoder_type=kind, decoder_type=kind)
    return made


@pytest.fixture
def ggscope(tmp_path, monkeypatch, capsys):
    """The command line in this process, which is quicker: (stdout, the last line of stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, code=0):
        assert main([str(arg) for arg in args]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return call


@pytest.fixture
def apply(saes, ggscope):
    """Events of an apply of the SAE at block 1 (or another one)."""

    def call(*args, sae=None, code=0):
        options = [f"sae.path={sae or saes[1]}", "apply.format=jsonl", "apply.max_tokens=4", "model.n_threads=1"]
        out, said = ggscope("apply", *options, *args, "--prompt", "import os\n", code=code)
        return [json.loads(line) for line in out.splitlines()] if code == 0 else said

    return call


def edits(*items):
    return f"apply.interventions=[{','.join(items)}]"


def test_every_sae_reads_at_its_own_point_what_it_reads_alone(saes, apply):
    together = apply(f"apply.also=[{saes[3]},{saes[4]}]")
    for i, block in enumerate(BLOCKS):
        alone = apply(sae=saes[block])
        assert [e["readings"][i : i + 1] for e in together] == [e["readings"] for e in alone]
    assert [r["hook"] for r in together[-1]["readings"]] == [f"blocks.{block}.hook_resid_post" for block in BLOCKS]


def test_edits_of_several_saes_act_together_and_each_alone(saes, apply):
    plain = apply(f"apply.also=[{saes[3]}]")
    latent = plain[2]["readings"][1]["latents"][0][0]
    steer = "{kind:steer,latents:[5,9],coeffs:[30,-20]}"
    clamp = f"{{kind:clamp,sae:{saes[3]},latents:[{latent}],value:50}}"
    ablate = f"{{kind:ablate,sae:{saes[3]},latents:[{latent}]}}"
    replace = f"{{kind:reconstruct,sae:{saes[4]}}}"
    runs = {"plain": plain}
    for name, items in {
        "steer": [steer], "clamp": [clamp], "ablate": [ablate], "replace": [replace], "all": [steer, clamp, replace]
    }.items():  # fmt: skip
        runs[name] = apply(f"apply.also=[{saes[3]}]", edits(*items))
    seen = {name: tuple(e["logprob"] for e in run if e["phase"] == "prompt") for name, run in runs.items()}
    assert len(set(seen.values())) == len(seen)
    # the second SAE sees what the edits before its point led to, and not its own block's edit
    assert runs["steer"][2]["readings"][1] != plain[2]["readings"][1]
    assert runs["clamp"][1]["readings"] == plain[1]["readings"]
    assert runs["all"][1]["readings"] == runs["steer"][1]["readings"]


def test_the_group_and_the_list_say_the_same(saes, apply):
    group = apply("intervention=steer", "intervention.latents=[5]", "intervention.coeff=40")
    assert apply(edits("{kind:steer,latents:[5],coeff:40}")) == group
    kept = apply("intervention=reconstruct", "intervention.keep_error=true")
    plain = apply()
    np.testing.assert_allclose(
        [e["logprob"] for e in kept[1:]], [e["logprob"] for e in plain[1:]], atol=2e-2
    )  # the demo model is F16: x_hat + (x - x_hat) is x up to its rounding
    assert [e["logprob"] for e in apply("intervention=reconstruct")] != [e["logprob"] for e in plain]


def test_the_text_output_names_the_point_of_every_further_reading(saes, tmp_path, ggscope):
    options = [f"sae.path={saes[1]}", f"apply.also=[{saes[3]}]", "apply.max_tokens=2", "run_dir=shown"]
    out, _ = ggscope("apply", *options, "--prompt", "import os")
    assert out.count("blocks.3.hook_resid_post") >= 3
    manifest = json.loads((tmp_path / "shown" / "manifest.json").read_text())
    assert manifest["metrics"]["also"][0]["hook"] == "blocks.3.hook_resid_post"
    assert {"sae", "sae:1", "model"} == set(manifest["inputs"])


def test_the_summary_says_of_which_sae_each_edit_and_each_mean_is(saes, tmp_path, ggscope):
    options = [f"sae.path={saes[1]}", f"apply.also=[{saes[3]}]", "apply.max_tokens=2", "run_dir=shown"]
    items = edits(
        "{kind:steer,latents:[5],coeff:8}", f"{{kind:clamp,sae:{saes[3]},latents:[7],value:3}}",
        f"{{kind:ablate,sae:{saes[4]},latents:[2],hook:blocks.5.hook_resid_post}}",
    )  # fmt: skip
    out, _ = ggscope("apply", *options, items, "--prompt", "import os")
    out = " ".join(out.split())
    for text in (
        "steer latent 5 by 8 (SAE of blocks.1.hook_resid_post)",
        "clamp latent 7 at 3 (SAE of blocks.3.hook_resid_post)",
        "ablate latent 2 (SAE of blocks.4.hook_resid_post, edit at blocks.5.hook_resid_post)",
    ):
        assert text in out
    metrics = json.loads((tmp_path / "shown" / "manifest.json").read_text())["metrics"]
    for block, found in ((1, metrics), (3, metrics["also"][0])):
        assert f"blocks.{block}.hook_resid_post: mean L0 {found['l0']:.1f}, mean token FVU {found['fvu']:.4f}" in out


def test_two_saes_of_one_hook_point_are_told_apart_by_their_files(saes, tmp_path, ggscope):
    copy = tmp_path / "copy.gguf"
    write_sae_gguf(copy, load_weights(saes[1]), encoder_type="F16", decoder_type="F16")
    items = edits("{kind:steer,sae:copy.gguf,latents:[5],coeff:8}")
    out, _ = ggscope("apply", f"sae.path={saes[1]}", items, "apply.max_tokens=1", "--prompt", "import os")
    out = " ".join(out.split())
    assert "steer latent 5 by 8 (SAE of copy.gguf at blocks.1.hook_resid_post)" in out
    alone, _ = ggscope("apply", f"sae.path={saes[1]}", edits("{kind:ablate,latents:[5]}"), "--prompt", "import os")
    assert "ablate latent 5\n" in alone


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["intervention.kind=steer", "intervention.latents=[1]"],
            "steer of latents [1] needs a number: intervention.coeff=8",
        ),
        (
            ["intervention=clamp", "intervention.latents=[1]"],
            "intervention.value=8, or value:8 in apply.interventions (0",
        ),
        ([edits("{kind:steer,latents:[1]}")], "coeff:8 in apply.interventions"),
        (
            [edits("{kind:ablate,latents:[1]}", "{kind:clamp,latents:[2],coeff:3}")],
            "clamp of latents [2] needs a number",
        ),
        (["intervention.coeff=much", "intervention=steer"], "intervention.coeff=much: expected a number"),
        (["intervention=reconstruct", "intervention.latents=[1]"], "takes no latents"),
        ([edits("{kind:steer,latents:[1,2],coeffs:[3]}")], "one for each of 2 latents"),
        ([edits("{kind:ablate,latents:[1],coeffs:[3]}")], "of intervention=steer"),
        ([edits("{kind:steer,latents:[1],coeff:1,phase:later}")], "all, prompt, response"),
        ([edits("{kind:steer,latents:[1],coeff:1,sae:nowhere.gguf}")], "nowhere.gguf"),
        (
            [edits("{kind:steer,latent:[1]}")],
            "unknown setting 'latent' in apply.interventions; did you mean latents?",
        ),
        (
            [edits("{kind:ablate,latents:[1]}", "{kind:steer,latents:[5],coef:8}")],
            "interventions; did you mean coeff?",
        ),
        ([edits("{kind:steer,latents:x}")], "latents in apply.interventions: expected a list of whole numbers"),
        ([edits("{kind:steer,latents:[1],coeff:x}")], "coeff in apply.interventions: expected a number"),
        ([edits("{zzz:1}")], "expected kind, latents, sae, coeff"),
        (["apply.also=[nowhere]"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(args, expected, apply):
    assert expected in apply(*args, code=2)


def test_cvector_sums_latents_of_several_saes_block_by_block(saes, tmp_path, ggscope):
    further = f"cvector.directions=[{{sae:{saes[3]},latents:[7],coeffs:[3]}},{{latents:[5],coeffs:[1]}},{{latents:[2],coeffs:[4],block:2}}]"
    options = [f"sae.path={saes[1]}", "cvector.latents=[5,9]", "cvector.coeffs=[8,-2.1]", further]
    out, _ = ggscope("cvector", *options, "cvector.out=cv.gguf")
    assert "--control-vector cv.gguf" in out
    found = read_control_vector(tmp_path / "cv.gguf")
    W_FD = load_weights(saes[1]).W_dec_FD.astype(np.float64)
    assert sorted(found) == [1, 2, 3]
    np.testing.assert_allclose(found[1], 9 * W_FD[5] - 2.1 * W_FD[9], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[2], (4 * W_FD[2]).astype(np.float32))
    np.testing.assert_array_equal(found[3], np.float32(3) * read_sae_gguf(saes[3]).W_dec_FD[7])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "expected latents"),
        (["cvector.latents=[1,2]", "cvector.coeffs=[1]"], "a coefficient for each latent"),
        (["cvector.latents=[512]", "cvector.coeffs=[1]"], "0..511"),
        (["cvector.directions=[{latents:[1],coeffs:[1],block:0}]"], "block 0 cannot be steered"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_control_vectors_that_cannot_be_are_one_line(args, expected, saes, tmp_path, ggscope):
    assert expected in ggscope("cvector", f"sae.path={saes[1]}", *args, code=2)[1]
    assert not list(tmp_path.rglob("*.gguf"))


def test_the_command_of_a_refusal_makes_the_control_vector(saes, tmp_path, ggscope):
    save_weights(tmp_path / "mlp", dataclasses.replace(load_weights(saes[1]), hook="blocks.2.hook_mlp_out"))
    options = ["sae.path=mlp", "convert.source=mlp", "convert.latent=5", "convert.coeff=4", "convert.probe_tokens=200"]
    for command, given in (
        ("cvector", ["sae.path=mlp", "cvector.latents=[5]", "cvector.coeffs=[4]"]),
        ("convert", options),
    ):
        _, said = ggscope(command, *given, code=2)
        words = shlex.split(said.split("ggscope cvector ")[-1])
        assert words == ["cvector.directions=[{latents:[5],coeffs:[4.0],block:2}]"]
    ggscope("cvector", "sae.path=mlp", *words, "cvector.out=cv.gguf")
    np.testing.assert_array_equal(
        read_control_vector(tmp_path / "cv.gguf")[2], np.float32(4) * load_weights(saes[1]).W_dec_FD[5]
    )
