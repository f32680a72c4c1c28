"""The drift of an SAE on a model small enough to repeat in float64, and against `evaluate` on the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import DriftConfig, EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.drift import Setting, capture_reference, forms_of, groups_of, measure_model
from pipeline.evaluation.drift_picture import draw_drift
from pipeline.evaluation.evaluate import evaluate
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.requantise import write_requantised
from pipeline.llama.session import Session, capture
from sae.errors import ConfigError
from sae.untrained import untrained_weights
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK, K = "blocks.2.hook_resid_post", 8
TYPES = ["F32", "Q8_0", "Q4_0/BF16"]


def rows_of(model, table):
    with Session(model, n_ctx=512, n_seq_max=4, **ONE) as session:
        tokens = [table.window_tokens(w) for w in range(table.n_windows)]
        return np.concatenate([c[HOOK] for c in capture(session, tokens, [HookPoint.parse(HOOK)])])


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    write_tiny_llama(folder / "f32.gguf")
    write_requantised(folder / "f32.gguf", folder / "q4.gguf", "Q4_0", n_threads=1)
    found, rows = [], []
    for name in ("f32", "q4"):
        with Model(folder / f"{name}.gguf") as model:
            if not found:
                documents = [
                    Document(name=f"{i}.py", text=f"def f{i}(a):\n    return {i} * a\n" * 3) for i in range(12)
                ]
                table = windows(model, documents, 32)
                x_ND = rows_of(model, table)[table.flags_N == 0].astype(np.float64)
                variance = float(((x_ND - x_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
                weights = untrained_weights(64, 128, K, x_ND.mean(axis=0), variance, HOOK, {}, 0, sample_ND=x_ND)
                config = DriftConfig(tokens=0, splice_tokens=0)
                setting = Setting(weights=weights, table=table, config=config, session=ONE)
                reference = capture_reference(setting, model)
            found.append(measure_model(setting, model, forms_of(TYPES), reference))
            rows.append(rows_of(model, table)[table.flags_N == 0].astype(np.float64))
            if name == "q4":
                whole = evaluate(
                    model, weights, table, config=EvaluateConfig(tokens=0, splice_tokens=0), baselines={}, session=ONE
                )
    return weights, found, rows, whole


def acts(weights, W_enc_FD, x_ND):
    pre_NF = (x_ND - weights.b_dec_D) @ W_enc_FD.astype(np.float64).T + weights.b_enc_F
    return np.where(pre_NF >= np.sort(pre_NF, axis=1)[:, [-K]], np.maximum(pre_NF, 0), 0)


def q4_0(W_FD):
    """Q4_0 by its definition in numpy, blocks of 32: scale = the value of the largest magnitude / -8 as F16."""
    blocks = W_FD.reshape(-1, 32)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = top / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, 0, 1 / scale)
    q = np.clip(np.trunc(blocks * inverse + np.float32(8.5)), 0, 15)
    return ((q - 8) * scale.astype(np.float16).astype(np.float64)).reshape(W_FD.shape)


def bf16(W_FD):
    bits = W_FD.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def test_fvu_l0_and_overlap_equal_float64_on_either_model(drift):
    weights, found, rows, _ = drift
    matrices = {
        "F32": (weights.W_enc_FD, weights.W_dec_FD),
        "Q4_0/BF16": (q4_0(weights.W_enc_FD), bf16(weights.W_dec_FD)),
    }
    reference_NF = acts(weights, weights.W_enc_FD, rows[0]) > 0
    for x_ND, model in zip(rows, found, strict=True):
        forms = {form["types"]: form for form in model["forms"]}
        for name, (W_enc_FD, W_dec_FD) in matrices.items():
            a_NF = acts(weights, W_enc_FD, x_ND)
            gap_ND = x_ND - a_NF @ W_dec_FD - weights.b_dec_D
            assert forms[name]["fvu"] == pytest.approx(
                (gap_ND**2).sum() / ((x_ND - x_ND.mean(axis=0)) ** 2).sum(), rel=1e-4
            )
            assert forms[name]["l0"] == pytest.approx((a_NF > 0).sum(axis=1).mean(), abs=1e-2)
            both = ((a_NF > 0) & reference_NF).sum(axis=1) / np.maximum(
                (a_NF > 0).sum(axis=1), reference_NF.sum(axis=1)
            )
            assert forms[name]["top_k_overlap"] == pytest.approx(both.mean(), abs=2e-3)
            assert forms[name]["rows"] == len(x_ND)


def test_the_reference_overlaps_with_itself_and_coarser_types_drift_further(drift):
    _, (own, quantised), rows, _ = drift
    overlap = [form["top_k_overlap"] for form in own["forms"]]
    assert overlap[0] == 1
    assert 1 > overlap[1] > overlap[2] > 0.3
    assert all(a["top_k_overlap"] > b["top_k_overlap"] for a, b in zip(own["forms"], quantised["forms"], strict=True))
    assert own["activation_fvu"] == 0
    moved = ((rows[1] - rows[0]) ** 2).sum() / ((rows[0] - rows[0].mean(axis=0)) ** 2).sum()
    assert quantised["activation_fvu"] == pytest.approx(moved, rel=1e-5)
    assert moved > 1e-4
    sizes = [form["matrix_bytes"] for form in own["forms"]]
    assert sizes == [2 * 128 * 64 * 4, 2 * 128 * 64 * 34 // 32, 128 * 64 * 18 // 32 + 128 * 64 * 2]


def test_the_losses_are_those_of_evaluate_on_that_model(drift):
    _, (_, quantised), _, whole = drift
    form = quantised["forms"][0]
    for key in ("ce_recovered", "ce_recovered_mean", "delta_ce_nats", "delta_ce_ci95", "kl", "ce_sae", "fvu", "l0"):
        assert form[key] == pytest.approx(whole[key], rel=1e-6), key
    for key in ("ce_clean", "ce_zero", "ce_mean", "splice_rows", "clusters", "cluster_kind"):
        assert quantised[key] == whole[key], key


def test_forms_measured_one_after_the_other_give_the_same_numbers(drift, tmp_path):
    weights, found, _, _ = drift
    forms = forms_of(TYPES)
    assert [len(group) for group in groups_of(forms, weights, 0)] == [1, 1, 1]
    assert [len(group) for group in groups_of(forms, weights, 2 * 2 * 128 * 64 * 4)] == [2, 1]
    write_tiny_llama(tmp_path / "f32.gguf")
    with Model(tmp_path / "f32.gguf") as model:
        documents = [Document(name=f"{i}.py", text=f"def f{i}(a):\n    return {i} * a\n" * 3) for i in range(12)]
        config = DriftConfig(tokens=0, splice_tokens=0, copies_bytes=0)
        setting = Setting(weights=weights, table=windows(model, documents, 32), config=config, session=ONE)
        assert measure_model(setting, model, forms, capture_reference(setting, model)) == found[0]


def test_types_that_no_file_has_are_refused():
    assert [(f.encoder_type, f.decoder_type) for f in forms_of(["Q4_0", "Q4_0/F16"])] == [
        ("Q4_0", "Q4_0"),
        ("Q4_0", "F16"),
    ]
    for names, said in (
        (["Q4_K"], "ENCODER/DECODER, got 'Q4_K'"),
        (["F16/"], None),
        (["/F16"], "got '/F16'"),
        ([], "got none"),
        (["F16", "F16"], "each type once"),
    ):
        if said is None:
            assert forms_of(names)[0].decoder_type == "F16"
            continue
        with pytest.raises(ConfigError, match=said):
            forms_of(names)


def test_the_picture_shows_every_model_also_without_intervals(drift, tmp_path):
    from matplotlib.image import imread

    _, found, _, _ = drift
    models = [{"name": f"{i}", **one} for i, one in enumerate(found)]
    models[1]["forms"][0] |= {"ce_recovered": None, "kl_ci95": [None, None], "l0": 9.0}
    draw_drift(tmp_path / "a.png", {"reference": "0", "hook": HOOK, "sae": "an SAE", "models": models})
    draw_drift(tmp_path / "b.png", {"reference": "0", "hook": HOOK, "sae": "an SAE", "models": models[:1]})
    a, b = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert a.shape[1] == b.shape[1]
    assert a.shape[0] > b.shape[0]  # L0 varies: two panels more
