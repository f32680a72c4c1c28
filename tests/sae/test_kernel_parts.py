"""Parts of the fast step by themselves, where a whole step would not tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.kernels import FastStep, keep_largest_
from sae.losses import dense_step
from sae.sparse_products import weighted_rows

from .variant_models import AUXK, K, arrays, batch, loss_settings, make, mask, norms, pre_acts


@pytest.mark.parametrize("positive", [2, 3, 4, 5, 8])
def test_the_k_largest_entries_above_zero_are_kept_however_many_there_are(positive):
    rng = np.random.default_rng(0)
    pre_NM = rng.standard_normal((50, 9)).astype(np.float32)
    pre_NM[np.argsort(pre_NM, axis=1).argsort(axis=1) < 9 - positive] -= 10  # of no row more are above zero
    expected_NM = np.where(pre_NM >= np.sort(pre_NM, axis=1)[:, -3, None], np.maximum(pre_NM, 0), 0)
    np.testing.assert_array_equal(keep_largest_(torch.from_numpy(pre_NM.copy()), 3).numpy(), expected_NM)


def test_rows_with_few_entries_above_zero_and_broken_ones_stay_beside_rows_with_many():
    pre_NM = torch.tensor([[3.0, -1, 2, 1], [-1, 5, -2, -3], [4, torch.nan, 1, 2], [1, 2, 3, 4]], dtype=torch.bfloat16)
    kept_NM = keep_largest_(pre_NM.clone(), 2)
    np.testing.assert_array_equal(kept_NM[[0, 1, 3]].float(), [[3, 0, 2, 0], [0, 5, 0, 0], [0, 0, 3, 4]])
    assert bool(kept_NM[2, 1].isnan())


@pytest.mark.parametrize("count", [2 * AUXK, 6 * AUXK])
def test_dead_latents_at_zero_get_no_gradient_from_auxk_where_fewer_are_above_it_than_it_takes(count):
    model, dead_F, u_ND = make("topk"), mask(count), batch()
    with torch.no_grad():
        model.b_enc_F[dead_F] -= 2.5 * u_ND.norm(dim=1).mean() / u_ND.shape[1] ** 0.5
    positive_N = (model.pre_acts(u_ND)[:, dead_F] > 0).sum(1)
    assert (positive_N < AUXK).any()
    assert (positive_N > 0).any()
    FastStep(model, loss_settings())(u_ND, dead_F)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.double()
    dense_step(model, u_ND.double(), loss_settings(), dead_F)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm()
        if name != "b_dec_D":
            assert (found[name][dead_F] - parameter.grad[dead_F]).norm() < 1e-4 * parameter.grad[dead_F].norm()


def test_the_threshold_of_a_batch_is_in_units_of_what_is_compared_with_rows_of_any_length():
    model, u_ND = make("batchtopk", decoder_rows="free"), batch()
    dense_step(model, u_ND, loss_settings())
    p = arrays(model)
    ranked_NF = np.maximum(pre_acts(p, u_ND.double().numpy()), 0) * norms(p)
    assert float(model.theta) == pytest.approx(np.sort(ranked_NF, axis=None)[-K * len(u_ND)], rel=1e-5)


@pytest.mark.parametrize("latents", [1, 8, 13, 64])
def test_rows_weighted_in_parts_are_the_vector_times_the_matrix(latents):
    generator = torch.Generator().manual_seed(latents)
    weight_F, table_FD = torch.randn(latents, generator=generator), torch.randn(latents, 5, generator=generator)
    expected_D = (weight_F.double() @ table_FD.double()).float()
    torch.testing.assert_close(weighted_rows(weight_F, table_FD), expected_D)
