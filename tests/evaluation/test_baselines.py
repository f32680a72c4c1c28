"""The baselines against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.baselines import ConstantReplacement, PCAReplacement, fit_pca
from sae.errors import ShapeError


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    scales = np.geomspace(10, 0.1, 24)
    basis, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    return ((rng.normal(size=(5000, 24)) * scales) @ basis + rng.normal(0, 300, 24)).astype(np.float32)


def test_streamed_pca_equals_the_singular_value_decomposition_of_all_rows(rows):
    pca = fit_pca(np.array_split(rows, 7), 5)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ vt[:5].T @ vt[:5] + rows.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(pca(rows), expected, rtol=0, atol=5e-4)


def test_the_residual_of_pca_is_the_share_of_the_left_out_variance(rows):
    pca = fit_pca([rows], 5)
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows.astype(np.float64).T)))[::-1]
    error = ((rows.astype(np.float64) - pca(rows)) ** 2).sum() / (
        (rows - rows.mean(axis=0, dtype=np.float64)) ** 2
    ).sum()
    assert error == pytest.approx(variances[5:].sum() / variances.sum(), rel=1e-4)


def test_pca_codes_have_exactly_k_values(rows):
    idx, vals = fit_pca([rows], 5).code(rows[:10])
    assert idx.shape == vals.shape == (10, 5)
    assert (vals != 0).all()


def test_constant_replacements_answer_the_constant_everywhere(rows):
    mean = rows.mean(axis=0)
    np.testing.assert_array_equal(ConstantReplacement(mean)(rows[:4]), np.tile(mean, (4, 1)))
    assert ConstantReplacement(mean).code(rows[:4])[1].shape == (4, 0)


def test_pca_without_rows_or_with_too_many_components_says_so(rows):
    with pytest.raises(ShapeError, match="got none"):
        fit_pca([], 4)
    with pytest.raises(ShapeError, match="1 to 24"):
        fit_pca([rows], 25)
    with pytest.raises(ShapeError, match=r"\(K, 24\)"):
        PCAReplacement(rows.mean(axis=0), np.zeros((3, 23)))
