"""What the fold into a file's equations makes of rows without a length and of a k that is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.runtime import decode, encode

from .variant_models import D, F, K, arrays, batch, make, norms


def exported(model, **extra):
    return model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h", **extra)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "relu"])
def test_a_free_decoder_row_of_nothing_but_zeros_is_exported_as_it_is(name):
    model, x_ND = make(name, decoder_rows="free"), 4 * batch().double().numpy()
    with torch.no_grad():
        model.W_dec_FD[::7] = 0
    weights, p = exported(model), arrays(model)
    assert all(np.isfinite(getattr(weights, field)).all() for field in ("W_enc_FD", "b_enc_F", "W_dec_FD"))
    length_F = np.linalg.norm(weights.W_dec_FD, axis=1)
    np.testing.assert_allclose(length_F, np.arange(F) % 7 != 0, rtol=1e-6)
    idx_NK, vals_NK = encode(weights, x_ND.astype(np.float32))
    u_hat_ND = decode(weights, idx_NK, vals_NK) / 4
    a_NF = np.zeros((len(x_ND), F))
    np.put_along_axis(a_NF, idx_NK, vals_NK / 4, axis=1)
    expected_ND = a_NF / np.where(norms(p) > 0, norms(p), 1) @ p["W_dec_FD"] + p["b_dec_D"]
    np.testing.assert_allclose(u_hat_ND, expected_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rate", "k"), [(2.6 / F, 3), (3.4 / F, 3), (0.2 / F, 1), (0.0, 1), (1.0, F), (None, K)])
def test_an_sae_that_has_no_k_says_how_many_latents_fired_to_the_next_whole_one(rate, k):
    freq_F = None if rate is None else np.full(F, rate)
    assert exported(make("relu"), freq_F=freq_F).k == k
