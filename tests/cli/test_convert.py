"""`ggscope convert` where something is wrong with the file it would write, and the rows that thresholds are fitted on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import ModelConfig
from pipeline.llama.identity import model_id
from pipeline.stages.inputs import model_path
from sae.checkpoint import load_weights, save_weights
from sae.untrained import untrained_weights
from tests.cli.conftest import ggscope, last_line

D, F, K = 256, 512, 8
FEW = ["model.n_threads=1", "convert.probe_tokens=600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE of the demo model that nobody trained, and one whose rows no block of 4 bits can hold."""
    folder = tmp_path_factory.mktemp("convert")
    host, rng = model_id(model_path(ModelConfig())).as_dict(), np.random.default_rng(0)
    x_ND = rng.standard_normal((64, D)) * 8
    sae = untrained_weights(D, F, K, np.zeros(D), 1.0, "blocks.3.hook_resid_post", host, 0, sample_ND=x_ND)
    save_weights(folder / "plain", sae)
    W_enc_FD = sae.W_enc_FD.copy()
    W_enc_FD[:, ::32] = 3  # the same for all latents, so the others decide, which round to zero beside it
    save_weights(folder / "unequal", replace(sae, W_enc_FD=W_enc_FD, b_enc_F=np.full(F, 1e3)))
    return folder


def test_a_file_that_fails_its_check_is_not_written_and_the_one_before_stays(folder):
    ggscope("convert", "sae.path=plain", "convert.out=keep.gguf", *FEW, cwd=folder)
    before = (folder / "keep.gguf").read_bytes()
    low = ["sae.path=unequal", "convert.encoder_type=Q4_0"]
    for out in ("keep.gguf", "new.gguf"):
        refused = last_line(ggscope("convert", *low, f"convert.out={out}", *FEW, cwd=folder, code=3))
        assert re.search(rf"{out} \(encoder Q4_0.*\) does not match its source: .*; it was not written", refused)
    assert (folder / "keep.gguf").read_bytes() == before
    assert not [path for path in folder.rglob("*.gguf*") if path.name != "keep.gguf"]


def test_what_a_library_has_no_form_for_is_refused_before_anything_is_written(folder):
    save_weights(folder / "groups", replace(load_weights(folder / "plain"), variant="groupmax"))
    refused = ggscope("convert", "sae.path=groups", "convert.export=saelens", "run_dir=ex", *FEW, cwd=folder, code=2)
    assert "SAELens has no groupmax SAEs" in last_line(refused)
    assert not list((folder / "ex").rglob("*.gguf"))


@pytest.mark.parametrize("mode", ["global", "latent"])
def test_thresholds_keep_their_l0_on_other_rows_and_say_what_they_change(folder, mode):
    settings = [f"convert.thresholds={mode}", "model.n_threads=1", f"run_dir={mode}"]
    done = ggscope("convert", "sae.path=plain", *settings, cwd=folder)
    said = " ".join(done.stderr.split())
    found = re.search(
        rf"thresholds \({mode}\), fitted on (4,\d+) held-out rows: FVU (\S+) -> (\S+), L0 8.00 -> (\S+)", said
    )
    assert found
    assert float(found[4]) == pytest.approx(8, rel=0.01)
    assert 0 < float(found[2]) != float(found[3])
    few = ["evaluate.tokens=6000", "evaluate.splice_tokens=300", "evaluate.baselines=false", "model.n_threads=1"]
    ggscope("evaluate", f"sae.path={mode}/sae.gguf", *few, f"run_dir=of_{mode}", cwd=folder)
    result = json.loads((folder / f"of_{mode}" / "evaluation.json").read_text())
    assert result["l0"] == pytest.approx(8, rel=0.1)
