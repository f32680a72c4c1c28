from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sae.choice import grouped_topk
from sae.errors import ConfigError, ShapeError
from sae.kernels import FastStep, encoder_dtype
from sae.losses import LossSettings, dense_step
from sae.model import TopKSAE, apply_update_, input_scale
from sae.runtime import decode, encode
from sae.sparse_products import Chosen, offsets_of, sampled_products, sparse_sums
from sae.variants import VARIANTS

D, F, K, N = 24, 200, 6, 160
NAMES = ("W_enc_FD", "W_dec_FD", "b_enc_F", "b_dec_D")


def make(*, d=D, latents=F, k=K, seed=0, scale=4.0, kind=TopKSAE):
    """An SAE moved away from its start, so that nothing is zero, tied or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    mean_D = np.random.default_rng(seed).standard_normal(d)
    model = kind(d_in=d, num_latents=latents, k=k, mean_D=mean_D, scale=scale, generator=generator)
    with torch.no_grad():
        model.W_enc_FD += 0.3 * torch.randn(latents, d, generator=generator)
        model.b_enc_F += 0.3 * torch.randn(latents, generator=generator)
    return model


def batch(seed=0, rows=N, d=D):
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, d)) * np.geomspace(0.3, 3, d) + 0.5).astype(np.float32))


def loss_settings(auxk_k=10, **extra):
    return LossSettings(variance=float(D), auxk_k=auxk_k, auxk_coef=1 / 32, **extra)


def mask(count):
    """`count` of the latents, spread out, are dead."""
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.randperm(F, generator=torch.Generator().manual_seed(1))[:count]] = True
    return dead_F if count else None


def gradients(model):
    return {name: getattr(model, name).grad.double().clone() for name in NAMES}


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---- the model ----


def test_it_starts_tied_with_unit_rows_and_the_mean_as_decoder_bias():
    mean_D = np.arange(5.0)
    model = TopKSAE(d_in=5, num_latents=7, k=2, mean_D=mean_D, scale=2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.W_enc_FD, model.W_dec_FD)
    assert model.W_enc_FD.data_ptr() != model.W_dec_FD.data_ptr()
    torch.testing.assert_close(model.W_dec_FD.norm(dim=1), torch.ones(7))
    assert torch.equal(model.b_dec_D.detach(), torch.arange(5.0) / 2)
    assert not model.b_enc_F.any()


@pytest.mark.parametrize("variance", [3e-9, 0.7, 24.0, 1e5])
def test_the_input_scale_is_a_power_of_two_near_the_standard_deviation(variance):
    scale = input_scale(variance, D)
    assert np.log2(scale) == round(np.log2(scale))
    assert 0.7 < np.sqrt(variance / D) / scale < 1.42


def test_folding_the_scale_into_the_weights_changes_no_bit():
    model = make(scale=8.0)
    folded = make(scale=1.0)
    weights = model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h")
    with torch.no_grad():
        for name in NAMES:
            getattr(folded, name).copy_(torch.from_numpy(getattr(weights, name)))
        x_ND = batch() * 8
        vals_NK, idx_NK = model.encode(x_ND / 8)
        folded_vals_NK, folded_idx_NK = folded.encode(x_ND)
        assert torch.equal(folded_idx_NK, idx_NK)
        assert torch.equal(folded_vals_NK, vals_NK * 8)
        assert torch.equal(folded(x_ND), model(x_ND))
    assert np.array_equal(weights.W_dec_FD, model.W_dec_FD.detach().numpy())


def test_the_numpy_runtime_equals_the_torch_model_on_raw_activations():
    model = make()
    weights = model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h")
    x_ND = batch() * model.scale
    idx_NK, vals_NK = encode(weights, x_ND.numpy())
    with torch.no_grad():
        torch_vals_NK, torch_idx_NK = model.encode(x_ND / model.scale)
        x_hat_ND = model(x_ND).numpy()
    torch_vals_NK, order_NK = torch_vals_NK.sort(descending=True)
    np.testing.assert_array_equal(idx_NK, torch_idx_NK.gather(1, order_NK).numpy())
    assert np.linalg.norm(vals_NK - torch_vals_NK.numpy() * model.scale) < 1e-6 * np.linalg.norm(vals_NK)
    assert np.linalg.norm(decode(weights, idx_NK, vals_NK) - x_hat_ND) < 1e-6 * np.linalg.norm(x_hat_ND)


def test_the_update_takes_out_the_parallel_gradient_and_keeps_unit_rows():
    model = make()
    dense_step(model, batch(), loss_settings())
    assert model.W_dec_FD.grad is not None
    before_FD = model.W_dec_FD.grad.clone()
    row_FD = model.W_dec_FD.detach()
    expected_FD = before_FD - (before_FD * row_FD).sum(1, keepdim=True) * row_FD
    model.project_decoder_grad_()
    torch.testing.assert_close(model.W_dec_FD.grad, expected_FD)
    assert float((model.W_dec_FD.grad * row_FD).sum(1).abs().max()) < 1e-5 * float(before_FD.abs().max())
    apply_update_(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True))
    torch.testing.assert_close(model.W_dec_FD.detach().norm(dim=1), torch.ones(F))


def test_sizes_that_cannot_work_are_refused():
    generator = torch.Generator()
    with pytest.raises(ConfigError, match="k=9"):
        TopKSAE(d_in=4, num_latents=8, k=9, mean_D=np.zeros(4), scale=1.0, generator=generator)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        TopKSAE(d_in=4, num_latents=8, k=2, mean_D=np.zeros(5), scale=1.0, generator=generator)
    with pytest.raises(ConfigError, match="positive"):
        input_scale(0.0, 4)
    with pytest.raises(ConfigError, match="auto, float32 or bfloat16"):
        encoder_dtype("int8", torch.device("cpu"))
    with pytest.raises(ConfigError, match="auxk_dtype must be"):
        encoder_dtype("int8", torch.device("cpu"), key="auxk_dtype")
    assert encoder_dtype("f32", torch.device("cpu")) is torch.float32


# ---- the loss: numpy says what it is, finite differences say what its gradient is ----


def numpy_loss(p, u_ND, dead_F, error_ND):
    """L of losses.py in float64; `error_ND` is the detached target of AuxK, given so that it stays fixed."""

    def keep(pre_NF, k):
        acts_NF = np.maximum(pre_NF, 0)
        for row in acts_NF:
            row[np.argsort(-row, kind="stable")[k:]] = 0
        return acts_NF

    pre_NF = (u_ND - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"]
    u_hat_ND = keep(pre_NF, K) @ p["W_dec_FD"] + p["b_dec_D"]
    loss = ((u_ND - u_hat_ND) ** 2).sum() / len(u_ND)
    if dead_F is not None:
        error_hat_ND = keep(np.where(dead_F, pre_NF, -np.inf), 10) @ p["W_dec_FD"]
        auxk = ((error_ND - error_hat_ND) ** 2).sum() / ((error_ND - error_ND.mean(0)) ** 2).sum()
        loss += 1 / 32 * D * auxk
    return loss


@pytest.mark.parametrize("dead", [0, 5, 30])
def test_the_dense_gradients_are_the_finite_differences_of_the_written_loss(dead):
    model, u_ND = make().double(), batch().double()
    dead_F = mask(dead)
    result = dense_step(model, u_ND, loss_settings(), dead_F)
    p = {name: getattr(model, name).detach().numpy().copy() for name in NAMES}
    with torch.no_grad():
        error_ND = (u_ND - model.decode(*model.encode(u_ND))).numpy()
    mask_F = dead_F.numpy() if dead_F is not None else None
    assert float(result.loss) == pytest.approx(numpy_loss(p, u_ND.numpy(), mask_F, error_ND), rel=1e-12)
    rng = np.random.default_rng(0)
    for name in NAMES:
        direction = rng.standard_normal(p[name].shape)
        if dead_F is not None and name != "b_dec_D":
            direction[~mask_F] *= 0.1
        step = 1e-8
        sides = [numpy_loss(p | {name: p[name] + s * direction}, u_ND.numpy(), mask_F, error_ND) for s in (step, -step)]
        slope = float((getattr(model, name).grad.numpy() * direction).sum())
        assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-5), name


# ---- fast against general ----


@pytest.mark.parametrize("dead", [0, 1, 5, 30, 120])  # none, all taken, all taken, chosen among, sparse
def test_fast_gradients_equal_a_float64_autograd_over_all_latents(dead):
    model, u_ND, dead_F = make(), batch(), mask(dead)
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, u_ND.double(), loss_settings(), dead_F)
    result = FastStep(model, loss_settings())(u_ND, dead_F)
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(oracle)[name]) < 1e-6, name
    for number in ("error", "auxk_loss", "loss"):
        assert float(getattr(result, number)) == pytest.approx(float(getattr(expected, number)), rel=1e-6)
    assert torch.equal(result.fired_F, expected.fired_F)


@pytest.mark.parametrize("dead", [5, 30, 120])
def test_auxk_reaches_the_encoder_of_dead_latents_that_the_main_loss_does_not_touch(dead):
    model, u_ND, dead_F = make(), batch(), mask(dead)
    with torch.no_grad():
        model.b_enc_F[~dead_F] += 20.0  # the dead are above zero on half the rows, never among the k largest
    oracle = copy.deepcopy(model).double()
    step = FastStep(model, loss_settings())
    fired_F = step(u_ND).fired_F
    assert not fired_F[dead_F].any()
    assert not model.W_enc_FD.grad[dead_F].any()
    step(u_ND, dead_F)
    dense_step(oracle, u_ND.double(), loss_settings(), dead_F)
    reached = model.W_enc_FD.grad[dead_F]
    assert (reached.norm(dim=1) > 0).float().mean() > 0.9
    assert relative(reached.double(), oracle.W_enc_FD.grad[dead_F]) < 1e-6
    assert relative(model.b_enc_F.grad[dead_F].double(), oracle.b_enc_F.grad[dead_F]) < 1e-6


def test_auxk_is_exact_where_no_row_has_more_positive_latents_than_are_taken():
    model, u_ND, dead_F, settings = make(), batch(), mask(24), loss_settings(auxk_k=20)
    with torch.no_grad():
        most = int((model.pre_acts(u_ND)[:, dead_F] > 0).sum(1).max())
    assert 10 < most <= 20
    oracle = copy.deepcopy(model).double()
    dense_step(oracle, u_ND.double(), settings, dead_F)
    FastStep(model, settings)(u_ND, dead_F)
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(oracle)[name]) < 1e-6, name


@pytest.mark.parametrize(("dead", "most"), [(5, 0.03), (24, 0.01), (120, 0.05)])  # latents cross zero, or the edge
def test_auxk_in_bfloat16_gives_the_gradients_but_for_rounding(dead, most):
    model, u_ND, dead_F = make(), batch(), mask(dead)
    with torch.no_grad():
        model.b_enc_F[~dead_F] += 20.0  # the dead get gradients of AuxK alone
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, u_ND.double(), loss_settings(auxk_k=20), dead_F)
    result = FastStep(model, loss_settings(auxk_k=20, auxk_dtype=torch.bfloat16))(u_ND, dead_F)
    for name in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
        reached, exact = getattr(model, name).grad[dead_F].double(), getattr(oracle, name).grad[dead_F]
        assert 1e-5 < relative(reached, exact) < most, name  # above 1e-5: the dtype was really used
        assert getattr(model, name).grad.dtype == torch.float32
    assert relative(model.W_dec_FD.grad[~dead_F].double(), oracle.W_dec_FD.grad[~dead_F]) < 1e-6
    assert float(result.auxk_loss) == pytest.approx(float(expected.auxk_loss), rel=1e-3)


@pytest.mark.parametrize("dead", [0, 30, 120])
def test_forty_fast_steps_end_at_the_weights_of_forty_general_ones(dead):
    fast, general = make(), make()
    dead_F = mask(dead)
    step = FastStep(fast, loss_settings())
    fast_adam = torch.optim.Adam(fast.parameters(), lr=1e-3, fused=True)
    general_adam = torch.optim.Adam(general.parameters(), lr=1e-3)
    start_FD = fast.W_dec_FD.detach().clone()
    for number in range(40):
        u_ND = batch(number)
        step(u_ND, dead_F)
        apply_update_(fast, fast_adam)
        dense_step(general, u_ND, loss_settings(), dead_F)
        apply_update_(general, general_adam)
    assert relative(fast.W_dec_FD.detach(), start_FD) > 1e-2
    for name in NAMES:
        assert relative(getattr(fast, name).detach(), getattr(general, name).detach()) < 2e-5, name


def test_a_mask_without_a_dead_latent_is_the_same_as_none():
    with_mask, without = make(), make()
    result = FastStep(with_mask, loss_settings())(batch(), torch.zeros(F, dtype=torch.bool))
    FastStep(without, loss_settings())(batch())
    assert float(result.auxk_loss) == 0
    assert all(torch.equal(getattr(with_mask, name).grad, getattr(without, name).grad) for name in NAMES)


def test_rows_are_cut_into_blocks_without_changing_the_gradients():
    model, u_ND = make(latents=4096, k=8), batch(rows=1100)  # two blocks and a rest
    oracle = copy.deepcopy(model).double()
    dense_step(oracle, u_ND.double(), loss_settings())
    FastStep(model, loss_settings())(u_ND)
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(oracle)[name]) < 1e-6, name


def test_equal_latents_at_the_edge_give_the_same_loss_whichever_is_taken():
    model, u_ND = make(), batch()
    with torch.no_grad():
        for name in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
            table = getattr(model, name)
            table[F // 2 :] = table[: F // 2]
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, u_ND.double(), loss_settings())
    result = FastStep(model, loss_settings())(u_ND)
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    folded, folded_oracle = (
        {n: g[n][: F // 2] + g[n][F // 2 :] for n in NAMES[:3]} for g in map(gradients, (model, oracle))
    )
    for name in NAMES[:3]:
        assert relative(folded[name], folded_oracle[name]) < 1e-6, name


def test_rows_without_a_positive_pre_activation_are_reconstructed_by_the_bias_alone():
    model, u_ND = make(), batch()
    with torch.no_grad():
        model.b_enc_F.fill_(-1e3)
    result = FastStep(model, loss_settings())(u_ND)
    assert not result.fired_F.any()
    assert not model.W_enc_FD.grad.any()
    assert not model.W_dec_FD.grad.any()
    assert float(result.error) == pytest.approx(float((u_ND - model.b_dec_D.detach()).pow(2).sum()), rel=1e-6)


def test_bfloat16_only_chooses_and_the_values_are_float32():
    model, u_ND = make(k=20), batch()  # bfloat16 ties often: with this k both paths select by the same call
    settings = loss_settings(encoder_dtype=torch.bfloat16)
    oracle = copy.deepcopy(model)
    expected = dense_step(oracle, u_ND, settings)
    result = FastStep(model, settings)(u_ND)
    assert torch.equal(result.fired_F, expected.fired_F)
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(oracle)[name]) < 1e-6, name


@pytest.mark.parametrize("variant", ["topk", "groupmax", "batchtopk"])
def test_the_choice_with_bfloat16_agrees_with_that_of_exact_values(variant):
    model = make(d=256, latents=2048, k=32, kind=VARIANTS[variant])
    u_ND = batch(0, rows=512, d=256)
    with torch.no_grad():
        chosen, _ = FastStep(model, loss_settings(encoder_dtype=torch.bfloat16)).encode(u_ND - model.b_dec_D)
        pre_NF = copy.deepcopy(model).double().pre_acts(u_ND.double())
    found_NF, exact_NF = torch.zeros_like(pre_NF, dtype=torch.bool), torch.zeros_like(pre_NF, dtype=torch.bool)
    row_P = torch.arange(512).repeat_interleave(32) if chosen.row_P is None else chosen.row_P
    found_NF[row_P, chosen.idx.flatten()] = True
    if variant == "topk":
        exact_NF.scatter_(1, pre_NF.topk(32).indices, True)
    elif variant == "groupmax":
        exact_NF.scatter_(1, pre_NF.view(512, 32, 64).argmax(2) + torch.arange(0, 2048, 64), True)
    else:
        exact_NF = pre_NF >= pre_NF.flatten().topk(32 * 512).values.min()
    agreement = float((found_NF & exact_NF).sum()) / (512 * 32)
    assert agreement > 0.9995
    low_NF = torch.nn.functional.linear(
        (u_ND - model.b_dec_D).bfloat16(), model.W_enc_FD.bfloat16(), model.b_enc_F.bfloat16()
    ).float()
    if variant == "topk":  # by bfloat16 alone it would not
        assert float(exact_NF.gather(1, low_NF.topk(32).indices).float().mean()) < 0.997


@pytest.mark.parametrize(("latents", "k"), [(4096, 32), (4096, 1), (640, 20), (513, 4), (64, 64)])
def test_grouped_top_k_finds_the_k_largest_with_ties_and_without(latents, k):
    generator = torch.Generator().manual_seed(0)
    for pre_NF in (
        torch.randn(50, latents, generator=generator),
        torch.randint(0, 9, (50, latents), generator=generator).float(),
    ):
        vals_NK, idx_NK = grouped_topk(pre_NF, k)
        assert torch.equal(pre_NF.gather(1, idx_NK), vals_NK)
        assert all(len(set(row)) == k for row in idx_NK.tolist())
        expected_NK = -np.sort(-pre_NF.numpy(), axis=1)[:, :k]
        np.testing.assert_array_equal(vals_NK.sort(1, descending=True).values.numpy(), expected_NK)


def test_sampled_products_are_the_entries_of_the_full_product():
    rng = np.random.default_rng(0)
    a_ND, table_FD, idx_NK = rng.standard_normal((9, 5)), rng.standard_normal((30, 5)), rng.integers(0, 30, (9, 4))
    found = sampled_products(*(torch.from_numpy(array) for array in (a_ND, table_FD, idx_NK)))
    np.testing.assert_allclose(found.numpy(), np.take_along_axis(a_ND @ table_FD.T, idx_NK, axis=1), rtol=1e-9)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", ["k to a row", "any", "none"])
def test_sums_over_the_rows_of_a_latent_are_those_of_the_dense_product_whatever_was_in_the_memory(
    monkeypatch, mkl, dtype, pairs
):
    if not mkl:  # builds of torch without it: macOS, ARM
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    rows, d, latents, k = 40, 7, 60, 3
    rng = np.random.default_rng(0)
    centred_ND, grad_ND = (torch.from_numpy(rng.standard_normal((rows, d))).to(dtype) for _ in range(2))
    idx_NK = torch.from_numpy(np.argsort(rng.random((rows, 30)), axis=1)[:, :k])  # the latents from 30 on have no pair
    row_P, idx_P = torch.arange(rows).repeat_interleave(k), idx_NK.flatten()
    if pairs != "k to a row":
        kept_P = torch.from_numpy(rng.random(rows * k) < (0.6 if pairs == "any" else 0))
        row_P, idx_P = row_P[kept_P], idx_P[kept_P]
    vals_P, grad_vals_P = (torch.from_numpy(rng.standard_normal(len(row_P))).to(dtype) for _ in range(2))
    dense = []
    for value_P in (grad_vals_P, vals_P):
        dense_NF = torch.zeros(rows, latents, dtype=torch.float64)
        dense_NF[row_P, idx_P] = value_P.double()
        dense.append(dense_NF)
    expected = dense[0].t() @ centred_ND.double(), dense[1].t() @ grad_ND.double(), dense[0].sum(0)
    chosen = Chosen(idx_P, offsets_of(row_P, rows), row_P)
    if pairs == "k to a row":
        chosen, vals_P, grad_vals_P = Chosen(idx_NK), vals_P.view(rows, k), grad_vals_P.view(rows, k)
    kept = tuple(torch.full((latents, d), value, dtype=dtype) for value in (torch.nan, torch.inf))
    for out in (None, kept, kept):
        found = sparse_sums(latents, centred_ND, grad_ND, chosen, vals_P, grad_vals_P, out)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    if mkl and torch.backends.mkl.is_available():
        assert found[0] is kept[0]
