"""Probing on pooled arrays with a known answer, and through llama.cpp on a CSV made here."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.probing import Pooled, fit, held_out_split, pool, probe, read_labelled
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from sae.errors import ConfigError
from sae.runtime import encode
from sae.untrained import untrained_weights
from tests.tiny_llama import write_tiny_llama

pytest.importorskip("sklearn")
EXACT = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK = "blocks.2.hook_resid_post"
F, D = 200, 16


def pooled(labels, *, informative, seed=0):
    """Texts whose latent `informative[label]` is higher; every other latent, and every raw dimension but one, is noise."""
    rng = np.random.default_rng(seed)
    latents_B, values_B = [], []
    for label in labels:
        found = np.unique(np.r_[rng.choice(F, 12, replace=False), list(informative.values())])
        values = rng.uniform(0, 1, len(found)).astype("f4")
        values[found == informative.get(label, -1)] += 1.5
        latents_B.append(found.astype(np.int64))
        values_B.append(values)
    x_BD = rng.standard_normal((len(labels), D)).astype("f4")
    x_BD[:, 3] += 2.5 * (np.array(labels) == "yes")
    return Pooled(x_BD=x_BD, latents_B=latents_B, values_B=values_B, kept_B=np.arange(len(labels)))


def test_the_latent_that_carries_the_label_is_chosen_and_predicts_it():
    labels = ["yes"] * 120 + ["no"] * 180
    data = pooled(labels, informative={"yes": 77})
    result = probe(data, labels, F, ks=[1, 2, 5], test_share=0.25, seed=0)
    assert list(result["tasks"]) == ["yes"]
    assert result["tasks"]["yes"]["latents"][0] == 77
    assert result["test_texts"] == 30 + 45
    assert result["majority"]["accuracy"] == pytest.approx(45 / 75)
    assert result["sae_top_1"]["accuracy"] > 0.97
    assert result["sae_top_1"]["auc"] > 0.99
    assert 0.8 < result["raw_top_1"]["accuracy"] < 0.97  # two Gaussians 2.5 apart: 0.89 at best
    assert 0.75 < result["dense"]["accuracy"] < 0.97


def test_labels_that_nothing_knows_are_not_predicted():
    labels = list(np.random.default_rng(1).permutation(["a", "b"] * 300))
    result = probe(pooled(labels, informative={}), labels, F, ks=[1, 5], test_share=0.5, seed=0)
    for part in ("dense", "sae_top_1", "sae_top_5", "raw_top_5"):
        assert 0.38 < result[part]["accuracy"] < 0.62
        assert 0.38 < result[part]["auc"] < 0.62


def test_several_labels_are_probed_one_against_the_rest_and_averaged():
    labels = ["red"] * 60 + ["green"] * 90 + ["blue"] * 150
    result = probe(
        pooled(labels, informative={"red": 5, "green": 6, "blue": 7}), labels, F, ks=[1], test_share=0.2, seed=3
    )
    assert {name: task["latents"][0] for name, task in result["tasks"].items()} == {"red": 5, "green": 6, "blue": 7}
    of = [task["sae_top_1"]["accuracy"] for task in result["tasks"].values()]
    assert result["sae_top_1"]["accuracy"] == pytest.approx(np.mean(of), rel=1e-12)
    assert result["majority"]["accuracy"] == pytest.approx(np.mean([48 / 60, 42 / 60, 30 / 60]))


def test_the_best_latents_are_those_of_the_largest_difference_of_means_on_the_training_part_alone():
    labels = ["yes"] * 40 + ["no"] * 60
    data = pooled(labels, informative={}, seed=5)
    test_B = held_out_split(np.array(labels), 0.3, 7)
    dense_BF = np.zeros((100, F))
    for row, (found, values) in enumerate(zip(data.latents_B, data.values_B, strict=True)):
        dense_BF[row, found] = values
    yes_B = np.array(labels) == "yes"
    gap_F = np.abs(dense_BF[~test_B & yes_B].mean(axis=0) - dense_BF[~test_B & ~yes_B].mean(axis=0))
    result = probe(data, labels, F, ks=[4], test_share=0.3, seed=7)
    assert result["tasks"]["yes"]["latents"] == np.argsort(-gap_F, kind="stable")[:4].tolist()
    chosen = np.array([50, 3, 199])
    np.testing.assert_array_equal(data.columns(chosen), dense_BF[:, chosen].astype("f4"))


def test_a_latents_mean_is_over_the_chosen_texts_whether_it_fired_in_them_or_not():
    rng = np.random.default_rng(6)
    dense_BF = rng.random((30, F)) * (rng.random((30, F)) < rng.uniform(0.01, 0.3, (30, 1)))
    found = [np.flatnonzero(row_F) for row_F in dense_BF]
    values = [row_F[latents] for row_F, latents in zip(dense_BF, found, strict=True)]
    data = Pooled(x_BD=np.zeros((30, D), np.float32), latents_B=found, values_B=values, kept_B=np.arange(30))
    chosen_B = rng.random(30) < 0.4
    np.testing.assert_allclose(data.mean_latents(chosen_B, F), dense_BF[chosen_B].mean(axis=0), atol=1e-12)
    np.testing.assert_array_equal(data.mean_latents(np.zeros(30, bool), F), np.zeros(F))


def test_a_probe_is_a_logistic_regression_standardised_by_the_training_part_alone():
    preprocessing, linear_model, metrics = (
        pytest.importorskip(f"sklearn.{part}") for part in ("preprocessing", "linear_model", "metrics")
    )
    rng = np.random.default_rng(7)
    is_class_B, test_B = rng.random(80) < 0.4, np.arange(80) % 4 == 0
    inputs_BK = (rng.standard_normal((80, 3)) + is_class_B[:, None] * [1.0, 0.5, 0]) * [1e-3, 1, 1e3] + [5, 0, -1e4]
    inputs_BK[test_B & is_class_B] *= 30  # held out, it must not set the scale
    scaler = preprocessing.StandardScaler().fit(inputs_BK[~test_B])
    model = linear_model.LogisticRegression().fit(scaler.transform(inputs_BK[~test_B]), is_class_B[~test_B])
    margin = model.decision_function(scaler.transform(inputs_BK[test_B]))
    found = fit(inputs_BK, is_class_B, test_B)
    assert found["accuracy"] == ((margin > 0) == is_class_B[test_B]).mean()
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(is_class_B[test_B], margin), abs=1e-12)


def test_the_majority_is_that_of_the_training_part_and_texts_left_out_are_counted():
    labels = ["yes"] * 11 + ["no"] * 10 + ["yes"] * 3
    data = pooled(labels[:21], informative={"yes": 77})
    result = probe(data, labels, F, ks=[1], test_share=0.5, seed=0)  # trains on 5 of each, so nobody has the majority
    assert (result["texts"], result["left_out"], result["test_texts"]) == (21, 3, 11)
    assert result["majority"]["accuracy"] == pytest.approx(5 / 11)


def test_the_split_takes_its_share_of_every_label():
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 4)
    test_B = held_out_split(labels, 0.2, 0)
    assert [int(test_B[labels == name].sum()) for name in "abc"] == [10, 2, 1]
    assert int(held_out_split(labels, 0.9, 0)[labels == "c"].sum()) == 2
    assert not np.array_equal(test_B, held_out_split(labels, 0.2, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("probing") / "tiny.gguf"
    write_tiny_llama(path)
    with Model(path) as model:
        yield model


def test_texts_are_pooled_over_the_unflagged_rows_of_their_first_window(tiny):
    texts = ["def f(x):\n    return x\n" * 9, "x = 1\n", "", "import os\nimport sys\n" * 4]
    table = windows(tiny, [Document(name="x", text=t) for t in texts if t], 24)
    first = [int(np.flatnonzero(table.doc_N[table.window_starts[:-1]] == doc)[0]) for doc in range(3)]
    with Session(tiny, n_ctx=256, n_seq_max=8, **EXACT) as session:
        captured = capture(session, [table.window_tokens(w) for w in first], [HookPoint.parse(HOOK)])
    rows = []
    for window, found in zip(first, captured, strict=True):
        span = slice(*table.window_starts[window : window + 2])
        rows.append(found[HOOK][table.flags_N[span] == 0].astype(np.float64))
    x_ND = np.concatenate(rows)
    mean_D, variance = x_ND.mean(axis=0), float(((x_ND - x_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
    weights = untrained_weights(64, 128, 8, mean_D, variance, HOOK, {}, 0, sample_ND=x_ND)
    result = pool(tiny, weights, texts, context_tokens=24, session=EXACT)
    np.testing.assert_array_equal(result.kept_B, [0, 1, 3])
    np.testing.assert_allclose(result.x_BD, [x.mean(axis=0) for x in rows], atol=1e-5)
    for i, x in enumerate(rows):
        idx_NK, vals_NK = encode(weights, x.astype("f4"))
        dense_F = np.zeros(128)
        np.add.at(dense_F, idx_NK.reshape(-1), vals_NK.reshape(-1).astype(np.float64))
        found_F = np.zeros(128)
        found_F[result.latents_B[i]] = result.values_B[i]
        np.testing.assert_allclose(found_F, dense_F / len(x), atol=2e-3)


def write(path, rows, header=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_csv_keeps_commas_quotes_and_line_ends_of_its_texts(tmp_path):
    text = 'one, "two"\nthree'
    path = write(tmp_path / "a.csv", [(text, "x")] * 4 + [("other", "y")] * 4 + [("", "y"), ("no label", "")])
    found = read_labelled(path, text_key="text", label_key="label")
    assert found.texts == [text] * 4 + ["other"] * 4
    assert found.labels == ["x"] * 4 + ["y"] * 4
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel saves it
    assert read_labelled(path, text_key="text", label_key="label") == found


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([("a", "x")] * 9, ("text", "label"), r"two or more labels.*found x \(9\)"),
        ([("a", "x")] * 9 + [("b", "y")] * 3, ("text", "label"), r"with 4 texts each, found x \(9\), y \(3\)"),
        ([("a", "x")] * 9, ("body", "label"), r"column 'text' \(evaluate.probe_text\), found body, label"),
        ([], ("text", "label"), "column 'text'"),
    ],
)
def test_a_csv_that_cannot_be_probed_says_what_it_lacks(tmp_path, rows, header, says):
    with pytest.raises(ConfigError, match=says):
        read_labelled(write(tmp_path / "a.csv", rows, header), text_key="text", label_key="label")
    with pytest.raises(ConfigError, match="cannot be read as CSV"):
        read_labelled(tmp_path / "none.csv", text_key="text", label_key="label")
