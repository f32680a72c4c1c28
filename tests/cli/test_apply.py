"""apply and convert through the command line: readings, interventions, texts from stdin, control vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from convert.control_vector import read_control_vector
from sae.checkpoint import load_weights

from .conftest import ggscope, last_line


@pytest.fixture(scope="module")
def sae(made):
    return next(made.glob("runs/train/*/sae"))


def events(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def apply(sae, folder, *args, prompt="import os\n", code=0):
    options = [f"sae.path={sae}", "apply.format=jsonl", "apply.max_tokens=6", "model.n_threads=1"]
    return ggscope("apply", *options, *args, "--prompt", prompt, cwd=folder, code=code)


def test_every_token_but_bos_has_its_latents_l0_and_fvu(sae, tmp_path):
    read = events(apply(sae, tmp_path))
    assert [e["pos"] for e in read] == list(range(len(read)))
    assert read[0]["flagged"]
    assert read[0]["latents"] == []
    assert all(0 < e["l0"] <= 8 and e["fvu"] > 0 and len(e["latents"]) <= 3 for e in read[1:])
    assert "".join(e["text"] for e in read if e["phase"] == "prompt").endswith("import os\n")
    (file,) = tmp_path.glob("runs/apply/*/readout.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == read


def test_the_ggml_encoder_reads_what_numpy_reads(sae, tmp_path):
    runs = {}
    for encoder in ("numpy", "ggml", "auto"):
        options = [f"apply.encoder={encoder}", "intervention=clamp", "intervention.latents=[5]", "intervention.value=3"]
        runs[encoder] = events(apply(sae, tmp_path, f"run_dir={encoder}", *options))
    names = {name: json.loads((tmp_path / name / "manifest.json").read_text())["metrics"]["encoder"] for name in runs}
    assert names["numpy"] == "numpy"
    assert names["auto"] == names["ggml"]
    assert names["ggml"].startswith("ggml:CPU:")
    assert names["ggml"].endswith(":F32")
    assert runs["auto"] == runs["ggml"]
    for ours, numpys in zip(runs["ggml"], runs["numpy"], strict=True):
        assert [latent for latent, _ in ours["latents"]] == [latent for latent, _ in numpys["latents"]]
        np.testing.assert_allclose([a for _, a in ours["latents"]], [a for _, a in numpys["latents"]], rtol=1e-3)


def test_heads_are_switched_off_without_an_sae_and_the_text_is_the_same_as_beside_one(sae, tmp_path):
    off = ["intervention=heads", "intervention.heads=[L1H1]"]
    beside = events(apply(sae, tmp_path, *off))
    settings = ["apply.max_tokens=6", "model.n_threads=1", "--prompt", "import os\n"]
    for named in ([], ["sae.path=none"]):  # nothing is trained here
        folder = tmp_path / f"run{len(named)}"
        done = ggscope("apply", "apply.format=jsonl", f"run_dir={folder}", *off, *settings, *named, cwd=tmp_path)
        alone = events(done)
        assert [(e["token"], e["logprob"]) for e in alone] == [(e["token"], e["logprob"]) for e in beside]
        assert all(e["readings"] == [] and e["l0"] is None for e in alone)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert not {"l0", "fvu", "encoder"} & manifest["metrics"].keys()
        assert manifest["inputs"].keys() == {"model"}
        assert "head L1H1 off" in done.stderr
    shown = ggscope("apply", "sae.path=none", *settings, cwd=tmp_path).stdout.splitlines()
    assert shown[0].split() == ["pos", "token", "logprob"]
    done = ggscope(
        "apply", "intervention=ablate", "intervention.latents=[5]", f"intervention.sae={sae}", *settings, cwd=tmp_path
    )
    said = " ".join(done.stdout.split())
    assert f"ablate latent 5 (SAE of {sae} at {load_weights(sae).hook})" in said


def test_an_sae_of_another_model_is_not_read_where_none_is_needed(made, tmp_path):
    shutil.copytree(made / "runs", tmp_path / "runs")
    (file,) = tmp_path.glob("runs/train/*/sae/sae.json")
    manifest = file.parents[1] / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["outputs"]["sae"] = str(file.parent)
    manifest.write_text(json.dumps(facts))
    meta = json.loads(file.read_text())
    meta["host"]["vocab_sha256"] = "0" * 64
    file.write_text(json.dumps(meta))
    settings = ["apply.max_tokens=2", "model.n_threads=1", "--prompt", "import os\n"]
    off = ["intervention=heads", "intervention.heads=[L1H1]"]
    done = ggscope("apply", *off, *settings, cwd=tmp_path)
    assert "warning: apply reads no SAE: this SAE was made on a model with" in " ".join(done.stderr.split())
    assert "2 tokens generated after" in done.stdout
    for needs in ([], [*off, f"sae.path={file.parent}"]):
        assert "was made on a model with" in last_line(ggscope("apply", *needs, *settings, cwd=tmp_path, code=2))


def test_latents_and_plain_readings_need_an_sae(tmp_path):
    steer = ["intervention=steer", "intervention.latents=[1]", "sae.path=none"]
    done = ggscope("apply", *steer, "--prompt", "x", cwd=tmp_path, code=2)
    assert "no SAE is read here (sae.path=none); latents need one" in last_line(done)
    done = ggscope("apply", "--prompt", "x", cwd=tmp_path, code=2)
    assert "expected a finished `ggscope train` run" in last_line(done)


def test_an_edit_where_no_row_is_says_that_it_changed_nothing(sae, tmp_path):
    steer = ["intervention=steer", "intervention.latents=[1]", "intervention.coeff=5"]
    done = apply(sae, tmp_path, *steer, "intervention.positions=[999]")
    last = len(events(done)) - 1
    said = " ".join(done.stderr.split())
    assert f"warning: steer latent 1 by 5 changed nothing: no row was at 999; the positions were 0 to {last}" in said
    done = apply(sae, tmp_path, *steer, "intervention.phase=prompt", f"intervention.token_range=[{last},{last + 9}]")
    assert f"no row of the prompt was at {last}, {last + 1}, {last + 2}, {last + 3}, ...;" in " ".join(
        done.stderr.split()
    )
    assert "changed nothing" not in apply(sae, tmp_path, *steer, f"intervention.positions=[{last},999]").stderr


def test_a_gguf_is_read_in_its_stored_type(sae, tmp_path):
    done = ggscope("convert", f"convert.source={sae}", "convert.encoder_type=Q8_0", "run_dir=made", cwd=tmp_path)
    assert done.returncode == 0
    (file,) = (tmp_path / "made").glob("*.gguf")
    read = events(apply(file, tmp_path, "run_dir=read"))
    assert all(e["l0"] > 0 for e in read[1:])
    metrics = json.loads((tmp_path / "read" / "manifest.json").read_text())["metrics"]
    assert metrics["encoder"].endswith(":Q8_0")


def test_a_prompt_comes_from_stdin_as_well(sae, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "apply",
        f"sae.path={sae}",
        "apply.format=jsonl",
        "apply.max_tokens=6",
        "-",
    ]
    done = subprocess.run(
        command, input="import os\n\n", cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert [e["token"] for e in events(done)] == [e["token"] for e in events(apply(sae, tmp_path))]


def test_interventions_change_what_they_should(sae, tmp_path):
    plain = events(apply(sae, tmp_path))
    latent = plain[2]["latents"][0][0]
    chosen = f"intervention.latents=[{latent}]"
    steered = events(apply(sae, tmp_path, "intervention=steer", chosen, "intervention.coeff=300"))
    nothing = events(apply(sae, tmp_path, "intervention=steer", chosen, "intervention.coeff=0"))
    ablated = events(apply(sae, tmp_path, "intervention=ablate", chosen))
    late = events(
        apply(sae, tmp_path, "intervention=clamp", chosen, "intervention.value=300", "intervention.phase=response")
    )
    assert nothing == plain
    assert [e["logprob"] for e in steered[1:]] != [e["logprob"] for e in plain[1:]]
    assert [e["logprob"] for e in ablated[1:]] != [e["logprob"] for e in plain[1:]]
    prompt = [e for e in plain if e["phase"] == "prompt"]
    assert [e["logprob"] for e in late[: len(prompt)]] == [e["logprob"] for e in prompt]
    assert late[len(prompt) :] != plain[len(prompt) :]


def test_heads_switched_off_are_those_of_python(sae, tmp_path):
    from pipeline.generate import generate
    from pipeline.interventions.base import Where
    from pipeline.interventions.heads import AblateHeads
    from pipeline.llama.hooks import HookPoint
    from pipeline.llama.model import Model
    from pipeline.llama.session import Session

    plain = events(apply(sae, tmp_path))
    done = apply(sae, tmp_path, "intervention=heads", "intervention.heads=[L1H2,L3H*]", "run_dir=off")
    off = events(done)
    assert "heads L1H2, L3H* off" in " ".join(done.stderr.split())
    with Model(files("pipeline") / "data" / "pylm.gguf") as model:
        session, counts = Session(model, n_ctx=64, n_threads=1), model.graph.heads()
        edits = [
            AblateHeads(
                point=HookPoint.parse(f"blocks.{block}.attn.hook_z"), heads=heads, count=counts[block],
                where=Where(flagged=True),
            )
            for block, heads in ((1, (2,)), (3, tuple(range(counts[3]))))
        ]  # fmt: skip
        tokens = [e["token"] for e in plain if e["phase"] == "prompt"]
        expected = list(generate(session, model, np.array(tokens, np.int32), interventions=edits, max_tokens=6))
    assert [e["token"] for e in off] == [e.token for e in expected]
    assert [e["logprob"] for e in off[1:]] == [e.logprob for e in expected[1:]]
    assert [e["logprob"] for e in off[1:]] != [e["logprob"] for e in plain[1:]]
    manifest = json.loads((tmp_path / "off" / "manifest.json").read_text())
    assert manifest["metrics"]["interventions"] == [edit.key() for edit in edits]
    every = [f"L1H{head}" for head in range(counts[1]) if head != 2]
    kept = events(
        apply(sae, tmp_path, "intervention=heads", "intervention.heads=[L1H2]", "intervention.keep=true", "run_dir=a")
    )
    named = events(apply(sae, tmp_path, "intervention=heads", f"intervention.heads=[{','.join(every)}]", "run_dir=b"))
    assert kept == named != off


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["intervention=heads"], "intervention.heads=[L3H5]"),
        (["intervention=heads", "intervention.heads=[L1H99]"], "block 1 has heads 0.."),
        (["intervention=heads", "intervention.heads=[3.5]"], "expected heads as L3H5"),
        (["intervention=heads", "intervention.heads=[L1H1]", "intervention.latents=[3]"], "takes heads, no latents"),
        (["intervention=ablate", "intervention.latents=[1]", "intervention.heads=[L1H1]"], "are of intervention=heads"),
        (["intervention=heads", "intervention.heads=[L1H1]", "intervention.coeff=3"], "coeff"),
        (
            ["intervention=heads", "intervention.heads=[L1H*]", "intervention.keep=true"],
            "nothing would be switched off",
        ),
        (["intervention.keep=true"], "add intervention=heads"),
        (
            ["intervention=heads", "intervention.heads=[L1H1]", "intervention.keep_error=true"],
            "of intervention=reconstruct",
        ),
        (
            ["intervention=heads", "intervention.heads=[L1H1]", "intervention.mean=no"],
            "intervention.mean: no activation",
        ),
        (["intervention=steer"], "intervention.latents"),
        (["intervention=steer", "intervention.latents=[9999]"], "9999"),
        (["intervention.kind=flip", "intervention.latents=[1]"], "steer, clamp, ablate"),
        (["intervention=ablate", "intervention.latents=[1]", "intervention.token_range=[5,2]"], "token_range"),
        (["apply.format=xml"], "expected text, jsonl"),
        (["apply.temperature=-1"], "temperature"),
        (["sae.path=nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(args, expected, sae, tmp_path):
    assert expected in last_line(apply(sae, tmp_path, *args, code=2))


def test_convert_writes_a_verified_file_and_a_control_vector(sae, tmp_path):
    options = [f"convert.source={sae}", "convert.probe_tokens=600", "model.n_threads=1"]
    done = ggscope(
        "convert", *options, "convert.encoder_type=Q8_0", "convert.latent=7", "convert.coeff=2.5", cwd=tmp_path
    )
    assert "top-k overlap" in done.stdout
    (vector,) = tmp_path.glob("runs/convert/*/latent_7.gguf")
    directions = read_control_vector(vector)
    assert list(directions) == [3]
    assert np.array_equal(directions[3], np.float32(2.5) * load_weights(sae).W_dec_FD[7])
    assert "Q4_9" in last_line(ggscope("convert", *options, "convert.encoder_type=Q4_9", cwd=tmp_path, code=2))
    assert "0..255" in last_line(ggscope("convert", *options, "convert.latent=256", cwd=tmp_path, code=2))
