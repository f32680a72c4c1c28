"""Sparsity penalties while they grow, and of a gated skip transcoder: in float64 by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.losses import dense_step

from . import test_wirings
from .variant_models import LOSSES, N, arrays, batch, loss_settings, make


def losses(model, u_ND, settings):
    """The loss with the penalty at each of these weights."""
    found = {}
    for weight in (0.0, 0.25, 1.0):
        model.sparsity_weight = weight
        found[weight] = float(dense_step(model, u_ND, settings).loss)
    return found


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_a_penalty_that_is_a_quarter_grown_counts_a_quarter(name):
    model, u_ND = make(name).double(), batch().double()
    found = losses(model, u_ND, loss_settings())
    p = arrays(model)
    assert found[1.0] == pytest.approx(LOSSES[name][1](p, u_ND.numpy(), frozen=p), rel=1e-9)
    assert found[1.0] > 1.01 * found[0.0]
    assert found[0.25] - found[0.0] == pytest.approx((found[1.0] - found[0.0]) / 4, rel=1e-9)


def test_the_gates_own_reconstruction_has_the_skip_map_of_the_centred_input():
    model, settings, rows = test_wirings.make("skip", "gated")
    model.sparsity_weight = 0.0
    model = model.double()
    u_NW = rows.rows(N, 1).astype(np.float64) / model.scale
    p, wiring = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}, model.wiring
    centred_NI = u_NW[:, : wiring.d_in] - p["centre_I"]
    assert np.abs(p["W_skip_OD"] @ p["centre_I"]).max() > 0.1
    pre_NF = centred_NI @ p["W_enc_FD"].T + p["b_enc_F"]
    mag_NF = np.exp(p["r_F"]) * (pre_NF - p["b_enc_F"]) + p["b_mag_F"]
    skip_NO = centred_NI @ p["W_skip_OD"].T + p["b_dec_D"]
    expected = 0.0
    for acts_NF in (np.maximum(mag_NF, 0) * (pre_NF > 0), np.maximum(pre_NF, 0)):
        expected += ((u_NW[:, wiring.target] - acts_NF @ p["W_dec_FD"] - skip_NO) ** 2).sum() / N
    assert float(dense_step(model, torch.from_numpy(u_NW), settings).loss) == pytest.approx(expected, rel=1e-9)
