"""The drift of an SAE on a model small enough to repeat in float64, and against `evaluate` on the same rows."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from convert.gguf_file import stored_bytes
from pipeline.config import DriftConfig, EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.drift import (
    ReferencePart,
    Setting,
    activation_fvu,
    capture_reference,
    measure_model,
    with_names,
)
from pipeline.evaluation.drift_forms import forms_of, groups_of
from pipeline.evaluation.drift_picture import draw_drift
from pipeline.evaluation.evaluate import evaluate
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.requantise import write_requantised
from pipeline.llama.session import Session, capture
from pipeline.stages.drift_text import half, numbers
from sae.errors import ConfigError
from sae.untrained import untrained_weights
from tests.convert.test_types import I64, LIB, P, ggml_floats
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK, K = "blocks.2.hook_resid_post", 8
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0", "Q4_0/BF16"]


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
                setting = replace(setting, config=replace(config, encoder="numpy"))
                plain = measure_model(setting, model, forms_of(["F32", "Q8_0"]), reference)
                whole = evaluate(
                    model, weights, table, config=EvaluateConfig(tokens=0, splice_tokens=0), baselines={}, session=ONE
                )
    return weights, found, rows, whole, plain


def through_ggml(values, kind):
    """What ggml's own C code makes of values stored in a type, float64."""
    number, raw = gguf.GGMLQuantizationType[kind], np.zeros(stored_bytes(values.shape, kind), np.uint8)
    values = np.ascontiguousarray(values, np.float32)
    quantise = LIB["ggml_quantize_chunk"]
    quantise.restype, quantise.argtypes = ctypes.c_size_t, [ctypes.c_int, P, P, I64, I64, I64, P]
    if kind == "F32":
        return values.astype(np.float64)
    quantise(int(number), values.ctypes.data, raw.ctypes.data, 0, len(values), values.shape[1], None)
    return ggml_floats(raw, kind, values.size).reshape(values.shape).astype(np.float64)


# what ggml multiplies a matrix of a type with: the row in this one
ROW_TYPE = {"F32": "F32", "F16": "F16", "BF16": "BF16"} | dict.fromkeys(("Q8_0", "Q5_1", "Q4_1", "Q4_0"), "Q8_0")


def acts(weights, x_ND, kind, *, round_rows=True):
    """The latents that ggml's product of W_enc in `kind` gives, in float64 but for what it rounds."""
    u_ND = x_ND - weights.b_dec_D
    if round_rows:
        u_ND = through_ggml(u_ND, ROW_TYPE[kind])
    pre_NF = u_ND @ through_ggml(weights.W_enc_FD, kind).T + weights.b_enc_F
    return np.where(pre_NF >= np.sort(pre_NF, axis=1)[:, [-K]], np.maximum(pre_NF, 0), 0)


def oracle(weights, x_ND, reference_NF, name, **how):
    """(fvu, l0, overlap) of a form, float64."""
    encoder, _, decoder = name.partition("/")
    a_NF = acts(weights, x_ND, encoder, **how)
    gap_ND = x_ND - a_NF @ through_ggml(weights.W_dec_FD, decoder or encoder) - weights.b_dec_D
    fires_N, fired_N = (a_NF > 0).sum(axis=1), reference_NF.sum(axis=1)
    both_N = ((a_NF > 0) & reference_NF).sum(axis=1) / np.maximum(fires_N, fired_N)
    return (gap_ND**2).sum() / ((x_ND - x_ND.mean(axis=0)) ** 2).sum(), fires_N.mean(), both_N.mean()


@pytest.mark.parametrize("name", TYPES)
def test_fvu_l0_and_overlap_are_those_of_ggml_s_own_rounding_in_float64(drift, name):
    """Q5_1 and Q4_1: ggml also rounds the sum of a row's block to half, which the oracle does not."""
    weights, found, rows, _, _ = drift
    reference_NF = acts(weights, rows[0], "F32") > 0
    encoder = name.partition("/")[0]
    most = 3e-4 if encoder in ("Q5_1", "Q4_1") else 2e-5
    near, far = 0.0, 0.0
    for x_ND, model in zip(rows, found, strict=True):
        form = next(form for form in model["forms"] if form["types"] == name)
        fvu, l0, overlap = oracle(weights, x_ND, reference_NF, name)
        assert form["fvu"] == pytest.approx(fvu, rel=most)
        assert form["l0"] == pytest.approx(l0, abs=1e-2)
        assert form["top_k_overlap"] == pytest.approx(overlap, abs=1e-3)
        assert form["rows"] == len(x_ND)
        assert form["encoder"].startswith("ggml:CPU:")
        assert form["encoder"].endswith(encoder)
        near += abs(form["fvu"] - fvu)
        far += abs(form["fvu"] - oracle(weights, x_ND, reference_NF, name, round_rows=False)[0])
    assert far > 4 * near or encoder in ("F32", "F16"), "a product with rows that nothing rounded"


@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_numpy_multiplies_the_same_matrices_with_rows_as_they_are(drift, name):
    weights, _, rows, _, plain = drift
    form = next(form for form in plain["forms"] if form["types"] == name)
    fvu, l0, overlap = oracle(weights, rows[1], acts(weights, rows[0], "F32") > 0, name, round_rows=False)
    assert form["encoder"] == "numpy"
    assert form["fvu"] == pytest.approx(fvu, rel=1e-6)
    assert (form["l0"], form["top_k_overlap"]) == pytest.approx((l0, overlap), abs=1e-4)


def test_coarser_types_drift_further_and_so_does_a_quantised_model(drift):
    _, (own, quantised), rows, _, _ = drift
    overlap = {form["types"]: form["top_k_overlap"] for form in own["forms"]}
    assert overlap["F32"] > 1 - 1e-3
    assert 1 > overlap["BF16"] > overlap["Q8_0"] > overlap["Q5_1"] > max(overlap["Q4_1"], overlap["Q4_0"]) > 0.3
    assert all(a["top_k_overlap"] > b["top_k_overlap"] for a, b in zip(own["forms"], quantised["forms"], strict=True))
    assert own["activation_fvu"] == 0
    moved = ((rows[1] - rows[0]) ** 2).sum() / ((rows[0] - rows[0].mean(axis=0)) ** 2).sum()
    assert quantised["activation_fvu"] == pytest.approx(moved, rel=1e-5)
    assert moved > 1e-4
    sizes = {form["types"]: form["matrix_bytes"] for form in own["forms"]}
    assert (sizes["F32"], sizes["Q8_0"]) == (2 * 128 * 64 * 4, 2 * 128 * 64 * 34 // 32)
    assert sizes["Q4_0/BF16"] == 128 * 64 * 18 // 32 + 128 * 64 * 2


def test_the_losses_are_those_of_evaluate_on_that_model(drift):
    _, _, _, whole, quantised = drift
    form = quantised["forms"][0]
    for key in ("ce_recovered", "ce_recovered_mean", "delta_ce_nats", "delta_ce_ci95", "kl", "ce_sae", "fvu", "l0"):
        assert form[key] == pytest.approx(whole[key], rel=1e-6), key
    for key in ("ce_clean", "ce_zero", "ce_mean", "splice_rows", "clusters", "cluster_kind"):
        assert quantised[key] == whole[key], key


def test_forms_measured_one_after_the_other_give_the_same_numbers(drift, tmp_path):
    weights, found, _, _, _ = drift
    forms = forms_of(TYPES)
    assert [len(group) for group in groups_of(forms, weights, 0)] == [1] * 8
    assert [len(group) for group in groups_of(forms, weights, 3 * 3 * 128 * 64 * 4)] == [3, 3, 2]
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

    found = drift[1]
    models = [{"name": f"{i}", **one} for i, one in enumerate(found)]
    models[1]["forms"][0] |= {"ce_recovered": None, "kl_ci95": [None, None], "l0": 9.0}
    draw_drift(tmp_path / "a.png", {"reference": "0", "hook": HOOK, "sae": "an SAE", "models": models})
    draw_drift(tmp_path / "b.png", {"reference": "0", "hook": HOOK, "sae": "an SAE", "models": models[:1]})
    a, b = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert a.shape[1] == b.shape[1]
    assert a.shape[0] > b.shape[0]  # L0 varies: two panels more


def test_activations_are_held_against_the_references_at_the_same_rows():
    rng = np.random.default_rng(0)
    reference, parts, gap, kept = [], [], 0.0, []
    for start in (0, 50):
        x_ND, moved_ND = rng.standard_normal((2, 50, 4)).astype(np.float32)
        x_ND += 3
        ours, theirs = (np.sort(rng.permutation(50)[:40]) for _ in range(2))
        common = np.intersect1d(ours, theirs)
        reference.append(ReferencePart(row_N=start + theirs, x_ND=x_ND[theirs], code=(np.empty(0), np.empty(0))))
        parts.append(SimpleNamespace(row_N=start + ours, x_ND=(x_ND + 0.1 * moved_ND)[ours]))
        gap += ((0.1 * moved_ND[common].astype(np.float64)) ** 2).sum()
        kept.append(x_ND[common])
    kept_ND = np.concatenate(kept)
    scatter = ((kept_ND - kept_ND.mean(axis=0)) ** 2).sum()
    assert activation_fvu(reference, iter(parts)) == pytest.approx(gap / scatter, rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "said"), [([0.1, 0.3], "+-0.1000"), ([-0.25, 0.25], "+-0.2500"), ([None, None], "n/a"), (None, "n/a")]
)
def test_the_table_says_half_the_width_of_an_interval(interval, said):
    assert half(interval) == said


def test_models_are_named_by_their_quantisation_or_where_that_does_not_tell_them_apart_by_their_file():
    def names(*found):
        made = with_names([{"file_type": kind, "file": file} for kind, file in found])
        return [model["name"] for model in made["models"]]

    assert names(("F16", "a.gguf"), ("Q8_0", "b.gguf")) == ["F16", "Q8_0"]
    assert names(("F16", "a.gguf"), ("F16", "b.gguf")) == ["a", "b"]
    assert names(("unknown", "a.gguf"), ("Q8_0", "b.gguf")) == ["a", "b"]
    assert names(("F16", "a.gguf"), ("F16", "x/a.gguf")) == ["0: a", "1: a"]


def test_the_worst_of_all_forms_is_the_largest_fvu_and_the_least_recovered():
    def form(types, fvu, recovered, overlap):
        return {"types": types, "fvu": fvu, "ce_recovered": recovered, "top_k_overlap": overlap}

    models = [
        {"name": "F16", "forms": [form("F32", 0.1, 0.98, 1.0), form("Q4_0", 0.2, 0.99, 0.8)]},
        {"name": "Q4_K", "forms": [form("F32", 0.15, None, 0.9)]},
    ]
    assert numbers({"models": models}) == (
        "F32 on F16: FVU 0.1000, CE recovered 0.9800; at worst FVU 0.2000 (Q4_0 on F16), CE recovered 0.9800 (F32 on F16), "
        "top-k overlap 0.8000 (Q4_0 on F16)"
    )
