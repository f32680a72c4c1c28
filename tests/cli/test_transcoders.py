"""Transcoders through `ggscope apply`: read, steered, clamped, ablated, put in place of the MLP; folder and GGUF."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from convert.sae_gguf import write_sae_gguf
from pipeline.cli import main
from pipeline.llama.hooks import HookPoint
from pipeline.llama.identity import model_id
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session, capture
from sae.checkpoint import save_weights
from sae.untrained import untrained_weights
from sae.weights import SAEWeights

MODEL = str(resources.files("pipeline") / "data" / "pylm.gguf")
MID, OUT = "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"
D, F, K = 256, 512, 8


def transcoder() -> SAEWeights:
    """Random directions, with a skip matrix."""
    w = untrained_weights(D, F, K, np.zeros(D), 1.0, MID, model_id(MODEL).as_dict(), 0)
    skip_OD = 0.05 * np.random.default_rng(1).standard_normal((D, D)).astype(np.float32)
    return replace(w, hook_out=OUT, b_dec_subtracted=False, W_skip_OD=skip_OD, ports=((MID, D), (OUT, D)))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoders")
    w = transcoder()
    save_weights(folder / "folder", w)
    return {
        "weights": w, "folder": folder / "folder",
        "F32": write_sae_gguf(folder / "f32.gguf", w, encoder_type="F32", decoder_type="F32"),
        "Q8_0": write_sae_gguf(folder / "q8.gguf", w, encoder_type="Q8_0", decoder_type="Q8_0"),
    }  # fmt: skip


@pytest.fixture
def apply(places, tmp_path, monkeypatch, capsys):
    """Events of an apply in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, sae="folder", code=0):
        options = [f"sae.path={places[sae]}", "apply.format=jsonl", "apply.max_tokens=4", "model.n_threads=1"]
        assert main(["apply", *options, *args, "--prompt", "import os\n"]) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return [json.loads(line) for line in said.out.splitlines()] if code == 0 else said.err.strip().splitlines()[-1]

    return call


def of_events(events, *, edit=None):
    """x at MID, y at OUT and log p of every token, recomputed in one pass; `edit`: rows added at OUT."""
    tokens = np.array([e["token"] for e in events], np.int32)
    with Model(MODEL) as model, Session(model, n_ctx=64, n_threads=1) as s:
        (rows,) = capture(s, [tokens], [HookPoint.parse(MID), HookPoint.parse(OUT)], stop_early=False)
        places_N = np.arange(len(tokens))
        hooks = [] if edit is None else [Hook(HookPoint.parse(OUT), edit=lambda rows: edit[rows.pos_N])]
        logits = s.decode(tokens, 0 * places_N, places_N, hooks=hooks, logits="all").astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return rows[MID].astype(np.float64), rows[OUT].astype(np.float64), log_p[places_N[:-1], tokens[1:]]


def acts(w, x_ND):
    a_NF = np.maximum(x_ND @ w.W_enc_FD.astype(np.float64).T + w.b_enc_F, 0)
    a_NF[a_NF < np.sort(a_NF, axis=1)[:, [-w.k]]] = 0
    return a_NF


@pytest.mark.parametrize(
    ("sae", "encoder"), [("folder", "numpy"), ("folder", "ggml"), ("F32", "ggml"), ("F32", "numpy")]
)
def test_every_token_is_read_at_the_input_and_held_against_the_output(places, apply, tmp_path, sae, encoder):
    w, events = places["weights"], apply(f"apply.encoder={encoder}", "run_dir=read", sae=sae)
    x_TD, y_TD, _ = of_events(events)
    a_TF = acts(w, x_TD)
    gap_TD = y_TD - (a_TF @ w.W_dec_FD.astype(np.float64) + w.b_dec_D + x_TD @ w.W_skip_OD.astype(np.float64).T)
    for event in events[1:]:
        (reading,) = event["readings"]
        assert (reading["hook"], reading["hook_out"], reading["l0"]) == (MID, OUT, K)
        order = np.argsort(-a_TF[event["pos"]])[:3]
        assert [latent for latent, _ in reading["latents"]] == order.tolist()
        np.testing.assert_allclose([a for _, a in reading["latents"]], a_TF[event["pos"], order], rtol=2e-3)
        assert event["fvu"] == pytest.approx((gap_TD[event["pos"]] ** 2).sum(), rel=2e-3)
    metrics = json.loads((tmp_path / "read" / "manifest.json").read_text())["metrics"]
    assert metrics["fvu"] == pytest.approx(np.mean([e["fvu"] for e in events[1:]]))
    assert (metrics["encoder"] == "numpy") == (encoder == "numpy")


@pytest.mark.parametrize("kind", ["steer", "clamp", "ablate", "reconstruct"])
def test_an_edit_is_the_same_rows_added_by_hand_at_the_output(places, apply, kind):
    w, plain = places["weights"], apply()
    latents = [latent for latent, _ in plain[2]["latents"][:2]]
    more = {"steer": "coeffs:[30,-20]", "clamp": "values:[40,10]", "ablate": "", "reconstruct": ""}[kind]
    named = "" if kind == "reconstruct" else f",latents:{latents}".replace(" ", "")
    events = apply(f"apply.interventions=[{{kind:{kind}{named}{',' + more if more else ''}}}]")
    x_TD, y_TD, _ = of_events(events)
    a_TF, W_FD = acts(w, x_TD), w.W_dec_FD.astype(np.float64)
    value_T2 = {"clamp": np.array([40, 10]) - a_TF[:, latents], "ablate": -a_TF[:, latents]}.get(kind)
    if kind == "steer":
        delta_TD = np.tile(30 * W_FD[latents[0]] - 20 * W_FD[latents[1]], (len(events), 1))
    elif kind == "reconstruct":
        delta_TD = a_TF @ W_FD + w.b_dec_D + x_TD @ w.W_skip_OD.astype(np.float64).T - y_TD
    else:
        delta_TD = value_T2 @ W_FD[latents]
    delta_TD[0] = 0  # BOS
    *_, log_p = of_events(events, edit=delta_TD.astype(np.float32))
    np.testing.assert_allclose([e["logprob"] for e in events[1:]], log_p, atol=5e-3)
    *_, log_p = of_events(events)
    assert np.abs(np.array([e["logprob"] for e in events[1:]]) - log_p).max() > 0.02


def test_no_change_is_the_plain_run_and_the_kept_error_nearly(apply):
    plain = apply()
    assert apply("intervention=steer", "intervention.latents=[5]", "intervention.coeff=0") == plain
    kept = apply("intervention=reconstruct", "intervention.keep_error=true")
    np.testing.assert_allclose([e["logprob"] for e in kept[1:]], [e["logprob"] for e in plain[1:]], atol=2e-2)


def test_a_q8_0_file_and_several_at_once_work_through_the_same_readings(places, apply, tmp_path):
    events = apply(f"apply.also=[{places['Q8_0']}]", "run_dir=both")
    for event in events[1:]:
        first, second = event["readings"]
        assert (second["hook"], second["hook_out"]) == (MID, OUT)
        assert second["fvu"] == pytest.approx(first["fvu"], rel=0.05)
    (also,) = json.loads((tmp_path / "both" / "manifest.json").read_text())["metrics"]["also"]
    assert (also["hook"], also["hook_out"]) == (MID, OUT)
    assert apply("intervention=clamp", "intervention.latents=[5]", "intervention.value=30", sae="Q8_0") != events


def test_the_transcoder_of_a_point_the_model_lacks_is_one_line(places, apply, tmp_path):
    save_weights(tmp_path / "odd", replace(places["weights"], hook="blocks.9.hook_resid_mid", ports=()))
    assert "no hook point 'blocks.9.hook_resid_mid'" in apply(f"apply.also=[{tmp_path / 'odd'}]", code=2)
    save_weights(tmp_path / "back", replace(places["weights"], hook=OUT, hook_out=MID, ports=()))
    assert "expected a transcoder's input before its output" in apply(f"sae.path={tmp_path / 'back'}", code=2)
