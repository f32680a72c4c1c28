"""Files that llamascopium and circuit-tracer wrote themselves, read with the latents and reconstructions they give.

Long: it needs the libraries (bench/requirements-interop.txt): `make bench-env`, or a Python that GGSCOPE_INTEROP names.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from convert.interop.registry import import_sae
from tests.peers import interop_peers, without_ggscope

from .oracles import same

SCRIPT = Path(__file__).with_name("circuit_files.py")
POST, MID, MLP = "blocks.4.hook_resid_post", "blocks.4.hook_resid_mid", "blocks.4.hook_mlp_out"


def ask(library, folder):
    command = [interop_peers(library), SCRIPT, library, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=without_ggscope(), check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_what_llamascopium_saves_is_read_with_equal_latents_and_reconstructions(tmp_path):
    ask("llamascopium", tmp_path)
    names = sorted(path.parent.name for path in tmp_path.glob("*/answers.npz"))
    for name in names:
        theirs = np.load(tmp_path / name / "answers.npz")
        found = import_sae(tmp_path / name)
        w, acts = found.weights, theirs["acts"]
        if name == "topk_True":  # ours keep the norm by which they were chosen
            acts = acts * theirs["norm"]
            assert "activations carry the norm of the decoder row" in " ".join(found.notes)
        same(w, theirs["x"], acts, theirs["x_hat"])
        assert found.format == "llamascopium"
        assert (w.hook, w.hook_out) == ((MID, MLP) if name == "transcoder" else (POST, ""))
    assert len(names) == 10


@pytest.mark.long
def test_what_circuit_tracer_saves_is_read_with_equal_latents_and_reconstructions(tmp_path):
    ask("circuit_tracer", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        for layer in range(3):
            theirs = np.load(tmp_path / name / f"answers_{layer}.npz")
            found = import_sae(tmp_path / name / f"layer_{layer}.safetensors")
            same(found.weights, theirs["x"], theirs["acts"], theirs["x_hat"])
            assert found.format == "circuit_tracer"
            assert found.weights.hook == f"blocks.{layer}.hook_resid_mid"
            assert found.weights.hook_out == f"blocks.{layer}.hook_mlp_out"
            assert found.weights.host["name"] == "org/model"
    assert len(names) == 4
