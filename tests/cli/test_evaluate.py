"""`ggscope evaluate` with everything on: files, keys, picture, and the package that is missing said beforehand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from pipeline.config import ModelConfig
from pipeline.llama.identity import model_id
from pipeline.stages.inputs import model_path
from sae.checkpoint import load_weights, save_weights
from sae.untrained import untrained_weights
from tests.cli.conftest import ggscope, last_line

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
D, F, K = 256, 512, 8
SMALL = ["evaluate.tokens=1500", "evaluate.splice_tokens=500", "evaluate.baselines=false", "model.n_threads=1"]
SMALL += ["corpus.max_documents=60", "corpus.context_tokens=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SAEs of the demo model that nobody trained, and texts whose label is a word in them."""
    folder = tmp_path_factory.mktemp("evaluate")
    host = model_id(model_path(ModelConfig())).as_dict()
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((64, D)) * 8
    for name, block, seed in (("a", 3, 0), ("b", 3, 1), ("c", 1, 2)):
        hook = f"blocks.{block}.hook_resid_post"
        mean_D, variance = x_ND.mean(axis=0), float((x_ND**2).sum(axis=1).mean())
        save_weights(
            folder / name, untrained_weights(D, F, K, mean_D, variance, hook, host, seed, sample_ND=x_ND)
        )  # fmt: skip
    with (folder / "texts.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["code", "kind"])
        for i in range(24):
            body = f"for item_{i} in range({i}):\n    print(item_{i})\n" * 2
            writer.writerow(
                [body if i % 2 else f"class Node{i}(Base):\n    def __init__(self):\n        pass\n", f"kind {i % 2}"]
            )
    return folder


def test_everything_asked_for_is_in_the_files_and_in_the_line(folder):
    done = ggscope(
        "evaluate", "sae.path=a", "evaluate.also=[c]", "evaluate.against=b", "evaluate.probe=texts.csv",
        "evaluate.probe_text=code", "evaluate.probe_label=kind", "evaluate.probe_k=[1,3]", "evaluate.structure_latents=100",
        "run_dir=all", *SMALL, cwd=folder,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["input", "result", "output"]
    result = json.loads((folder / "all" / "evaluation.json").read_text())
    assert set(result) >= {"fvu", "dense_share", "dictionary", "saebench", "joint", "stability", "probing"}
    assert result["documents_trained_on"] is None, "without a store nobody looked"
    joint = result["joint"]
    low, high = joint["ce_recovered_ci95"]
    assert f"2 SAEs together: CE recovered {joint['ce_recovered']:.4f} [{low:.4f}, {high:.4f}], delta CE" in lines[1]
    assert f"CE recovered {result['ce_recovered']:.4f} [{result['ce_recovered_ci95'][0]:.4f}, " in lines[1]
    assert joint["hooks"] == ["blocks.3.hook_resid_post", "blocks.1.hook_resid_post"]
    assert joint["delta_ce_nats"] > 0
    core = result["saebench"]["core"]
    assert core["reconstruction_quality"]["explained_variance"] == pytest.approx(1 - result["fvu"], rel=1e-12)
    assert core["reconstruction_quality"]["mse"] == pytest.approx(D * result["mse"], rel=1e-12)
    assert core["model_performance_preservation"]["ce_loss_score"] == result["ce_recovered"]
    probing = result["probing"]
    assert probing["texts"] == 24
    assert probing["ks"] == [1, 3]
    assert probing["majority"]["accuracy"] == 0.5
    assert probing["dense"]["accuracy"] == 1  # loops and classes: any model's activations tell them apart
    named = result["saebench"]["sparse_probing"]
    assert named["llm"].keys() == {"llm_test_accuracy", "llm_top_1_test_accuracy", "llm_top_3_test_accuracy"}
    assert named["llm"]["llm_top_3_test_accuracy"] == probing["raw_top_3"]["accuracy"]
    assert named["sae"] == {f"sae_top_{k}_test_accuracy": probing[f"sae_top_{k}"]["accuracy"] for k in (1, 3)}
    assert 0 <= result["stability"]["shared"] < 0.2  # two seeds without a training share nothing but chance
    assert result["dictionary"]["searched"] == 100
    assert (folder / "all" / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_of_the_latents_agrees_with_the_weights_and_the_metrics(folder):
    weights = load_weights(folder / "a")
    result = json.loads((folder / "all" / "evaluation.json").read_text())
    latents = np.load(folder / "all" / "latents.npz")
    assert {len(latents[name]) for name in latents.files} == {F}
    assert latents["density"].sum() == pytest.approx(result["l0"], rel=1e-9)
    assert (latents["density"] == 0).mean() == result["dead_share"]
    assert (latents["density"] > 0.1).mean() == result["dense_share"]
    assert (latents["density"] * latents["mean_on"]).sum() == pytest.approx(
        result["saebench"]["core"]["sparsity"]["l1"], rel=1e-6
    )
    assert (latents["max"] >= latents["mean_on"] * (1 - 1e-6)).all()
    searched = np.flatnonzero(latents["decoder_nearest_latent"] >= 0)
    assert len(searched) == 100
    assert np.isnan(latents["decoder_nearest"]).sum() == F - 100
    unit = weights.W_dec_FD / np.linalg.norm(weights.W_dec_FD, axis=1, keepdims=True)
    neighbour = latents["decoder_nearest_latent"][searched]
    np.testing.assert_allclose(
        latents["decoder_nearest"][searched], (unit[searched] * unit[neighbour]).sum(1), atol=1e-5
    )
    assert result["dictionary"]["decoder_nearest"]["mean"] == pytest.approx(
        np.nanmean(latents["decoder_nearest"]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["evaluate.also=[b]"], "SAEs spliced together need a hook point each"),
        (["evaluate.against=c"], "evaluate.against: expected an SAE of blocks.3.hook_resid_post"),
        (["evaluate.probe=texts.csv"], "expected a column 'text' (evaluate.probe_text), found code, kind"),
        (["evaluate.probe=none.csv"], "none.csv: cannot be read as CSV"),
        (["evaluate.probe_k=[0]"], "evaluate.probe_k=0: expected a number of at least 1"),
        (["evaluate.probe=texts.csv", "evaluate.probe_k=[1,300]"], "expected at most 256, this SAE has 512 latents of width 256"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_costs_one_line_and_no_minutes(folder, settings, says):
    done = ggscope("evaluate", "sae.path=a", *settings, *SMALL, cwd=folder, code=2)
    assert says in last_line(done)
