from __future__ import annotations

import copy

import pytest
import torch

from sae.kernels import rest_
from sae.losses import dense_step
from sae.model import apply_update_
from sae.native.library import native_library
from sae.native.stepper import NativeStepper, balance
from sae.steppers import TorchStepper
from sae.train_config import TrainConfig

from .test_model_and_kernels import NAMES, batch, loss_settings, make, relative

BF16 = torch.bfloat16


@pytest.fixture
def lib():
    found = native_library()
    assert found is not None, "the tests need a C compiler, as the project does"
    return found


def stepper(model, settings, lib):
    return NativeStepper(model, settings, config_of(model), lib)


def config_of(model):
    return TrainConfig(num_latents=model.num_latents, k=model.k)


def dead_mask(latents, count):
    dead_F = torch.zeros(latents, dtype=torch.bool)
    dead_F[torch.randperm(latents, generator=torch.Generator().manual_seed(1))[:count]] = True
    return dead_F if count else None


# ---- top-k ----


def topk(lib, pre_NF, k):
    idx_NK = torch.empty(len(pre_NF), k, dtype=torch.int32)
    lib.topk(pre_NF.contiguous(), k, idx_NK)
    return idx_NK.long()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("latents", "k"),
    [(1, 1), (7, 1), (7, 7), (100, 3), (257, 256), (1000, 32), (4096, 64), (4099, 5), (70001, 9), (512, 512)],
)
def test_top_k_is_that_of_torch_for_odd_shapes_and_negative_entries(lib, latents, k, dtype):
    generator = torch.Generator().manual_seed(latents)
    for shift in (0.0, -10.0):  # -10: nothing is positive
        pre_NF = (torch.randn(13, latents, generator=generator) + shift).to(dtype)
        idx_NK = topk(lib, pre_NF, k)
        assert all(len(set(row)) == k for row in idx_NK.tolist())
        expected_NK = pre_NF.float().topk(k).values
        assert torch.equal(pre_NF.float().gather(1, idx_NK).sort(1, descending=True).values, expected_NK)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_among_equal_entries_top_k_takes_the_lowest_indices(lib, dtype):
    pre_NF = torch.randint(-3, 4, (20, 3000), generator=torch.Generator().manual_seed(0)).to(dtype)
    order_NF = pre_NF.float().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(topk(lib, pre_NF, 900).sort(1).values, order_NF[:, :900].sort(1).values)
    assert torch.equal(topk(lib, torch.zeros(2, 3000, dtype=dtype), 4).sort(1).values, torch.arange(4).expand(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_infinities_are_ordered_and_nan_counts_as_the_largest(lib, dtype):
    pre_NF = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre_NF[:, 11], pre_NF[:, 1500], pre_NF[:, 3] = torch.inf, torch.nan, -torch.inf
    pre_NF[:, 1600] = torch.tensor(-torch.nan)  # the sign that x86 gives to 0 / 0
    assert torch.equal(topk(lib, pre_NF, 3).sort(1).values, torch.tensor([11, 1500, 1600]).expand(4, 3))
    assert not (topk(lib, pre_NF, 1999) == 3).any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("latents", "k"), [(1, 1), (7, 7), (300, 1), (410, 256), (9000, 40)])
def test_keeping_the_largest_is_relu_and_zero_for_the_rest_whatever_ties_there_are(lib, latents, k, dtype):
    generator = torch.Generator().manual_seed(latents)
    pre_NF = torch.randn(70, latents, generator=generator).to(dtype)
    pre_NF[30:60] = torch.randint(-2, 3, (30, latents), generator=generator).to(dtype)
    pre_NF[60:] = -pre_NF[60:].abs()
    pre_NF[0, 0] = torch.inf
    expected_NF = torch.zeros_like(pre_NF)
    idx_NK = pre_NF.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected_NF.scatter_(1, idx_NK, pre_NF.relu().gather(1, idx_NK))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(lib.keep_(pre_NF.clone(), k), expected_NF)
    pre_NF[1, latents // 2] = torch.tensor(-torch.nan)
    assert lib.keep_(pre_NF, k)[1, latents // 2].isnan()


@pytest.mark.parametrize(("rows", "d"), [(1, 1), (40, 256), (33, 700)])
def test_what_auxk_leaves_is_that_of_torch_in_one_pass(lib, rows, d):
    generator = torch.Generator().manual_seed(d)
    product_ND, minus_error_ND = torch.randn(rows, d, generator=generator).bfloat16(), torch.randn(rows, d)
    unit, scale = 12.5, torch.tensor(0.37)
    square, grad_ND = rest_(product_ND.clone(), minus_error_ND, unit, scale)
    exact_ND = product_ND.double() + unit * minus_error_ND.double()
    for found, found_ND in (lib.rest_(product_ND.clone(), minus_error_ND, unit, scale), (square, grad_ND)):
        assert float(found) == pytest.approx(float(exact_ND.square().sum()), rel=1e-6)
        assert found_ND.dtype == BF16
        assert relative(found_ND.double(), 0.37 * exact_ND) < 2**-8
    assert relative(lib.rest_(product_ND, minus_error_ND, unit, scale)[1].double(), grad_ND.double()) < 1e-3


# ---- the step ----

SHAPES = [
    # d, latents, k, rows: chosen from 8-bit candidates where latents >= 48 k
    (24, 200, 6, 160),
    (24, 400, 6, 160),
    (33, 1501, 5, 100),
    (7, 97, 1, 33),
    (1, 60, 1, 5),
    (130, 2000, 16, 47),
    (16, 20, 20, 40),
]


@pytest.mark.parametrize(("d", "latents", "k", "rows"), SHAPES)
@pytest.mark.parametrize("share", [0, 0.05, 0.6])
def test_steps_equal_float64_autograd_over_all_latents_and_torchs_adam(lib, d, latents, k, rows, share):
    dead_F = dead_mask(latents, int(share * latents))
    model, settings = make(d=d, latents=latents, k=k), loss_settings(auxk_k=4)
    oracle = copy.deepcopy(model).double()
    native, adam = (
        stepper(model, settings, lib),
        torch.optim.Adam(oracle.parameters(), lr=1e-3, betas=config_of(model).betas),
    )
    for number in range(6):
        u_ND = batch(number, rows, d)
        result = native.step(u_ND, lr=1e-3, dead_F=dead_F)
        expected = dense_step(oracle, u_ND.double(), settings, dead_F)
        apply_update_(oracle, adam)
        assert torch.equal(result.fired_F, expected.fired_F), number
        for name in ("error", "auxk_loss", "loss"):
            assert float(getattr(result, name)) == pytest.approx(float(getattr(expected, name)), rel=2e-5), name
    for name in NAMES:
        assert relative(getattr(model, name).detach(), getattr(oracle, name).detach()) < 3e-6, name


@pytest.mark.parametrize("dead", [0, 20])
def test_one_step_equals_the_torch_stepper_to_a_millionth(lib, dead):
    for d, latents, k, rows in SHAPES[:4]:
        ours, theirs = make(d=d, latents=latents, k=k), make(d=d, latents=latents, k=k)
        before = {name: getattr(ours, name).detach().clone() for name in NAMES}
        settings, u_ND, dead_F = loss_settings(), batch(3, rows, d), dead_mask(latents, dead)
        stepper(ours, settings, lib).step(u_ND, lr=1e-2, dead_F=dead_F)
        TorchStepper(theirs, settings, config_of(theirs)).step(u_ND, lr=1e-2, dead_F=dead_F)
        for name in NAMES:
            assert relative(getattr(ours, name).detach(), getattr(theirs, name).detach()) < 1e-6, name
            assert relative(getattr(ours, name).detach(), before[name]) > 1e-4, name


def test_bfloat16_names_candidates_and_float32_values_decide(lib):
    model, u_ND = make(latents=600, k=8), batch()
    settings, oracle = loss_settings(encoder_dtype=BF16), make(latents=600, k=8)
    pre_NF = torch.nn.functional.linear(
        (u_ND - model.b_dec_D).bfloat16(), model.W_enc_FD.bfloat16(), model.b_enc_F.bfloat16()
    ).float()
    native = stepper(model, settings, lib)
    result = native.step(u_ND, lr=1e-3)
    idx_NK, vals_NK = (native._batch[name].view(-1, 8) for name in ("idx_P", "vals_P"))
    idx_NK = idx_NK.long()
    assert native._batch["candidates_N"].tolist() == [8 + 4] * len(u_ND)
    edge_N = pre_NF.topk(8 + 4).values[:, -1:]
    assert bool((pre_NF.gather(1, idx_NK) >= edge_N).all())  # among the named ones; at ties any of the equal ones
    with torch.no_grad():
        expected_NK = torch.relu(oracle.double().pre_acts(u_ND.double()).gather(1, idx_NK))
        error = (oracle.decode(expected_NK, idx_NK) - u_ND).pow(2).sum()
    assert relative(vals_NK.double(), expected_NK) < 1e-6
    assert float(result.error) == pytest.approx(float(error), rel=1e-6)
    exact_NK = oracle.pre_acts(u_ND.double()).topk(8).indices
    assert torch.equal(idx_NK.sort(1).values, exact_NK.sort(1).values)
    alone_NK = pre_NF.topk(8).indices
    assert not torch.equal(alone_NK.sort(1).values, exact_NK.sort(1).values)  # which bfloat16 alone misses


def test_the_bfloat16_copy_follows_the_weights(lib):
    for settings in (loss_settings(encoder_dtype=BF16), loss_settings()):
        model = make(latents=600, k=8)
        native = stepper(model, settings, lib)
        for number in range(3):
            native.step(batch(number), lr=1e-2)
        kept = {name: copy.clone() for name, copy in native._copies.items()}
        native._library.run("refresh_all", native._step)
        assert all(torch.equal(kept[name], now) for name, now in native._copies.items())
    model = make(latents=600, k=8)
    native = stepper(model, loss_settings(encoder_dtype=BF16), lib)
    native.step(batch(), lr=1e-2)
    assert torch.equal(native._copies["bf16_FD"], model.W_enc_FD.detach().bfloat16())


def outliers(rows, d):
    """A few dimensions a hundred times as large as the others, as in residual streams."""
    u_ND = batch(5, rows, d)
    u_ND[:, ::17] *= 100
    return u_ND


@pytest.mark.parametrize("data", [batch, outliers], ids=["even", "outliers"])
def test_eight_bit_candidates_leave_the_choice_to_exact_values(lib, data):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    model = make(d=256, latents=4096, k=16)
    u_ND = data(0, 300, 256) if data is batch else data(300, 256)
    oracle = copy.deepcopy(model).double()
    native = stepper(model, loss_settings(), lib)
    assert native._int8
    native.step(u_ND, lr=1e-3)
    with torch.no_grad():
        pre_NF = oracle.pre_acts(u_ND.double())
    chosen_NK, best_NK = native._batch["idx_P"].view(-1, 16).long(), pre_NF.topk(16).indices
    assert torch.equal(chosen_NK.sort(1).values, best_NK.sort(1).values)
    assert 16 < native.candidates_per_row < 400


def test_balancing_the_dimensions_makes_fewer_candidates_of_data_with_outliers(lib):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    counts = []
    for even in (False, True):
        native = stepper(make(d=256, latents=4096, k=16), loss_settings(), lib)
        if even:
            native._balance_D.fill_(1.0)
        native.step(outliers(300, 256), lr=1e-3)
        counts.append(native.candidates_per_row)
    assert counts[0] < 0.7 * counts[1]
    assert bool((balance([torch.zeros(5, 3)]) > 0).all())
    assert bool(balance([torch.full((5, 3), torch.nan)]).isfinite().all())


def test_the_kept_balance_is_of_all_rows_also_of_a_dimension_that_few_of_them_have(lib):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    u_ND = batch(3, 1500, 24)
    u_ND[:, 7] = 0
    u_ND[[2, 701, 1499], 7] = 50
    model = make(d=24, latents=400, k=6)
    rms_D = (u_ND - model.b_dec_D).detach().double().square().mean(0).sqrt()
    native = stepper(model, loss_settings(), lib)
    native.step(u_ND, lr=1e-3)
    torch.testing.assert_close(native._balance_D, (rms_D + 1e-6 + 1e-3 * rms_D.mean()).sqrt().float())


def test_rows_without_a_positive_pre_activation_are_reconstructed_by_the_bias_alone(lib):
    for latents in (200, 400):
        model, u_ND = make(latents=latents), batch()
        with torch.no_grad():
            model.b_enc_F.fill_(-1e3)
        error = float((u_ND - model.b_dec_D.detach()).pow(2).sum())
        before_FD = model.W_enc_FD.detach().clone()
        result = stepper(model, loss_settings(), lib).step(u_ND, lr=1e-2)
        assert not result.fired_F.any()
        assert float(result.error) == pytest.approx(error, rel=1e-6)
        assert torch.equal(model.W_enc_FD.detach(), before_FD)


@pytest.mark.parametrize("latents", [200, 400])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_loss(lib, latents, value):
    u_ND = batch()
    u_ND[5, 3] = value
    assert not stepper(make(latents=latents), loss_settings(), lib).step(u_ND, lr=1e-3).loss.isfinite()
    model = make(latents=latents)
    with torch.no_grad():
        model.W_enc_FD[7, 2] = value
    assert not stepper(model, loss_settings(), lib).step(batch(), lr=1e-3).loss.isfinite()


def bits(lib, threads, *, steps=4, stop=0, dtype=torch.float32, auxk_dtype=torch.float32, dead=30):
    """The weights after some steps, as bytes; with `stop`, through a saved state in the middle."""
    torch.set_num_threads(threads)
    settings, model = loss_settings(encoder_dtype=dtype, auxk_dtype=auxk_dtype), make(d=40, latents=700, k=8)
    native, dead_F = stepper(model, settings, lib), dead_mask(700, dead)
    for number in range(steps):
        if stop and number == stop:
            saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(native.state_dict())
            model = make(d=40, latents=700, k=8, seed=9)
            model.load_state_dict(saved)
            native = stepper(model, settings, lib)
            native.load_state_dict(state)
        native.step(batch(number, 333, 40), lr=1e-2, dead_F=dead_F if number % 2 else None)
    return b"".join(getattr(model, name).detach().numpy().tobytes() for name in NAMES)


@pytest.mark.parametrize(("dtype", "auxk_dtype"), [(torch.float32, torch.float32), (BF16, BF16)])
def test_runs_repeat_to_the_bit_and_go_on_from_a_saved_state(lib, dtype, auxk_dtype):
    once = bits(lib, 2, dtype=dtype, auxk_dtype=auxk_dtype)
    assert once == bits(lib, 2, dtype=dtype, auxk_dtype=auxk_dtype)
    assert once == bits(lib, 2, stop=2, dtype=dtype, auxk_dtype=auxk_dtype)


def test_the_bits_do_not_depend_on_the_number_of_threads(lib):
    if not lib.has_int8:
        pytest.skip("without 8-bit products torch's matrix product decides")
    assert bits(lib, 1, dead=0) == bits(lib, 2, dead=0) == bits(lib, 3, dead=0)  # AuxK is torch's matrix products
