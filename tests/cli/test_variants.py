"""Variants and transcoders through the command line: captured, trained, converted, evaluated."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from convert.sae_gguf import read_sae_gguf
from pipeline.config import Config, SAEConfig
from pipeline.ranges import check_ranges
from pipeline.stages.rows import wiring_of
from pipeline.store.reader import ActivationStore
from pipeline.training.settings import train_config
from sae.checkpoint import load_weights
from sae.errors import ConfigError
from sae.runtime import decode, encode

from .conftest import QUICK, ggscope, last_line

POINTS = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
D = 256  # the demo model's width
SMALL = [
    "sae.num_latents=128", "sae.k=8", "trainer.tokens=40960", "trainer.batch_tokens=1024", "trainer.n_threads=1", "trainer.log_steps=1",
    "trainer.warmup_steps=5", "trainer.lr=5e-3",
]  # fmt: skip
FEW = ["corpus.max_documents=3", "evaluate.tokens=500", "evaluate.splice_tokens=300", "model.n_threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of an MLP's input and output."""
    folder = tmp_path_factory.mktemp("variants")
    ggscope("extract", "corpus.max_tokens=6000", QUICK, f"hook.points=[{','.join(POINTS)}]", cwd=folder)
    return folder


def the_store(folder):
    return ActivationStore(next(folder.glob("runs/extract/*/activations.zarr")))


def trained(folder, name, *settings):
    ggscope("train", *SMALL, *settings, f"run_dir={name}", cwd=folder)
    return load_weights(folder / name / "sae"), json.loads((folder / name / "manifest.json").read_text())["metrics"]


def evaluated(folder, name):
    """What the command printed, the numbers, the columns of the latents."""
    done = ggscope("evaluate", f"sae.path={name}/sae", *FEW, f"run_dir=runs/evaluate/{name}", cwd=folder)
    assert (folder / "runs" / "evaluate" / name / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads((folder / "runs" / "evaluate" / name / "evaluation.json").read_text())
    counts = result["density_histogram"]
    assert sum(counts["counts"]) + counts["dead"] == result["num_latents"]
    with np.load(folder / "runs" / "evaluate" / name / "latents.npz") as latents:
        return done, result, dict(latents)


def test_a_skip_transcoder_reconstructs_the_mlps_output_from_its_input(folder):
    points = ["sae.kind=transcoder", f"sae.inputs=[{POINTS[0]}]", f"sae.outputs=[{POINTS[1]}]", "sae.skip=true"]
    weights, metrics = trained(folder, "skip", *points)
    assert (weights.hook, weights.hook_out) == tuple(POINTS)
    store = the_store(folder)
    keep_N = store.column("flags") == 0
    x_ND, y_NO = (store.rows(point, 0, store.n_rows)[keep_N] for point in POINTS)
    found_NO = decode(weights, *encode(weights, x_ND), x_ND)
    fvu = float(((y_NO - found_NO).astype(np.float64) ** 2).sum() / ((y_NO - y_NO.mean(0)) ** 2).sum())
    assert fvu == pytest.approx(metrics["fvu"], rel=0.1)
    assert fvu < 0.6
    few = ["corpus.max_documents=3", "convert.probe_tokens=500"]
    settings = ["convert.source=skip/sae", "convert.encoder_type=F32", "convert.thresholds=latent", *few]
    converted = ggscope("convert", *settings, "run_dir=gguf", cwd=folder)
    assert re.search(r"rows its output has FVU \d\.\de-\d\d against the source's output, L0 8", converted.stdout)
    back = read_sae_gguf(folder / "gguf" / "sae.gguf")
    np.testing.assert_array_equal(back.W_skip_OD, weights.W_skip_OD)
    assert back.variant == "threshold"
    refused = ggscope("drift", "sae.path=skip/sae", cwd=folder, code=2)
    assert "expected an SAE at one hook point, this one is over blocks.1.hook_resid_mid and" in last_line(refused)
    assert "`ggscope apply` reads and edits with it" in last_line(refused)
    done, result, latents = evaluated(folder, "skip")
    low, high = result["ce_recovered_ci95"]
    assert f"from {POINTS[0]}: FVU {result['fvu']:.4f} ({POINTS[1]} {result['fvu']:.4f}), L0 8.0" in done.stdout
    assert f"CE recovered {result['ce_recovered']:.4f} [{low:.4f}, {high:.4f}], delta CE" in done.stdout
    assert "SAE FVU" in done.stdout
    baselines = result["baselines"]
    assert list(baselines) == ["linear", "affine", "mean", "zero"]
    assert (baselines["linear"]["l0"], baselines["affine"]["l0"]) == (8, D)
    assert baselines["affine"]["fvu"] < baselines["linear"]["fvu"] < baselines["zero"]["fvu"]
    assert f"linear map of rank k FVU {baselines['linear']['fvu']:.4f} CE" in done.stdout
    clean, sae, zero = (result[f"ce_{name}"] for name in ("clean", "sae", "zero"))
    assert result["ce_recovered"] == pytest.approx((zero - sae) / (zero - clean), rel=1e-9)
    assert len({clean, sae, zero}) == 3
    assert "encoder_decoder_cosine" not in latents
    assert latents["density"].sum() == pytest.approx(result["l0"], rel=1e-9)
    assert latents["explained_of"].shape == (128, 1)
    assert result["documents_trained_on"] == 0
    refused = ggscope("evaluate", "sae.path=skip/sae", "evaluate.against=skip/sae", *FEW, cwd=folder, code=2)
    assert "evaluate.against is for SAEs at one hook point" in last_line(refused)
    ggscope("extract", "corpus.max_tokens=600", QUICK, f"hook.points=[{POINTS[0]}]", "run_dir=other", cwd=folder)
    other = "store.path=other/activations.zarr"
    refused = last_line(ggscope("evaluate", "sae.path=skip/sae", other, *FEW, cwd=folder, code=2))
    assert f"the store holds {POINTS[0]}, the SAE belongs to {POINTS[1]}" in refused


def test_linear_maps_are_fitted_on_rows_captured_anew_where_the_store_is_not_known(folder, tmp_path):
    found = {}
    for name, *settings in (("with",), ("without", "evaluate.baselines=false")):
        ggscope("evaluate", f"sae.path={folder}/skip/sae", *FEW, *settings, f"run_dir={name}", cwd=tmp_path)
        found[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    before = json.loads((folder / "runs" / "evaluate" / "skip" / "evaluation.json").read_text())
    assert list(found["without"]["baselines"]) == ["mean", "zero"]
    assert found["with"]["fvu"] == found["without"]["fvu"] == before["fvu"]
    linear, of_store = found["with"]["baselines"]["linear"], before["baselines"]["linear"]
    assert linear["fvu"] == pytest.approx(of_store["fvu"], rel=0.2)
    assert linear["fvu"] != of_store["fvu"]


def test_a_crosscoder_reconstructs_both_of_its_hook_points(folder):
    weights, metrics = trained(folder, "cross", "sae.kind=crosscoder", f"sae.inputs=[{','.join(POINTS)}]")
    store = the_store(folder)
    assert weights.ports == tuple((point, store.hooks[point].width) for point in POINTS)
    keep_N = store.column("flags") == 0
    x_ND = np.concatenate([store.rows(point, 0, store.n_rows)[keep_N] for point in POINTS], axis=1).astype(np.float64)
    error_ND = x_ND - decode(weights, *encode(weights, x_ND.astype(np.float32)))
    parts = np.split(np.arange(x_ND.shape[1]), [weights.ports[0][1]])
    of_D = (x_ND - x_ND.mean(0)) ** 2
    fvu = {point: (error_ND[:, at] ** 2).sum() / of_D[:, at].sum() for point, at in zip(POINTS, parts, strict=True)}
    assert max(fvu.values()) < 0.8
    assert 0 < metrics["fvu"] < 1
    assert len(weights.training["scales"]) == 2
    assert "scale" not in weights.training
    _, result, latents = evaluated(folder, "cross")
    assert set(result["fvu_of"]) == set(POINTS)
    assert max(result["fvu_of"].values()) < 1
    assert result["l0"] == pytest.approx(8, abs=1e-6)
    assert list(result["baselines"]) == ["pca", "mean", "zero"]
    assert latents["outputs"].tolist() == POINTS
    assert latents["explained_of"].shape == latents["decoder_norm_of"].shape == (128, 2)
    np.testing.assert_allclose(latents["decoder_norm"], 1, rtol=1e-5)  # at the scales it was trained at
    assert sum(result["dictionary"]["encoder_decoder_cosine"]["counts"]) == 128
    (row,) = json.loads(ggscope("compare", "cross", "format=json", cwd=folder).stdout)
    assert row["hook"] == " ".join(POINTS)
    compared = ("held_out_fvu", "ce_recovered", "delta_ce_nats")
    assert tuple(row[key] for key in compared) == (result["fvu"], result["ce_recovered"], result["delta_ce_nats"])
    refused = last_line(ggscope("apply", "sae.path=cross/sae", "--prompt", "x", cwd=folder, code=2))
    assert "or a transcoder of one input and one output, this one is over blocks.1.hook_resid_mid and" in refused
    assert refused.endswith("`ggscope evaluate` measures it, `compare` shows it beside others")


def test_a_variant_is_trained_and_another_one_goes_on_from_it(folder):
    at = [f"hook.points=[{POINTS[1]}]"]
    first, metrics = trained(folder, "batchtopk", *at, "sae.variant=batchtopk", "sae.b_dec_init=geometric_median")
    assert first.variant == "threshold"
    assert first.training["config"]["variant"] == "batchtopk"
    settings = ["sae.variant=jumprelu", "sae.init_from=batchtopk", "trainer=signum", "trainer.lr=1e-5"]
    second, after = trained(folder, "jumprelu", *at, *settings)
    assert after["fvu"] < 1.3 * metrics["fvu"] < 0.7
    assert second.training["config"]["optimizer"] == "signum"


def test_settings_that_do_not_go_together_are_refused(folder):
    store = the_store(folder)
    with pytest.raises(ConfigError, match=r"sae\.variant='vanilla'; expected topk, batchtopk"):
        check_ranges(Config(sae=SAEConfig(variant="vanilla")))
    with pytest.raises(ConfigError, match="num_latents divisible by k"):
        train_config(Config(sae=SAEConfig(variant="groupmax", k=7)))
    for sae, said in (
        (SAEConfig(kind="crosscoder", inputs=POINTS[:1]), "a crosscoder reads at least 2 hook points, got 1"),
        (SAEConfig(kind="crosscoder", inputs=["blocks.0.hook_resid_mid"]), "no blocks.0.hook_resid_mid; it holds"),
        (SAEConfig(kind="transcoder", inputs=["blocks.*.hook_resid_mid"]), "no blocks"),
    ):
        with pytest.raises(ConfigError, match=said):
            wiring_of(store, Config(sae=sae))
    wiring = wiring_of(store, Config(sae=SAEConfig(kind="transcoder", inputs=POINTS[:1], outputs=POINTS[1:])))
    assert [name for name, _ in (*wiring.inputs, *wiring.outputs)] == POINTS
