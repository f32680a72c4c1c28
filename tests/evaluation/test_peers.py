"""Our numbers beside SAEBench, SAELens and dictionary_learning on the same arrays: equal where the definitions are.

RECORDED is what the peers' own functions answered (peer_metrics.py; sae-lens 6.54.12, dictionary-learning 0.1.0,
sae-bench 0.6.0); the long test asks them again (`make bench-env`). Their definitions
are written out in float64 below, and each is held to its recorded figure, so that a stated difference is a real one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.saebench import core_metrics
from sae.dictionary import nearest
from sae.metrics import ReconstructionMetrics
from tests.peers import peers, without_ggscope

B, T, D, F = 6, 64, 12, 40
RECORDED = {
    "sae_lens": {
        "l2_norm_in": 20.11907958984375, "l2_norm_out": 18.098100662231445, "l2_ratio": 0.8996092677116394,
        "relative_reconstruction_bias": 0.9002292156219482, "l0": 4.572916507720947, "l1": 4.788379669189453,
        "explained_variance": 0.8210450438010666, "explained_variance_legacy": 0.7328991889953613,
        "mse": 4.668332576751709, "cossim": 0.9992790818214417,
    },
    "dictionary_learning": {
        "l2_loss": 2.145793636639913, "l1_loss": 4.788379669189453, "l0": 4.572916666666667,
        "frac_variance_explained": 0.9704884886741638, "cossim": 0.9992792010307312, "l2_ratio": 0.8996092875798544,
        "relative_reconstruction_bias": 0.9002291758855184, "frac_alive": 0.9750000238418579,
    },
    "sae_bench": {
        "l2_norm_in": 20.11907958984375, "l2_norm_out": 18.098100662231445, "l2_ratio": 0.8996092677116394,
        "relative_reconstruction_bias": 0.9002292156219482, "l0": 4.572916507720947, "l1": 4.788379669189453,
        "explained_variance": 1.006271481513977, "explained_variance_legacy": 0.7328991889953613,
        "mse": 0.07294269651174545, "cossim": 0.9992790818214417,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    """Rows far from zero and wider in some dimensions, a reconstruction a tenth too short."""
    rng = np.random.default_rng(0)
    x_BTD = (8 * rng.standard_normal(D) + rng.standard_normal((B, T, D)) * np.geomspace(0.3, 3, D)).astype("f4")
    fires = rng.uniform(0.1, 2, (B, T, F)), rng.random((B, T, F)) < np.geomspace(0.6, 0.002, F)
    acts_BTF = (fires[0] * fires[1]).astype("f4")
    x_hat_BTD = (0.9 * x_BTD + 0.2 * rng.standard_normal(x_BTD.shape)).astype("f4")
    return {
        "x_BTD": x_BTD, "x_hat_BTD": x_hat_BTD, "acts_BTF": acts_BTF, "W_DF": rng.standard_normal((D, F)).astype("f4"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ours(arrays):
    """(our metrics, the same under SAEBench's names); what has nothing to do with the arrays is made up."""
    metrics = ReconstructionMetrics(D, F)
    for x_TD, x_hat_TD, acts_TF in zip(arrays["x_BTD"], arrays["x_hat_BTD"], arrays["acts_BTF"], strict=True):
        idx_TF = np.broadcast_to(np.arange(F), acts_TF.shape)
        metrics.update(x_TD, x_hat_TD, idx_TF, acts_TF)
    result = metrics.result()
    losses = {"kl": 0.5, "ce_recovered": 0.75, "ce_zero": 9.0, "ce_sae": 4.5, "ce_clean": 3.0, "splice_rows": 7}
    result |= {"baselines": {"zero": {"kl": 2.0}}, **losses}
    return result, core_metrics(result, {"density": result["density_F"]}, D)


def flat(nested):
    return {name: value for group in nested.values() for name, value in group.items()}


@pytest.mark.parametrize(("peer", "names"), [
    ("sae_lens", ["l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "explained_variance", "mse", "cossim"]),
    ("sae_bench", ["l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "cossim"]),
    ("dictionary_learning", ["l0", "cossim", "l2_ratio", "relative_reconstruction_bias", "frac_alive"]),
])  # fmt: skip
def test_what_a_peer_defines_as_we_do_has_its_figure(ours, peer, names):
    found = flat(ours[1])
    for name in names:
        # the bias is a mean over batches there and one ratio here; the rest is float32
        assert found[name] == pytest.approx(RECORDED[peer][name], rel=2e-5), name


def test_saebench_s_explained_variance_subtracts_squared_second_moments_where_the_mean_belongs(arrays, ours):
    x, y = (arrays[k].astype(np.float64) for k in ("x_BTD", "x_hat_BTD"))
    second_BD = (x**2).mean(axis=1)
    theirs = 1 - ((x - y) ** 2).sum(-1).mean() / ((x**2).sum(-1).mean() - second_BD.mean() ** 2)
    assert theirs == pytest.approx(RECORDED["sae_bench"]["explained_variance"], rel=1e-5)
    flat_x = x.reshape(-1, D)
    truth = 1 - ((x - y) ** 2).sum() / ((flat_x - flat_x.mean(axis=0)) ** 2).sum()
    assert ours[1]["reconstruction_quality"]["explained_variance"] == pytest.approx(truth, rel=1e-9)
    assert theirs > 1 > truth  # here it exceeds what a perfect copy would get


def test_the_legacy_explained_variance_is_a_mean_of_ratios_of_single_rows(arrays, ours):
    x, y = (arrays[k].astype(np.float64) for k in ("x_BTD", "x_hat_BTD"))
    ratios = ((x - y) ** 2).sum(-1) / ((x - x.mean(axis=1, keepdims=True)) ** 2).sum(-1)
    assert 1 - ratios.mean() == pytest.approx(RECORDED["sae_lens"]["explained_variance_legacy"], rel=1e-5)
    assert ours[1]["reconstruction_quality"]["explained_variance_legacy"] is None


def test_saebench_s_mse_is_the_squared_error_of_a_row_once_more_divided_by_the_rows_of_its_batch(arrays, ours):
    error = ((arrays["x_BTD"].astype(np.float64) - arrays["x_hat_BTD"]) ** 2).sum(-1)
    assert error.mean() / T == pytest.approx(RECORDED["sae_bench"]["mse"], rel=1e-5)
    assert ours[1]["reconstruction_quality"]["mse"] == pytest.approx(error.mean(), rel=1e-9)
    assert ours[0]["mse"] == pytest.approx(error.mean() / D, rel=1e-9)


def test_dictionary_learning_s_explained_variance_does_not_see_a_constant_error(arrays, ours):
    x, y = (arrays[k].astype(np.float64) for k in ("x_BTD", "x_hat_BTD"))

    def theirs(y):
        shares = [
            1 - (a - b).var(axis=0, ddof=1).sum() / a.var(axis=0, ddof=1).sum() for a, b in zip(x, y, strict=True)
        ]
        return np.mean(shares)

    assert theirs(y) == pytest.approx(RECORDED["dictionary_learning"]["frac_variance_explained"], rel=1e-5)
    assert theirs(y + 100) == pytest.approx(theirs(y), rel=1e-9)
    assert 1 - ours[0]["fvu"] < theirs(y) - 0.1
    assert np.sqrt(((x - y) ** 2).sum(-1)).mean() == pytest.approx(RECORDED["dictionary_learning"]["l2_loss"], rel=1e-5)


def test_scores_and_frequencies_have_saebench_s_definitions(arrays, ours):
    core = flat(ours[1])
    assert core["kl_div_score"] == (2.0 - 0.5) / 2.0
    assert core["ce_loss_score"] == (9.0 - 4.5) / (9.0 - 3.0) == 0.75
    inverse = (9.0 - 3.0) / (9.0 - 4.5)  # the ratio that OpenMOSS reports: above 1 where something is lost
    assert core["ce_loss_score"] == pytest.approx(1 / inverse)
    density_F = (arrays["acts_BTF"] > 0).mean(axis=(0, 1))
    for percent in (1, 10):
        over = density_F > percent / 100
        assert core[f"freq_over_{percent}_percent"] == over.mean()
        assert core[f"normalized_freq_over_{percent}_percent"] == pytest.approx(density_F[over].sum() / density_F.sum())
    assert core["frac_alive"] == (density_F > 0).mean()


@pytest.mark.long
def test_the_recorded_figures_are_still_what_the_peers_answer(arrays, ours, tmp_path):
    python = peers()
    np.savez(tmp_path / "arrays.npz", **arrays)
    script = Path(__file__).with_name("peer_metrics.py")
    command = [python, script, tmp_path / "arrays.npz"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_ggscope())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for peer, recorded in RECORDED.items():
        for name, value in recorded.items() if peer in found else ():
            assert found[peer][name] == pytest.approx(value, rel=1e-5), (peer, name)
    np.testing.assert_allclose(found["sae_lens"]["feature_density"], ours[0]["density_F"], rtol=1e-6)
    if bench := found.get("sae_bench"):
        np.testing.assert_allclose(bench["max_cosine_sim"], nearest(arrays["W_DF"].T)[0], atol=1e-6)
        for name, value in ours[1]["misc_metrics"].items():
            if "cosine" not in name:
                assert bench[name] == pytest.approx(value, rel=1e-5), name
