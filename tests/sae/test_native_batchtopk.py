"""BatchTopK in the compiled step, and a k that falls."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sae.batch_select import select_batch
from sae.kernels import FastStep
from sae.losses import dense_step
from sae.model import apply_update_
from sae.native.library import native_library
from sae.native.stepper import NativeStepper
from sae.options import SAEOptions
from sae.steppers import TorchStepper
from sae.train_config import TrainConfig
from sae.variants import VARIANTS
from sae.variants.batchtopk import BatchTopKSAE

from .test_choice import STEPS_OF_SIGNS, rows_of_signs
from .test_model_and_kernels import NAMES, batch, loss_settings, relative
from .test_native import dead_mask


@pytest.fixture
def lib():
    return native_library()


def batch_topk(d, latents, k, rows, settings, lib, *, seed=0):
    model = BatchTopKSAE(
        d_in=d, num_latents=latents, k=k, mean_D=np.random.default_rng(seed).standard_normal(d), scale=1.0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with torch.no_grad():
        model.b_enc_F.add_(0.1 * torch.randn(latents, generator=torch.Generator().manual_seed(seed + 1)))
    config = TrainConfig(num_latents=latents, k=k, variant="batchtopk")
    return model, NativeStepper(model, settings, config, lib), batch(seed, rows, d)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize(("d", "latents", "k", "rows"), [(24, 400, 6, 160), (33, 1501, 5, 100), (7, 97, 1, 33)])
def test_batchtopk_steps_equal_float64_autograd_and_torchs_adam(lib, monkeypatch, d, latents, k, rows, int8):
    if not int8:
        monkeypatch.setattr("sae.native.stepper.finds_in_int8", lambda *_: False)
    settings = loss_settings(auxk_k=4)
    model, native, _ = batch_topk(d, latents, k, rows, settings, lib)
    assert native._int8 == (int8 and lib.has_int8)
    oracle = copy.deepcopy(model).double()
    adam = torch.optim.Adam(oracle.parameters(), lr=1e-3, betas=native._betas)
    for number in range(6):
        u_ND, dead_F = batch(number, rows, d), dead_mask(latents, latents // 20) if number % 2 else None
        result = native.step(u_ND, lr=1e-3, dead_F=dead_F)
        expected = dense_step(oracle, u_ND.double(), settings, dead_F)
        apply_update_(oracle, adam)
        assert torch.equal(result.fired_F, expected.fired_F), number
        assert int(result.fired_F.sum()) == k * rows
        for name in ("error", "auxk_loss", "loss"):
            assert float(getattr(result, name)) == pytest.approx(float(getattr(expected, name)), rel=2e-5), name
    for name in NAMES:
        assert relative(getattr(model, name).detach(), getattr(oracle, name).detach()) < 3e-6, name
    assert float(model.theta) == pytest.approx(float(oracle.theta), rel=1e-5)


@pytest.mark.parametrize("step", STEPS_OF_SIGNS)
def test_a_batch_of_few_different_values_is_no_exception(lib, step):
    model, native, _ = batch_topk(128, 1024, 8, 1, loss_settings(), lib)
    u_ND, pre_NF = rows_of_signs(model, step, 400)
    wanted = pre_NF.flatten().topk(8 * 400).values.sort().values
    native._balance_D.fill_(1.0)
    native._pairs.guess.load([float(wanted[0]) * 0.999, 0.1])
    native.step(u_ND, lr=1e-3)
    torch.testing.assert_close(native._batch["vals_P"].double().sort().values, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("least", [0.0, 1e-30, 0.3, 1e9])
def test_batchtopk_takes_the_same_pairs_whatever_the_guess(lib, least):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    _, native, u_ND = batch_topk(48, 900, 5, 130, loss_settings(), lib)
    native._pairs.guess.load([least, 0.1])
    expected_NF = select_batch(native.model.pre_acts(u_ND).detach(), 5 * 130)
    native.step(u_ND, lr=1e-3)
    found = native._batch
    chosen_NF = torch.zeros_like(expected_NF)
    chosen_NF[found["row_P"].long(), found["idx_P"].long()] = True
    assert torch.equal(chosen_NF, expected_NF)
    assert torch.equal(found["first_N1"].diff(), expected_NF.sum(1))


def test_equal_values_at_the_edge_of_a_batch_go_to_the_earlier_row_then_the_lower_latent(lib):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    model, native, u_ND = batch_topk(16, 300, 3, 70, loss_settings(), lib)
    with torch.no_grad():
        model.W_enc_FD.zero_()
        model.b_enc_F.fill_(0.5)
        model.b_enc_F[7] = 1.0
    native.step(u_ND, lr=1e-3)
    first_N1, idx_P = native._batch["first_N1"], native._batch["idx_P"]
    assert first_N1.diff().tolist() == [141] + 69 * [1]  # latent 7 on every row; the other 140 on the first
    assert idx_P[:141].tolist() == list(range(141))
    assert idx_P[141:].tolist() == 69 * [7]


def test_batchtopk_with_fewer_positive_activations_than_wanted_takes_them_all(lib):
    if not lib.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    for bias, positive in ((-1e3, 0), (0.0, None)):
        model, native, u_ND = batch_topk(8, 100, 8, 50, loss_settings(), lib)
        with torch.no_grad():
            model.b_enc_F.fill_(bias)
            if positive is None:
                model.b_enc_F[2:].fill_(-1e3)
                positive = int((model.pre_acts(u_ND) > 0).sum())
                assert 0 < positive < 100
        for _ in range(2):  # the second with the guess that the first left
            before = {name: getattr(model, name).detach().clone() for name in NAMES}
            result = native.step(u_ND, lr=0.0)
            assert int(result.fired_F.sum()) == positive
            assert torch.equal(before["W_enc_FD"], model.W_enc_FD.detach())


@pytest.mark.parametrize("where", ["row", "weight"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("how", ["int8", "float32", "bfloat16", "torch float32", "torch bfloat16"])
def test_batchtopk_hands_a_value_that_is_not_finite_to_the_loss(lib, monkeypatch, where, k, how):
    if how != "int8":
        monkeypatch.setattr("sae.native.stepper.finds_in_int8", lambda *_: False)
    settings = loss_settings(encoder_dtype=torch.bfloat16 if how.endswith("bfloat16") else torch.float32)
    model, native, u_ND = batch_topk(16, 300, k, 70, settings, lib)
    with torch.no_grad():
        (u_ND if where == "row" else model.W_enc_FD)[5, 3] = torch.nan
    loss = FastStep(model, settings)(u_ND).loss if how.startswith("torch") else native.step(u_ND, lr=1e-3).loss
    assert not loss.isfinite()


def batch_bits(lib, threads, *, stop=0):
    torch.set_num_threads(threads)
    settings = loss_settings()
    model, native, _ = batch_topk(40, 700, 8, 1, settings, lib)
    for number in range(4):
        if stop and number == stop:
            saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(native.state_dict())
            model, native, _ = batch_topk(40, 700, 8, 1, settings, lib, seed=9)
            model.load_state_dict(saved)
            native.load_state_dict(state)
            assert native._pairs.guess.least > 0
        native.step(batch(number, 333, 40), lr=1e-2)
    return b"".join(getattr(model, name).detach().numpy().tobytes() for name in (*NAMES, "theta"))


def test_batchtopk_repeats_to_the_bit_whatever_the_threads_and_from_a_saved_state(lib):
    if not lib.has_int8:
        pytest.skip("without 8-bit products torch's matrix product decides")
    once = batch_bits(lib, 2)
    assert once == batch_bits(lib, 1) == batch_bits(lib, 3) == batch_bits(lib, 2, stop=2)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_a_falling_k_gives_the_steps_of_the_torch_kernel(lib, variant):
    options = SAEOptions(k_start=12, k_anneal_share=0.6)
    models, steppers = [], []
    for kind in (NativeStepper, TorchStepper):
        config = TrainConfig(num_latents=900, k=4, variant=variant, options=options)
        model = VARIANTS[variant](
            d_in=24, num_latents=900, k=4, mean_D=np.zeros(24), scale=1.0, options=options,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        models.append(model)
        steppers.append(kind(model, loss_settings(), config, *((lib,) if kind is NativeStepper else ())))
    seen = []
    for step in range(10):
        for model, one in zip(models, steppers, strict=True):
            model.schedule_(step, 10)
            fired_F = one.step(batch(step, 100, 24), lr=1e-3).fired_F
            seen.append(int(fired_F.sum()) // 100)
    assert seen[::2] == seen[1::2]
    assert seen[0] == 12
    assert seen[-1] == 4
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert relative(mine.detach(), theirs.detach()) < 1e-5
