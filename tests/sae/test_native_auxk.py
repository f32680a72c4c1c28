"""AuxK of the compiled step in 8 bits (`sae/native/auxk.c`)."""

from __future__ import annotations

import copy

import pytest
import torch

from sae.kernels import auxk_gradients
from sae.native import stepper as module
from sae.native.library import AMX, native_library
from sae.native.stepper import NativeStepper
from sae.train_config import TrainConfig
from sae.variants.batchtopk import BatchTopKSAE

from .test_model_and_kernels import NAMES, batch, loss_settings, make, relative
from .test_native import bits, config_of, dead_mask

BF16 = torch.bfloat16


@pytest.fixture
def lib(monkeypatch):
    found = native_library()
    assert found is not None, "the tests need a C compiler, as the project does"
    if not found.has_int8:
        pytest.skip("this processor has no 8-bit dot products")
    if found.tile == AMX:  # there it is not used
        monkeypatch.setattr(found, "tile", 12)
    return found


def stepper(model, lib, auxk_k=20, dtype=BF16):
    return NativeStepper(model, loss_settings(auxk_k=auxk_k, auxk_dtype=dtype), config_of(model), lib)


def in_int8(native):
    return native._step.auxk_memory is not None


def gradients(native):
    """What AuxK alone adds to the gradients of the dead latents."""
    return [native._dead[name][: native._step.M].double() for name in ("extra_enc_MD", "extra_dec_MD", "extra_bias_M")]


def exact_gradients(model, u_ND, dead_F, *, over_batch=False):
    """The same in float64, and L_aux."""
    oracle = copy.deepcopy(model).double().requires_grad_(False)
    pre_NF = oracle.pre_acts(u_ND.double()).relu()
    edge = pre_NF.flatten().topk(len(u_ND) * model.k).values[-1] if over_batch else pre_NF.topk(model.k).values[:, -1:]
    centred_ND = u_ND.double() - oracle.b_dec_D
    error_ND = (pre_NF * (pre_NF >= edge)) @ oracle.W_dec_FD - centred_ND
    found = auxk_gradients(oracle, loss_settings(auxk_k=20), centred_ND, error_ND, dead_F)
    return [found.W_enc_MD, found.W_dec_MD, found.b_enc_M], float(found.loss)


def large_rows(number, rows, d):
    """Some columns and rows are much larger than the others."""
    u_ND = batch(number, rows, d)
    u_ND[:, ::9] *= 30
    u_ND[::16] *= 10
    return u_ND


@pytest.mark.parametrize(("data", "most", "off"), [(batch, 0.06, 0.01), (large_rows, 0.12, 0.03)])  # few rows weigh all
@pytest.mark.parametrize(
    # auxk_k 20: up to 80 dead latents; most rows have more than 20 above zero of 70, none of the others
    ("d", "latents", "k", "rows", "dead"),
    [(24, 400, 6, 160, 1), (24, 400, 6, 160, 13), (33, 1501, 5, 1300, 70), (96, 2000, 16, 96, 24), (130, 2000, 16, 47, 80)],
)  # fmt: skip
def test_gradients_of_dead_latents_are_exact_but_for_rounding_and_right_on_average(
    lib, d, latents, k, rows, dead, data, most, off
):
    model, u_ND, dead_F = make(d=d, latents=latents, k=k), data(1, rows, d), dead_mask(latents, dead)
    expected, auxk_loss = exact_gradients(model, u_ND, dead_F)
    native = stepper(model, lib)
    result = native.step(u_ND, lr=1e-3, dead_F=dead_F)
    assert in_int8(native)
    assert float(result.auxk_loss) == pytest.approx(auxk_loss, rel=3e-3)
    for found, exact in zip(gradients(native), expected, strict=True):
        assert 1e-4 < relative(found, exact) < most  # above: the 8 bits were really used
        assert float((found * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=off)


def test_batchtopk_has_the_same_gradients_of_dead_latents(lib):
    model, u_ND, dead_F = make(latents=400, kind=BatchTopKSAE), batch(), dead_mask(400, 13)
    expected, _ = exact_gradients(model, u_ND, dead_F, over_batch=True)
    native = stepper(model, lib)
    native.step(u_ND, lr=1e-3, dead_F=dead_F)
    assert in_int8(native)
    for found, exact in zip(gradients(native), expected, strict=True):
        assert relative(found, exact) < 0.05


def test_the_bits_do_not_depend_on_the_number_of_threads(lib):
    once = bits(lib, 1, auxk_dtype=BF16)
    assert once == bits(lib, 2, auxk_dtype=BF16) == bits(lib, 3, auxk_dtype=BF16)
    assert once == bits(lib, 2, stop=2, auxk_dtype=BF16)
    assert once != bits(lib, 2, auxk_dtype=torch.float32)


def test_a_step_does_not_depend_on_what_was_dead_before(lib):
    """Memory grows and is used again; nothing of an earlier batch is left in it."""
    model = make(d=40, latents=700, k=8)
    native = stepper(model, lib)
    for number, (rows, dead) in enumerate(
        [(160, 5), (333, 60), (47, 11), (160, 0), (160, 75), (33, 12), (900, 75), (33, 75)]
    ):
        alone = stepper(copy.deepcopy(model), lib)
        alone.load_state_dict(copy.deepcopy(native.state_dict()))
        u_ND, dead_F = batch(number, rows, 40), dead_mask(700, dead)
        losses = [side.step(u_ND, lr=1e-2, dead_F=dead_F).loss for side in (native, alone)]
        assert in_int8(native) == in_int8(alone) == bool(dead)
        assert not dead or len(native._auxk_memory) >= lib.auxk_bytes(native._step)
        assert torch.equal(*losses)
        for name in NAMES:
            assert torch.equal(getattr(model, name), getattr(alone.model, name)), (number, name)


def test_more_than_all_dead_latents_is_all_of_them(lib):
    found = []
    for auxk_k in (13, 40_000):  # the latter beyond 16 bits
        native = stepper(make(latents=400), lib, auxk_k=auxk_k)
        native.step(batch(), lr=1e-3, dead_F=dead_mask(400, 13))
        found.append(gradients(native))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["many dead", "beyond 16 bits", "float32", "many rows", "no 8-bit products", "AMX"])
def test_what_does_not_fit_goes_through_torchs_products(lib, case, monkeypatch):
    if case == "many rows":
        monkeypatch.setattr(module, "MOST_ROWS", 159)
    if case == "beyond 16 bits":
        monkeypatch.setattr(module, "MOST_DEAD", 12)
    if case == "no 8-bit products":
        monkeypatch.setattr(module, "finds_in_int8", lambda *_: False)
    if case == "AMX":
        monkeypatch.setattr(module, "AMX", lib.tile)
    model, u_ND = make(latents=400), batch()
    dead_F = dead_mask(400, 81 if case == "many dead" else 13)
    auxk_loss = exact_gradients(model, u_ND, dead_F)[1]
    native = stepper(model, lib, dtype=torch.float32 if case == "float32" else BF16)
    result = native.step(u_ND, lr=1e-3, dead_F=dead_F)
    assert not in_int8(native)
    assert float(result.auxk_loss) == pytest.approx(auxk_loss, rel=1e-5 if case == "float32" else 1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_loss(lib, value):
    u_ND = batch()
    u_ND[5, 3] = value
    result = stepper(make(latents=400), lib).step(u_ND, lr=1e-3, dead_F=dead_mask(400, 13))
    assert not result.loss.isfinite()
    assert not result.auxk_loss.isfinite()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_errors_that_are_all_alike_leave_a_finite_loss(lib, dtype):
    model, u_ND = make(latents=400), 1e-5 * batch()  # b_dec_D is large beside them
    result = stepper(model, lib, dtype=dtype).step(u_ND, lr=1e-3, dead_F=dead_mask(400, 13))
    assert 1 < float(result.auxk_loss) <= 2e6


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_no_error_at_all_is_a_loss_of_zero(lib, dtype):
    model = make(latents=400)
    with torch.no_grad():
        model.b_enc_F -= 1e3  # nothing fires, and nothing is left to explain
    u_ND = model.b_dec_D.detach().expand(160, -1)
    result = stepper(model, lib, dtype=dtype).step(u_ND, lr=1e-3, dead_F=dead_mask(400, 13))
    assert (float(result.auxk_loss), float(result.loss)) == (0, 0)


def test_of_equal_dead_latents_the_first_are_taken(lib):
    model, u_ND, dead_F = make(latents=400), batch(), dead_mask(400, 30)
    with torch.no_grad():
        for name in ("W_enc_FD", "b_enc_F"):
            getattr(model, name)[dead_F] = getattr(model, name)[dead_F][0].clone()
    native = stepper(model, lib, auxk_k=20)
    native.step(u_ND, lr=1e-3, dead_F=dead_F)
    assert in_int8(native)
    for found in gradients(native):
        assert found[:20].view(20, -1).any(1).all()
        assert not found[20:].any()


def test_dead_latents_below_zero_on_every_row_get_no_gradient(lib):
    model, dead_F = make(latents=400), dead_mask(400, 13)
    with torch.no_grad():
        model.b_enc_F[dead_F] -= 1e3
    native = stepper(model, lib)
    native.step(batch(), lr=1e-3, dead_F=dead_F)
    assert in_int8(native)
    assert not any(found.any() for found in gradients(native))


def test_a_run_goes_as_with_exact_gradients(lib):
    """Forty steps end at nearly the same loss, and the dead latents have moved the same way."""
    ends, moved = [], []
    dead_F = dead_mask(400, 13)
    for dtype in (torch.float32, BF16):
        model = make(latents=400)
        before_MD = model.W_enc_FD.detach()[dead_F].clone()
        native = NativeStepper(
            model, loss_settings(auxk_k=20, auxk_dtype=dtype), TrainConfig(num_latents=400, k=model.k), lib
        )
        for number in range(40):
            result = native.step(batch(number), lr=1e-3, dead_F=dead_F)
        ends.append(float(result.loss))
        moved.append(model.W_enc_FD.detach()[dead_F] - before_MD)
    assert ends[1] == pytest.approx(ends[0], rel=2e-3)
    assert relative(moved[1], moved[0]) < 0.1
