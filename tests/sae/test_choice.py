"""The choice by bounds from 8-bit products: float64 decides what is right, whatever the rows and the weights are.

On a processor without 8-bit instructions torch multiplies these matrices by a slow general path, which gives the same.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import sae.choice
from sae.batch_select import select_batch
from sae.choice import BatchPairs, RowPairs, largest_bounds
from sae.kernels import FastStep
from sae.losses import dense_step
from sae.options import SAEOptions
from sae.pre_acts import Bounds, PreActs, finds_by_bounds, has_int8_products
from sae.steppers import TorchStepper
from sae.train_config import TrainConfig
from sae.variants import VARIANTS
from sae.variants.build import dtype_of

from .test_model_and_kernels import batch, gradients, loss_settings, make, relative

SIZES = [(24, 400, 6, 160), (33, 1501, 5, 100), (7, 97, 1, 33), (130, 2048, 16, 70), (3, 200, 2, 1)]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr("sae.pre_acts.has_int8_products", lambda device: device.type == "cpu")


def centred(model, u_ND):
    return (u_ND - model.b_dec_D).detach()


def exact(model, u_ND):
    with torch.no_grad():
        return copy.deepcopy(model).double().pre_acts(u_ND.double())


def unequal(rows, d, seed=0):
    """Rows of very different lengths, with dimensions of very different sizes."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, d)) * np.geomspace(1e-3, 30, d) * np.geomspace(0.01, 100, rows)[:, None]
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize(("d", "latents", "k", "rows"), SIZES)
@pytest.mark.parametrize("rows_of", [batch, unequal])
def test_bounds_are_above_the_pre_activations_and_not_far(d, latents, k, rows, rows_of):
    model = make(d=d, latents=latents, k=k)
    u_ND = batch(1, rows, d) if rows_of is batch else unequal(rows, d)
    pre_NF = exact(model, u_ND)
    with torch.no_grad():
        parts = [bound_NF.double().clone() for _, bound_NF in Bounds(model)(centred(model, u_ND))]
    bound_NF = torch.cat(parts)
    bounded_N = ~bound_NF.isnan().any(1)
    assert bool(bounded_N.all()) or rows_of is unequal
    gap_NF = (bound_NF - pre_NF)[bounded_N]
    assert float((gap_NF > 0).double().mean()) > 0.9999
    if (
        d >= 100 and rows_of is batch
    ):  # the gap is four standard deviations of what it varies by, no less and not much more
        length_N = centred(model, u_ND).double().norm(dim=1, keepdim=True)
        norm_F = model.W_enc_FD.detach().double().norm(dim=1)
        gap_NF = gap_NF / (length_N * norm_F)
        assert 3.3 < float(gap_NF.mean() / gap_NF.std()) < 6
        assert float(gap_NF.median()) < 0.1


@pytest.mark.parametrize(("d", "latents", "k", "rows"), SIZES)
@pytest.mark.parametrize("rows_of", [batch, unequal])
def test_the_k_largest_of_every_row_are_those_of_float64(d, latents, k, rows, rows_of):
    model = make(d=d, latents=latents, k=k)
    u_ND = batch(2, rows, d) if rows_of is batch else unequal(rows, d, 2)
    pre_NF = exact(model, u_ND)
    assert finds_by_bounds(model, k)
    with torch.no_grad():
        idx_NK, vals_NK = RowPairs(model, torch.float32)(centred(model, u_ND))
    found_NF, wanted_NF = torch.zeros_like(pre_NF, dtype=torch.bool), torch.zeros_like(pre_NF, dtype=torch.bool)
    found_NF.scatter_(1, idx_NK, vals_NK > 0)
    wanted_NF.scatter_(1, pre_NF.topk(k).indices, True)
    wanted_NF &= pre_NF > 0
    assert torch.equal(found_NF, wanted_NF)
    scale = float(pre_NF.abs().max())
    torch.testing.assert_close(vals_NK.double(), pre_NF.gather(1, idx_NK), rtol=1e-5, atol=1e-6 * scale)


def test_rows_whose_bounds_leave_it_open_are_done_again(monkeypatch):
    model, u_ND = make(d=24, latents=2000, k=8), batch(3, 300, 24)
    named, dense = [], []
    plain, plain_named = sae.choice.PreActs.__call__, RowPairs._named

    def counted(self, centred_ND):
        dense.append(len(centred_ND))
        return plain(self, centred_ND)

    def counted_named(self, centred_ND, spare, **more):
        named.append(len(centred_ND))
        return plain_named(self, centred_ND, spare, **more)

    monkeypatch.setattr(sae.choice.PreActs, "__call__", counted)
    monkeypatch.setattr(RowPairs, "_named", counted_named)
    wanted_NK = exact(model, u_ND).topk(8).indices.sort(1).values
    pairs, centred_ND = RowPairs(model, torch.float32), centred(model, u_ND)
    for settings, again, at_last in (
        (sae.choice.NAMED, range(60), range(1)),
        (((0, 2), (3, 32)), range(60, 130), range(1)),
        (((0, 2), (0, 2)), range(60, 130), range(60, 130)),
        (((0, 0), (3, 32)), range(1), range(200, 301)),  # most are open: no second try
    ):
        named.clear()
        dense.clear()
        monkeypatch.setattr(sae.choice, "NAMED", settings)
        with torch.no_grad():
            assert torch.equal(pairs(centred_ND)[0].sort(1).values, wanted_NK)
        assert sum(named) - 300 in again
        assert sum(dense) in at_last


STEPS_OF_SIGNS = (0.49, 1.49, 2.49, 8.45)


def rows_of_signs(model, step, rows):
    """Rows of +-step beside one 126, for a model of signs (changed in place), and the exact pre-activations: without a
    dither all roundings of such a row are one error, times the pattern that the latents look for."""
    latents, d = model.W_enc_FD.shape
    rng = np.random.default_rng(8)
    signs_FD = np.sign(rng.standard_normal((latents, d)))
    u_ND = step * np.sign(signs_FD[rng.integers(0, latents, (rows, 5))].sum(1))
    u_ND[np.arange(rows), rng.integers(0, d, rows)] = 126.0
    with torch.no_grad():
        model.W_enc_FD.copy_(torch.from_numpy(signs_FD / np.sqrt(d)))
        model.b_enc_F.copy_(1e-3 * torch.from_numpy(rng.standard_normal(latents)))  # no ties
        model.b_dec_D.zero_()
        u_ND = torch.from_numpy(u_ND.astype(np.float32))
    return u_ND, exact(model, u_ND)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
@pytest.mark.parametrize("step", STEPS_OF_SIGNS)
def test_rows_of_few_different_values_are_no_exception(variant, step, monkeypatch):
    k, rows = 8, 400
    model = make(d=128, latents=1024, k=k, kind=VARIANTS[variant])
    u_ND, pre_NF = rows_of_signs(model, step, rows)
    monkeypatch.setattr("sae.pre_acts.balance", lambda x_ND: torch.ones(128))
    with torch.no_grad():
        if variant == "batchtopk":
            wanted = pre_NF.flatten().topk(k * rows).values.sort().values
            pairs = BatchPairs(model, torch.float32)
            pairs.guess.least = float(wanted[0]) * 0.999
            found = pairs(u_ND).value_P.double().sort().values
        else:
            wanted = pre_NF.topk(k).values.clamp_min(0).sort(1).values
            found = RowPairs(model, torch.float32)(u_ND)[1].double().clamp_min(0).sort(1).values
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_candidates_that_are_not_few_are_not_gathered(monkeypatch):
    """Bounds of rows with a value hundreds of times as large as the rest are too wide to leave any latent out."""
    d, latents, k, rows = 48, 1000, 4, 512
    model, u_ND = make(d=d, latents=latents, k=k, kind=VARIANTS["batchtopk"]), batch(4, rows, d)
    u_ND[:, 5] = 1e4
    monkeypatch.setattr("sae.pre_acts.balance", lambda x_ND: torch.ones(d))
    with torch.no_grad():
        model.W_enc_FD[:, 5] = 0
    seen, gathered = [], sae.choice.sampled_products
    monkeypatch.setattr(sae.choice, "sampled_products", lambda *a: seen.append(a[2].numel()) or gathered(*a))
    with torch.no_grad():
        pairs = BatchPairs(model, torch.float32)
        for _ in range(2):
            found = pairs(centred(model, u_ND))
        wanted_NF = select_batch(model.pre_acts(u_ND), k * rows)
    found_NF = torch.zeros_like(wanted_NF)
    found_NF[found.row_P, found.latent_P] = True
    assert torch.equal(found_NF, wanted_NF)
    assert not seen


def test_one_dimension_and_too_many_are_left_to_the_dense_way(monkeypatch):
    assert not finds_by_bounds(make(d=1, latents=200, k=2), 2)
    model = make(d=20, latents=200, k=2)
    assert finds_by_bounds(model, 2)
    monkeypatch.setattr("sae.pre_acts.MOST_DIMENSIONS", 19)
    assert not finds_by_bounds(model, 2)


def test_rows_that_8_bits_cannot_hold_are_done_again():
    """Values hundreds of times as large as the rest, where an encoder looks at the rest only."""
    d, latents, k = 48, 600, 4
    model, u_ND = make(d=d, latents=latents, k=k), batch(4, 64, d)
    u_ND[::2, 5] = 4000.0
    u_ND[1::4] = 0
    u_ND[1::4, 9] = 500.0  # nothing else: no row that is lost
    with torch.no_grad():
        model.W_enc_FD[:, 5] = 0
    pre_NF = exact(model, u_ND)
    with torch.no_grad():
        idx_NK, vals_NK = RowPairs(model, torch.float32)(centred(model, u_ND))
    wanted_NK, scale = pre_NF.topk(k).values, float(pre_NF.abs().max())
    found_NK = vals_NK.double().sort(1, descending=True).values
    torch.testing.assert_close(found_NK, wanted_NK, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(pre_NF.gather(1, idx_NK), vals_NK.double(), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
@pytest.mark.parametrize(("d", "latents", "k", "rows"), SIZES)
def test_a_step_by_bounds_equals_float64_autograd(variant, d, latents, k, rows):
    model = make(d=d, latents=latents, k=k, kind=VARIANTS[variant])
    oracle, u_ND = copy.deepcopy(model).double(), batch(5, rows, d)
    expected = dense_step(oracle, u_ND.double(), loss_settings())
    step = FastStep(model, loss_settings())
    for _ in range(2):  # the second with BatchTopK's own guess
        result = step(u_ND)
        assert torch.equal(result.fired_F, expected.fired_F)
        assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        for name, gradient in gradients(model).items():
            assert relative(gradient, gradients(oracle)[name]) < 2e-5, name


@pytest.mark.parametrize("how", ["even", "unequal", "coarse", "few positive", "equal"])
def test_the_batchs_largest_are_those_of_the_dense_choice(how):
    d, latents, k, rows = 24, 700, 5, 120
    model = make(d=d, latents=latents, k=k, kind=VARIANTS["batchtopk"])
    u_ND = unequal(rows, d) if how == "unequal" else batch(6, rows, d)
    with torch.no_grad():
        if how == "coarse":
            u_ND[::3, 5] = 1e5
            model.W_enc_FD[:, 5] = 0
        elif how == "few positive":
            model.b_enc_F.fill_(-1e3)
            model.b_enc_F[:2] = 0
        elif how == "equal":
            model.W_enc_FD.zero_()
            model.b_enc_F.fill_(0.5)
            model.b_enc_F[7] = 1.0
        pre_NF = model.pre_acts(u_ND)
        wanted_NF = select_batch(pre_NF, k * rows)
        pairs = BatchPairs(model, torch.float32)
        for _ in range(3):
            found = pairs(centred(model, u_ND))
            found_NF = torch.zeros_like(wanted_NF)
            found_NF[found.row_P, found.latent_P] = True
            assert torch.equal(found_NF, wanted_NF)
            scale = float(pre_NF[wanted_NF].abs().max())
            torch.testing.assert_close(found.value_P, pre_NF[wanted_NF], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("guessed", [0.0, 0.9, 0.995, 1.0])
def test_those_that_bfloat16_names_hold_the_batchs_largest_whatever_the_guess(guessed):
    d, latents, k, rows = 256, 600, 20, 300
    model, u_ND = make(d=d, latents=latents, k=k, kind=VARIANTS["batchtopk"]), batch(8, rows, d)
    wanted = exact(model, u_ND).flatten().topk(k * rows).values.sort().values
    pairs = BatchPairs(model, torch.bfloat16)
    pairs.guess.least = guessed * float(wanted[0])
    with torch.no_grad():
        found = pairs(centred(model, u_ND)).value_P.double().sort().values
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_above_zero_in_bfloat16_only_does_not_fire():
    model, u_ND = make(d=64, latents=200, k=190, kind=VARIANTS["batchtopk"]), batch(9, 120, 64)
    W_DF, b_F = model.W_enc_FD.detach().bfloat16().t(), model.b_enc_F.detach().bfloat16()
    for row_1D in centred(model, u_ND).split(1):
        above_F = torch.addmm(b_F, row_1D.bfloat16(), W_DF)[0] > 0
        exact_F = exact(model, row_1D + model.b_dec_D)[0] > 0
        if bool((above_F & ~exact_F).any()):
            break
    model.k = int(above_F.sum())  # more than are above zero
    with torch.no_grad():
        found = BatchPairs(model, torch.bfloat16)(row_1D)
    assert float(found.value_P.min()) > 0
    assert len(found.value_P) == int((above_F & exact_F).sum()) < model.k


@pytest.mark.parametrize("values", [PreActs, Bounds])
def test_the_last_block_may_have_fewer_rows_and_a_later_batch_more(values):
    model = make(d=24, latents=4096, k=8)  # blocks of 512 rows
    made = PreActs(model, torch.float32) if values is PreActs else Bounds(model)
    for rows in (100, 1100, 700):
        u_ND = batch(10, rows, 24)
        with torch.no_grad():
            parts = [(part, values_NF.clone()) for part, values_NF in made(centred(model, u_ND))]
        assert torch.equal(torch.cat([torch.arange(rows)[part] for part, _ in parts]), torch.arange(rows))
        found_NF, pre_NF = torch.cat([values_NF for _, values_NF in parts]).double(), exact(model, u_ND)
        if values is PreActs:
            torch.testing.assert_close(found_NF, pre_NF, rtol=1e-4, atol=1e-4)
        else:
            assert float((found_NF > pre_NF).double().mean()) > 0.9999


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
@pytest.mark.parametrize("where", ["row", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, math.copysign(torch.nan, -1), torch.inf], ids=["nan", "-nan", "inf"])
def test_a_value_that_is_not_finite_reaches_the_loss(variant, where, value):
    model, u_ND = make(d=24, latents=700, k=5, kind=VARIANTS[variant]), batch(7, 60, 24)
    with torch.no_grad():
        if where == "bias":
            model.b_enc_F[3] = value
        else:
            (u_ND if where == "row" else model.W_enc_FD)[5, 3] = value
    assert not FastStep(model, loss_settings())(u_ND).loss.isfinite()


@pytest.mark.parametrize(("latents", "count"), [(40, 6), (1024, 9), (2048, 48), (1000, 1000)])
def test_the_largest_bounds_are_those_of_floats_and_none_above_zero_is_left_out(latents, count):
    rng = np.random.default_rng(latents)
    bound_NF = torch.from_numpy(rng.standard_normal((50, latents)).astype(np.float32) * 3)
    bound_NF[:10] -= 6  # few above zero
    bound_NF[10] = -bound_NF[10].abs()  # none
    bound_NF[11, 7] = torch.inf
    bound_NC, idx_NC = largest_bounds(bound_NF, count)
    assert torch.equal(bound_NC, bound_NF.gather(1, idx_NC))
    assert all(len(set(row)) == count for row in idx_NC.tolist())
    wanted_NC = bound_NF.topk(count).values.clamp_min(0)
    assert torch.equal(bound_NC.clamp_min(0).sort(descending=True).values, wanted_NC)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_a_training_that_goes_on_gives_the_same_bits(variant):
    config = TrainConfig(num_latents=700, k=5, variant=variant, kernel="torch")

    def trained(stop):
        model = make(d=24, latents=700, k=5, kind=VARIANTS[variant])
        stepper = TorchStepper(model, loss_settings(), config)
        for number in range(6):
            if number == stop:
                saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(stepper.state_dict())
                model = make(d=24, latents=700, k=5, kind=VARIANTS[variant], seed=9)
                stepper = TorchStepper(model, loss_settings(), config)
                model.load_state_dict(saved)
                guess = stepper._gradients.guess
                stepper.load_state_dict(state)
                assert guess is None or (guess.state() == state["guess"] and guess.least > 0)
            stepper.step(batch(number, 90, 24), lr=1e-2)
        return [parameter.detach().clone() for parameter in model.parameters()]

    for one, other in zip(trained(None), trained(3), strict=True):
        assert torch.equal(one, other)


def test_auto_means_float32_where_bounds_make_it_fast(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for variant, k, wanted in (
        ("topk", 8, torch.float32), ("batchtopk", 8, torch.float32), ("topk", 80, torch.bfloat16),
        ("groupmax", 8, torch.bfloat16),
    ):  # fmt: skip
        model = make(d=16, latents=800, k=k, kind=VARIANTS[variant])
        config = TrainConfig(num_latents=800, k=k, variant=variant, kernel="torch")
        assert dtype_of(config, model, cpu) is wanted, variant
    falling = TrainConfig(num_latents=800, k=8, kernel="torch", options=SAEOptions(k_start=80))
    assert dtype_of(falling, make(d=16, latents=800, k=8), cpu) is torch.bfloat16
    monkeypatch.setattr("sae.pre_acts.has_int8_products", lambda _: False)
    model = make(d=16, latents=800, k=8)
    assert dtype_of(TrainConfig(num_latents=800, k=8, kernel="torch"), model, cpu) is torch.bfloat16


def test_8_bit_products_are_for_processors_that_have_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    assert not has_int8_products(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    assert has_int8_products(torch.device("cpu")) == torch.backends.mkldnn.is_available()
    assert not has_int8_products(torch.device("cuda"))
