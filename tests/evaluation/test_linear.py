"""The linear maps beside a transcoder, against least squares and singular values of all rows in float64."""

from __future__ import annotations

import numpy as np
import pytest

import pipeline.evaluation.linear as linear
from pipeline.evaluation.baselines import fit_pca
from pipeline.evaluation.linear import fit_linear, linear_baselines
from pipeline.evaluation.ports import ports_of
from sae.errors import ShapeError
from tests.evaluation.test_wired_splice import D, Tiny, tiny, wired

__all__ = ["tiny"]

SCALE_O = np.repeat([0.5, 8.0], 10)
PARTS = [slice(0, 10), slice(10, 20)]


@pytest.fixture
def rows():
    """x of unequal, correlated columns far from zero; y partly a linear map of it, its second half much larger."""
    rng = np.random.default_rng(0)
    basis_II, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    x_NI = (rng.normal(size=(4000, 24)) * np.geomspace(30, 0.03, 24)) @ basis_II + 200
    y_NO = x_NI @ rng.normal(size=(24, 20)) * np.repeat([0.02, 1.0], 10)
    y_NO += rng.normal(size=y_NO.shape) * np.repeat([1.0, 40.0], 10) + 50
    return x_NI.astype(np.float32), y_NO.astype(np.float32)


def fitted(x_NI, y_NO, ranks, pieces=7, scale_O=SCALE_O):
    chunks = zip(np.array_split(x_NI, pieces), np.array_split(y_NO, pieces), strict=True)
    return fit_linear(chunks, PARTS, lambda moments: scale_O, ranks)


def least_squares(x_NI, y_NO):
    """The fit of all rows in float64."""
    with_one = np.concatenate([x_NI.astype(np.float64) - 200, np.ones((len(x_NI), 1))], axis=1)
    return with_one @ np.linalg.lstsq(with_one, y_NO.astype(np.float64), rcond=None)[0]


def test_the_map_of_any_rank_is_least_squares(rows):
    (found,) = fitted(*rows, [20])
    expected_NO = least_squares(*rows)
    assert np.abs(found(rows[0]) - expected_NO).max() < 1e-4 * expected_NO.std()


def test_the_map_of_rank_k_is_the_fit_cut_to_its_leading_directions_in_units_of_the_scales(rows):
    fit_NO = least_squares(*rows)
    mean_O = fit_NO.mean(axis=0)
    _, _, vt = np.linalg.svd((fit_NO - mean_O) / SCALE_O, full_matrices=False)
    for rank, found in zip((1, 3, 8), fitted(*rows, [1, 3, 8]), strict=True):
        expected_NO = (fit_NO - mean_O) / SCALE_O @ vt[:rank].T @ vt[:rank] * SCALE_O + mean_O
        assert np.abs((found(rows[0]) - expected_NO) / SCALE_O).max() < 1e-4 * (expected_NO / SCALE_O).std()
        idx_NK, vals_NK = found.code(rows[0][:5])
        assert idx_NK.shape == vals_NK.shape == (5, rank)
    even = fitted(*rows, [3], scale_O=np.ones(20))[0](rows[0])
    assert np.abs((even - found(rows[0])) / SCALE_O).max() > 0.1  # the scales matter


def test_no_map_of_the_rank_does_better(rows):
    x_NI, y_NO = (part.astype(np.float64) for part in rows)
    rng = np.random.default_rng(1)

    def loss(replacement):
        return (((y_NO - replacement(x_NI)) / SCALE_O) ** 2).sum()

    (found,) = fitted(*rows, [4])
    least, encode, decode = loss(found), found.encode_KI, found.decode_KO
    for size in 10.0 ** np.arange(-3, 0):
        found.encode_KI = encode * (1 + size * rng.normal(size=encode.shape))
        assert loss(found) > least
        found.encode_KI, found.decode_KO = (
            encode,
            decode * (1 + size * rng.normal(size=decode.shape)).astype(np.float32),
        )
        assert loss(found) > least
        found.decode_KO = decode


def test_where_the_same_is_read_and_reconstructed_it_is_pca(rows):
    x_NI, _ = rows
    (found,) = fit_linear([(x_NI, x_NI)], [slice(0, 24)], lambda moments: np.full(24, 3.0), [5])
    pca_ND = fit_pca([x_NI], 5)(x_NI)
    assert np.abs(found(x_NI) - pca_ND).max() < 1e-3 * x_NI.std()


def test_columns_that_are_constant_or_sums_of_others_do_no_harm(rows):
    x_NI, y_NO = rows
    more_NI = np.concatenate([x_NI, x_NI[:, :3] + x_NI[:, 3:6], np.full((len(x_NI), 2), 7, np.float32)], axis=1)
    (plain,), (found,) = fitted(x_NI, y_NO, [20]), fitted(more_NI, y_NO, [20])
    assert np.abs(found(more_NI) - plain(x_NI)).max() < 1e-3 * y_NO.std()


def test_without_rows_it_says_so():
    with pytest.raises(ShapeError, match="got none"):
        fitted(np.zeros((0, 24), np.float32), np.zeros((0, 20), np.float32), [2], pieces=1)


def pairs(tiny: Tiny, w):
    """All unflagged rows of the model, as two chunks."""
    sides = [np.concatenate([tiny.rows[n] for n, _ in ports], axis=1)[tiny.free_N] for ports in ports_of(w)]
    return lambda rows: zip(*(np.array_split(side, 2) for side in sides), strict=True)


@pytest.mark.parametrize(("kind", "names"), [("crosscoder", ["pca"]), ("cross_layer", ["linear", "affine"])])
def test_each_is_measured_in_the_model_like_the_sae(tiny, kind, names):
    w = wired(kind)
    found = linear_baselines(w, pairs(tiny, w))
    assert list(found) == names
    assert [run.num_latents for run in found.values()] == [w.k, 2 * D][: len(names)]
    inputs, outputs = ports_of(w)
    x_NI = np.concatenate([tiny.rows[name] for name, _ in inputs], axis=1)
    y_NO = np.concatenate([tiny.rows[name] for name, _ in outputs], axis=1)[tiny.free_N].astype(np.float64)
    result = tiny.evaluate(w, found)
    scale_O = np.repeat(list(result["scale_of"].values()), D)
    for name, run in found.items():
        y_hat_NO = run(x_NI)
        replaced = {n: y_hat_NO[:, i * D : (i + 1) * D] for i, (n, _) in enumerate(outputs)}
        ce, kl, _ = tiny.losses(replaced)
        row = result["baselines"][name]
        assert row["delta_ce_nats"] == pytest.approx(ce.mean() - result["ce_clean"], abs=2e-5)
        assert row["kl"] == pytest.approx(kl.mean(), abs=2e-5)
        assert row["l0"] == run.num_latents
        rest_NO, centred_NO = y_NO - y_hat_NO[tiny.free_N], y_NO - y_NO.mean(axis=0)
        assert row["fvu"] == pytest.approx(
            ((rest_NO / scale_O) ** 2).sum() / ((centred_NO / scale_O) ** 2).sum(), rel=1e-3
        )
    assert result["baselines"][names[-1]]["fvu"] < result["baselines"]["mean"]["fvu"]


def test_of_too_many_columns_there_are_none(tiny, monkeypatch):
    w = wired("crosscoder")
    monkeypatch.setattr(linear, "MOST_COLUMNS", 2 * D - 1)
    assert linear_baselines(w, pairs(tiny, w)) == {}
