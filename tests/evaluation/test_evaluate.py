"""The whole evaluation on a model small enough to repeat in numpy and transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import FLAG_BOS, windows
from pipeline.evaluation.baselines import Replacement, SAEReplacement, fit_pca
from pipeline.evaluation.evaluate import (
    captured_rows,
    clusters_of,
    evaluate,
    json_safe,
    recovered,
    store_rows,
    take_windows,
    window_order,
)
from pipeline.evaluation.splice import SpliceResult
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from sae.errors import ConfigError
from sae.latent_statistics import LatentStatistics
from sae.runtime import decode, encode
from sae.untrained import untrained_weights
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK = "blocks.2.hook_resid_post"


class Copy(Replacement):
    num_latents = 64

    def code(self, x_ND):
        return np.broadcast_to(np.arange(64, dtype=np.int32), x_ND.shape), x_ND

    def decode(self, idx_NK, vals_NK, x_ND):
        return vals_NK.copy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "tiny.gguf"
    write_tiny_llama(path)
    with Model(path) as model:
        documents = [
            Document(name=f"{i}.py", text=f"def f{i}(a, b):\n    return {i} * (a + b)\n\n" * (2 + i % 3))
            for i in range(14)
        ]
        table = windows(model, documents, 32)
        with Session(model, n_ctx=512, n_seq_max=4, **ONE) as session:
            captured = capture(
                session, [table.window_tokens(w) for w in range(table.n_windows)], [HookPoint.parse(HOOK)]
            )
        x_ND = np.concatenate([c[HOOK] for c in captured])
        free_ND = x_ND[table.flags_N == 0].astype(np.float64)
        mean_D, variance = free_ND.mean(axis=0), float(((free_ND - free_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
        weights = untrained_weights(64, 128, 8, mean_D, variance, HOOK, {}, 0, sample_ND=free_ND)
        baselines = {"pca": fit_pca([free_ND], 8), "copy": Copy(), "half": SAEReplacement(weights)}
        config = EvaluateConfig(tokens=0, splice_tokens=0, seed=0)
        calls = []
        result = evaluate(
            model, weights, table, config=config, baselines=baselines, session=ONE, progress=lambda *a: calls.append(a)
        )
        yield model, weights, table, free_ND, result, calls


def test_reconstruction_metrics_equal_numpy_on_the_captured_rows(tiny):
    _, weights, table, x_ND, result, _ = tiny
    pre_NF = (x_ND - weights.b_dec_D) @ weights.W_enc_FD.T.astype(np.float64) + weights.b_enc_F
    kth_N1 = np.sort(pre_NF, axis=1)[:, -8, None]
    a_NF = np.where(pre_NF >= kth_N1, np.maximum(pre_NF, 0), 0)
    x_hat_ND = a_NF @ weights.W_dec_FD + weights.b_dec_D
    fvu = ((x_ND - x_hat_ND) ** 2).sum() / ((x_ND - x_ND.mean(axis=0)) ** 2).sum()
    assert result["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert result["l0"] == pytest.approx((a_NF > 0).sum(axis=1).mean(), rel=1e-3)
    assert result["dead_share"] == pytest.approx((a_NF == 0).all(axis=0).mean(), abs=1.5 / 128)
    assert result["rows"] == len(x_ND)
    assert result["flagged_share"] == pytest.approx(1 - len(x_ND) / table.rows)
    has_next_N = np.r_[table.window_N[1:] == table.window_N[:-1], False]
    assert result["splice_rows"] == (has_next_N & (table.flags_N == 0)).sum()
    assert result["splice_flagged_share"] == pytest.approx(result["flagged_share"], abs=1e-12)
    assert result["documents"] == 14
    assert sum(result["density_histogram"]["counts"]) + result["density_histogram"]["dead"] == 128
    assert result["same_rows"]["fvu"] == pytest.approx(result["fvu"], rel=1e-5)  # here all windows are spliced


def test_a_perfect_replacement_recovers_everything_and_zero_recovers_nothing(tiny):
    *_, result, _ = tiny
    copy, zero = result["baselines"]["copy"], result["baselines"]["zero"]
    assert copy["ce_recovered"] == 1
    assert copy["ce_recovered_ci95"] == [1, 1]
    assert copy["delta_ce_nats"] == 0
    assert copy["kl"] == 0
    assert copy["fvu"] == 0
    assert zero["ce_recovered"] == 0
    assert result["baselines"]["mean"]["ce_recovered_mean"] == 0
    assert result["baselines"]["mean"]["fvu"] == pytest.approx(1, abs=1e-5)
    assert zero["l0"] == 0


def test_ratios_follow_from_the_cross_entropies_that_are_reported(tiny):
    *_, result, _ = tiny
    clean, sae, zero, mean = (result[f"ce_{name}"] for name in ("clean", "sae", "zero", "mean"))
    assert result["ce_recovered"] == pytest.approx((zero - sae) / (zero - clean), rel=1e-9)
    assert result["ce_recovered_mean"] == pytest.approx((mean - sae) / (mean - clean), rel=1e-9)
    assert result["delta_ce_nats"] == pytest.approx(sae - clean, rel=1e-9)
    low, high = result["delta_ce_ci95"]
    assert low < result["delta_ce_nats"] < high
    for key in ("ce_recovered", "ce_recovered_mean"):
        low, high = result[f"{key}_ci95"]
        assert low < result[key] < high
    assert result["kl"] > 0
    assert result["cluster_kind"] == "document"
    assert result["clusters"] == 14


def test_the_same_sae_as_a_baseline_gets_the_same_numbers(tiny):
    *_, result, _ = tiny
    for key in ("ce_recovered", "delta_ce_nats", "kl"):
        assert result["baselines"]["half"][key] == result[key]


def test_pca_at_the_same_l0_is_beside_the_sae(tiny):
    *_, result, _ = tiny
    assert result["baselines"]["pca"]["l0"] == 8
    assert 0 < result["baselines"]["pca"]["fvu"] < 1


def test_the_result_is_json_and_progress_reaches_the_end(tiny):
    *_, table, _, result, calls = tiny[:6]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for what in ("reconstruct", "splice"):
        assert [c[1:] for c in calls if c[0] == what][-1] == (table.rows, table.rows)


def test_outliers_are_left_out_and_their_share_is_reported(tiny):
    model, weights, table, x_ND, _, _ = tiny
    norms = np.sort(np.linalg.norm(x_ND, axis=1))
    gap = 600 + int(np.diff(norms[600:700]).argmax())  # a limit no rounding can cross
    limit = float(norms[gap] + norms[gap + 1]) / 2
    config = EvaluateConfig(tokens=0, splice_tokens=200)
    result = evaluate(model, weights, table, config=config, baselines={}, outlier_norm=limit, session=ONE)
    assert result["rows"] == (np.linalg.norm(x_ND, axis=1) <= limit).sum()
    assert result["flagged_share"] == pytest.approx(1 - result["rows"] / table.rows)
    with pytest.raises(ConfigError, match="every held-out row is flagged"):
        evaluate(model, weights, table, config=config, baselines={}, outlier_norm=1e-6, session=ONE)


def test_captured_rows_name_their_places_in_the_table(tiny):
    model, _, table, x_ND, _, _ = tiny
    chosen = np.array([1, 4, 5])
    parts = list(captured_rows(model, table, chosen, HookPoint.parse(HOOK), batch_tokens=64, session=ONE))
    rows = np.concatenate([p.row_N for p in parts])
    expected = np.flatnonzero(np.isin(table.window_N, chosen) & (table.flags_N == 0))
    np.testing.assert_array_equal(rows, expected)
    place = np.cumsum(table.flags_N == 0) - 1
    np.testing.assert_allclose(np.concatenate([p.x_ND for p in parts]), x_ND[place[rows]], atol=1e-5)


def test_with_layer_norm_what_a_latent_explains_is_in_units_of_each_rows_sigma(tiny):
    model, weights, table, x_ND, *_ = tiny
    w = replace(weights, norm_mode="layer", norm_eps=1e-5, b_dec_D=np.zeros(64))
    statistics = LatentStatistics(w.W_dec_FD)
    config = EvaluateConfig(tokens=0, splice_tokens=60)
    found = evaluate(model, w, table, config=config, baselines={}, statistics=statistics, session=ONE)
    x_ND = x_ND.astype(np.float32)
    idx_NK, vals_NK = encode(w, x_ND)
    x_hat_ND = decode(w, idx_NK, vals_NK, x_ND)
    sigma_N = x_ND.astype(np.float64).std(axis=1)
    assert sigma_N.max() > 1.2 * sigma_N.min()
    explained_F = statistics.result(found["scatter"])["explained"]
    for latent in np.argsort(-explained_F)[:3]:
        a_N = (vals_NK * (idx_NK == latent)).sum(axis=1)
        without_ND = x_hat_ND - np.outer(sigma_N * a_N, w.W_dec_FD[latent])
        rise = ((x_ND - without_ND) ** 2).sum() - ((x_ND.astype(np.float64) - x_hat_ND) ** 2).sum()
        assert explained_F[latent] == pytest.approx(rise / found["scatter"], rel=1e-2)


def test_the_unflagged_rows_of_a_store_are_spread_over_it_where_they_are_cut(monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.evaluate.STORE_CHUNK_ROWS", 10)
    flags_N = np.where(np.arange(95) % 7 == 0, FLAG_BOS, 0)
    store = SimpleNamespace(n_rows=95, column=lambda name: flags_N, rows=lambda hook, a, b: np.arange(a, b)[:, None])
    for most, firsts in ((0, range(0, 95, 10)), (95, range(0, 95, 10)), (40, (0, 30, 60, 90)), (5, (0,))):
        expected = [row for a in firsts for row in range(a, min(a + 10, 95)) if row % 7]
        assert np.concatenate(list(store_rows(store, HOOK, most)))[:, 0].tolist() == expected


@pytest.mark.parametrize(("documents", "kind"), [(10, "document"), (9, "window")])
def test_intervals_are_by_document_from_ten_documents_on(documents, kind):
    document_N, window_N = np.arange(60) % documents, np.arange(60)
    losses = SpliceResult(ce={}, kl={}, document_N=document_N, window_N=window_N, rows=60, flagged_rows=0)
    cluster_N, found = clusters_of(losses)
    assert found == kind
    np.testing.assert_array_equal(cluster_N, document_N if kind == "document" else window_N)


def test_the_order_of_the_windows_is_drawn_by_the_seed(tiny):
    _, _, table, *_ = tiny
    orders = [window_order(table, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(table.n_windows))
    assert len({tuple(order.tolist()) for order in (*orders, np.arange(table.n_windows))}) == 3


def test_windows_are_taken_until_the_rows_suffice(tiny):
    _, _, table, *_ = tiny
    order = np.random.default_rng(0).permutation(table.n_windows)
    lengths = np.diff(table.window_starts)
    taken = take_windows(table, order, 100)
    assert lengths[taken].sum() >= 100
    assert lengths[order[: len(taken) - 1]].sum() < 100
    np.testing.assert_array_equal(take_windows(table, order, 0), np.arange(table.n_windows))
    np.testing.assert_array_equal(take_windows(table, order, 10**9), np.arange(table.n_windows))


def test_numbers_that_do_not_exist_become_none():
    assert json_safe({"a": np.float32("nan"), "b": [np.int64(3), math.inf], 4: (True, np.bool_(0))}) == {
        "a": None,
        "b": [3, None],
        "4": [True, False],
    }
    assert math.isnan(recovered(np.ones(2), np.zeros(2), np.ones(2)))
    assert math.isnan(recovered(np.empty(0), np.empty(0), np.empty(0)))
