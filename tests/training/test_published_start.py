"""`sae.init_from` a published SAE, through the command line: its folder, a place on the hub, what cannot be."""

from __future__ import annotations

import json
import os
from hashlib import sha256

import numpy as np
import pytest

from sae.checkpoint import load_weights
from sae.runtime import decode, encode
from tests.cli.conftest import ggscope, last_line
from tests.convert.interop.hub_files import Place, write_cache, write_file

from .conftest import TRAIN

D, F = 64, 96  # of the tiny model, and of TRAIN
K = 4
STILL = ["trainer.lr=1e-12", "trainer.tokens=256", "trainer.warmup_steps=0"]
POINT = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    rows_FD = rng.standard_normal((F, D))
    rows_FD /= np.linalg.norm(rows_FD, axis=1, keepdims=True)
    return {
        "encoder.weight": rng.standard_normal((F, D)), "encoder.bias": 0.3 * rng.standard_normal(F),
        "W_dec": rows_FD, "b_dec": rng.standard_normal(D),
    }  # fmt: skip


def sparsify(path, arrays):
    """A folder as sparsify writes it; its name says the block."""
    path.mkdir(parents=True)
    write_file(path / "cfg.json", {"d_in": D, "num_latents": 0, "k": K, "expansion_factor": 1})
    write_file(path / "sae.safetensors", arrays)
    return path


def computes(arrays, weights):
    """Whether the SAE computes what sparsify's equations do with these arrays, in float64."""
    a = {name: array.astype(np.float32).astype(np.float64) for name, array in arrays.items()}
    x_ND = np.random.default_rng(1).standard_normal((50, D))
    acts_NF = np.maximum((x_ND - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"], 0)
    least_N1 = np.sort(acts_NF, axis=1)[:, -K, None]
    expected_ND = np.where(acts_NF >= least_N1, acts_NF, 0) @ a["W_dec"] + a["b_dec"]
    x_ND = x_ND.astype(np.float32)
    found_ND = decode(weights, *encode(weights, x_ND), x_ND)
    return np.linalg.norm(found_ND - expected_ND) < 1e-5 * np.linalg.norm(expected_ND)


def test_training_goes_on_from_a_published_folder(folder, tmp_path, arrays):
    start, run = sparsify(tmp_path / "layers.2", arrays), tmp_path / "run"
    ggscope("train", *TRAIN, *STILL, f"sae.init_from={start}", f"run_dir={run}", cwd=folder)
    weights = load_weights(run / "sae")
    assert weights.W_enc_FD.dtype == np.float32
    assert computes(arrays, weights)
    noted = json.loads((run / "manifest.json").read_text())["inputs"]["init_from"]
    assert noted["sha256"] == sha256((start / "sae.safetensors").read_bytes()).hexdigest()


def test_a_place_on_the_hub_and_a_name_that_says_no_hook_point(folder, tmp_path, arrays, monkeypatch):
    files = {
        "first/cfg.json": {"d_in": D, "num_latents": 0, "k": K, "expansion_factor": 1},
        "first/sae.safetensors": arrays,
    }
    place = Place(repo="someone/saes", inside="first", format="sparsify", hook=POINT, files=files)
    write_cache(tmp_path / "hub", [place])
    for name, value in (("HF_HOME", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setitem(os.environ, name, value)
    done = ggscope("train", *TRAIN, *STILL, f"sae.init_from={place.address}", f"run_dir={tmp_path / 'run'}", cwd=folder)
    assert f"the files do not say for which hook point; taken as {POINT}" in " ".join(done.stderr.split())
    assert computes(arrays, load_weights(tmp_path / "run" / "sae"))
    missing = f"sae.init_from={place.address}/second"
    refused = ggscope("train", *TRAIN, missing, f"run_dir={tmp_path / 'none'}", cwd=folder, code=2)
    assert f"{missing}:" in last_line(refused)


def test_a_published_sae_of_another_hook_point_or_with_rows_of_several_lengths_is_refused(folder, tmp_path, arrays):
    other = sparsify(tmp_path / "a" / "layers.1", arrays)
    done = ggscope("train", *TRAIN, f"sae.init_from={other}", f"run_dir={tmp_path / 'run'}", cwd=folder, code=2)
    assert f"is an SAE of blocks.1.hook_resid_post, the rows are of {POINT}" in last_line(done)
    longer = arrays | {"W_dec": arrays["W_dec"] * np.linspace(1, 2, F)[:, None]}
    start = sparsify(tmp_path / "b" / "layers.2", longer)
    for rows in ("unit", "free"):
        options = [f"sae.init_from={start}", f"sae.decoder_rows={rows}", f"run_dir={tmp_path / rows}"]
        assert "decoder rows of norm 1 to 2" in last_line(ggscope("train", *TRAIN, *options, cwd=folder, code=2))
