"""Files that SAELens, sparsify and dictionary_learning wrote themselves, and ours loaded back there.

Long: it needs the libraries (bench/requirements-train.txt): `make bench-env`, or a Python that GGSCOPE_PEERS names.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.interop.exporting import export_folder
from convert.interop.registry import import_sae
from convert.interop.saelens import SCALES
from sae.errors import ConfigError
from sae.weights import SAEWeights
from tests.peers import peers, without_ggscope
from tests.sae.toy import random_weights

from .oracles import D, F, dense, draw, same

SCRIPT = Path(__file__).with_name("peer_files.py")


def ask(verb, folder):
    command = [peers(), SCRIPT, verb, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=without_ggscope(), check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_what_the_libraries_write_is_read_with_equal_latents_and_reconstructions(tmp_path):
    ask("write", tmp_path)
    found = {}
    for answers in sorted(tmp_path.rglob("answers.npz")):
        theirs = np.load(answers)
        answers.unlink()
        imported = import_sae(answers.parent)
        name = answers.relative_to(tmp_path).parts[0]
        assert name.startswith(imported.format), name
        same(imported.weights, theirs["x"], theirs["acts"], theirs["x_hat"])
        found[name] = imported
    assert len(found) == 13 + 3 + 7 + 9


@pytest.mark.long
def test_our_exports_load_in_their_libraries_with_equal_latents_and_reconstructions(tmp_path):
    sources = exports()
    for name, (w, target) in sources.items():
        export_folder(tmp_path / name, w, target)
    x = draw()["x"]
    np.savez(tmp_path / "rows.npz", x=x)
    ask("read", tmp_path)
    for name, (w, _) in sources.items():
        theirs = np.load(tmp_path / name / "answers.npz")
        same(w, x, theirs["acts"], theirs["x_hat"])


def test_the_scales_that_are_known_beside_the_files_are_those_that_saelens_lists():
    where = "import importlib.util; print(importlib.util.find_spec('sae_lens').submodule_search_locations[0])"
    place = subprocess.run([peers(), "-c", where], capture_output=True, text=True, env=without_ggscope(), check=True)
    text = (Path(place.stdout.strip()) / "pretrained_saes.yaml").read_text(encoding="utf-8")
    for repo, by_hook in SCALES.items():
        (listed,) = re.findall(rf"^  repo_id: {re.escape(repo)}\n((?:  .*\n)*)", text, re.MULTILINE)
        theirs = dict(re.findall(r"- id: (\S+)\n(?:    .*\n)*?    norm_scaling_factor: (\S+)\n", listed))
        assert by_hook == {hook: pytest.approx(float(theirs[hook]), rel=2e-6) for hook in by_hook}


def sae(**fields):
    a = draw()
    base = {
        "W_enc_FD": a["W_enc_FD"], "b_enc_F": a["b_enc"], "W_dec_FD": a["W_dec_FD"], "b_dec_D": a["b_dec"], "mean_D": a["b_dec"],
        "variance": 2.0, "k": 5, "hook": "blocks.1.hook_resid_post", "host": {"name": "m"},
    }  # fmt: skip
    return SAEWeights(**base | fields)


def exports():
    """One SAE of every kind either library can hold."""
    theta = {"variant": "threshold", "threshold_F": draw()["threshold"]}
    layer = {"norm_mode": "layer", "norm_eps": 1e-5, "norm_correction": 1}
    across = {"hook_out": "blocks.1.hook_mlp_out", "b_dec_subtracted": False}
    skip = {"W_skip_OD": np.random.default_rng(3).standard_normal((D, D)).astype("f4")}
    return {
        "lens_topk": (sae(), "saelens"), "lens_plain": (sae(b_dec_subtracted=False), "saelens"),
        "lens_threshold": (sae(**theta), "saelens"), "lens_layer": (sae(**layer), "saelens"),
        "lens_layer_ours": (sae(**layer | {"norm_correction": 0}), "saelens"),
        "lens_transcoder": (sae(**theta, **across), "saelens"), "lens_skip": (sae(**theta, **across, **skip), "saelens"),
        "sparsify_topk": (sae(), "sparsify"), "sparsify_plain": (sae(b_dec_subtracted=False), "sparsify"),
        "sparsify_groupmax": (sae(variant="groupmax"), "sparsify"), "sparsify_transcoder": (sae(**across, **skip), "sparsify"),
    }  # fmt: skip


@pytest.mark.parametrize("name", exports())
def test_an_export_is_read_back_equal(tmp_path, name):
    w, target = exports()[name]
    place = export_folder(tmp_path / "layers.1.mlp", w, target)
    back = import_sae(place, hook=w.hook, hook_out=w.hook_out)
    assert back.format == target
    same(back.weights, draw()["x"], *dense(w, draw()["x"]))
    if target == "saelens":
        assert (import_sae(place).weights.hook, import_sae(place).weights.hook_out) == (w.hook, w.hook_out)
    assert len(back.weights.b_enc_F) == F


@pytest.mark.parametrize(("fields", "target", "said"), [
    ({"variant": "groupmax"}, "saelens", "no groupmax"), ({"norm_mode": "layer"}, "saelens", "has eps 1e-05, this SAE's 0.0"),
    ({"hook_out": "blocks.1.hook_mlp_out", "b_dec_subtracted": False}, "saelens", "no top-k transcoders"),
    ({"variant": "threshold", "threshold_F": draw()["threshold"]}, "sparsify", "only topk and groupmax"),
    ({"norm_mode": "layer"}, "sparsify", "no per-token layer norm"), ({}, "elsewhere", "expected one of saelens, sparsify"),
])  # fmt: skip
def test_what_a_library_has_no_equation_for_is_refused(tmp_path, fields, target, said):
    with pytest.raises(ConfigError, match=said):
        export_folder(tmp_path / "out", sae(**fields), target)
    assert not (tmp_path / "out").exists()


def test_the_settings_of_an_export_say_whose_it_is_and_what_its_arrays_are(tmp_path):
    w = random_weights(
        np.random.default_rng(0), d=6, latents=24, k=3, b_dec_subtracted=False, hook="blocks.0.hook_resid_mid",
        hook_out="blocks.0.hook_mlp_out", W_skip_OD=np.ones((6, 6)), host={"name": "tiny", "architecture": "llama"},
    )  # fmt: skip
    for skip in (True, False):
        folder = export_folder(tmp_path / str(skip), replace(w, W_skip_OD=w.W_skip_OD if skip else None), "sparsify")
        said = json.loads((folder / "cfg.json").read_text())
        assert (said["skip_connection"], said["transcode"], said["k"], said["num_latents"]) == (skip, True, 3, 24)
    plain = random_weights(np.random.default_rng(0), d=6, latents=24, k=3, host=w.host)
    said = json.loads((export_folder(tmp_path / "plain", plain, "saelens") / "cfg.json").read_text())
    assert (said["metadata"]["model_name"], said["metadata"]["hook_name"]) == ("tiny", plain.hook)
