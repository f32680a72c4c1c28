"""A held-out document the model cannot compute costs its own rows, and no metric."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pipeline.analysis.steering import steering_curves
from pipeline.config import EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import FLAGS_ALL, windows
from pipeline.evaluation.baselines import fit_pca
from pipeline.evaluation.evaluate import captured_rows, evaluate
from pipeline.evaluation.splice import SpliceConfig, split_windows
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.report.latents import Vocabulary, search
from sae.untrained import untrained_weights
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK = HookPoint("resid_post", 2)
SOUND = [
    Document(name=f"{i}.py", text=f"def f{i}(a, b):\n    return {i} * (a + b)\n\n" * (2 + i % 3)) for i in range(12)
]
SPOILED = Document(name="spoiled.py", text="~" + "def f(a):\n    return a\n" * 3)
SAME = ("fvu", "l0", "cosine", "rows", "ce_clean", "ce_sae", "ce_recovered", "delta_ce_nats", "kl", "documents")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model without a value for `~`, a table with and one without a document that starts with it."""
    path = tmp_path_factory.mktemp("not_finite") / "nan.gguf"
    write_tiny_llama(path)
    with Model(path) as model:
        (token,) = model.tokenize(b"~")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "token_embd.weight").data[token] = np.nan
    reader.data.flush()
    with Model(path) as model:
        mixed = windows(model, [*SOUND[:5], SPOILED, *SOUND[5:]], 32)
        sound = windows(model, SOUND, 32)
        x_ND = np.concatenate([p.x_ND for p in rows(model, sound)]).astype(np.float64)
        variance = float(((x_ND - x_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
        weights = untrained_weights(64, 128, 8, x_ND.mean(axis=0), variance, str(HOOK), {}, 0, sample_ND=x_ND)
        yield model, weights, mixed, sound, x_ND


def rows(model, table):
    return captured_rows(model, table, np.arange(table.n_windows), HOOK, session=ONE)


def test_metrics_are_those_without_the_spoiled_document(tiny):
    model, weights, mixed, sound, x_ND = tiny
    options = {"config": EvaluateConfig(tokens=0, splice_tokens=0), "session": ONE}
    for outlier_norm in (0.0, 1e6):
        found, expected = (
            evaluate(model, weights, table, baselines={"pca": fit_pca([x_ND], 8)}, outlier_norm=outlier_norm, **options)
            for table in (mixed, sound)
        )
        for key in SAME:
            assert found[key] == pytest.approx(expected[key], rel=1e-4), key
        for name, row in expected["baselines"].items():
            for key in ("fvu", "ce_recovered", "kl"):
                assert found["baselines"][name][key] == pytest.approx(row[key], rel=1e-4, abs=1e-9), (name, key)
        spoiled = sum(np.isin(mixed.doc_N, 5) & (mixed.flags_N & FLAGS_ALL == 0))
        assert found["flagged_share"] * mixed.rows == pytest.approx(
            expected["flagged_share"] * sound.rows + spoiled + 1
        )


def test_captured_rows_are_finite_and_those_without_the_spoiled_document(tiny):
    model, _, mixed, _, x_ND = tiny
    parts = list(rows(model, mixed))
    assert set(mixed.doc_N[np.concatenate([p.row_N for p in parts])]) == set(range(13)) - {5}
    np.testing.assert_allclose(np.concatenate([p.x_ND for p in parts]), x_ND, atol=1e-5)


def test_the_reports_firings_and_steering_curves_are_finite(tiny):
    model, weights, mixed, sound, _ = tiny
    vocabulary = Vocabulary(model)
    found, expected = (search(model, weights, t, vocabulary, tokens=10**6, seed=0, session=ONE) for t in (mixed, sound))
    np.testing.assert_allclose(found.stats.max_F, expected.stats.max_F, atol=1e-4)
    assert found.firings.rows == expected.firings.rows
    directions = {"own": weights.W_dec_FD[0]}
    ours, theirs = (
        steering_curves(
            model, split_windows(t), HOOK, directions, np.arange(4), [0, 2.0], config=SpliceConfig(session=ONE)
        )["own"]
        for t in (mixed, sound)
    )
    np.testing.assert_allclose([ours.log_prob, ours.kl], [theirs.log_prob, theirs.kl], rtol=1e-4)
    assert ours.positions == theirs.positions
