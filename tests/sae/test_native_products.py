"""The 8-bit products of the compiled step, whichever run on this processor, and where its arrays lie."""

from __future__ import annotations

import copy
import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import large_pages, pages
from sae.devices import memory_failures_named
from sae.errors import OutOfMemoryError
from sae.native.library import AMX, Step

from .test_model_and_kernels import batch, loss_settings, make
from .test_native import bits, lib, stepper

__all__ = ["lib"]


@pytest.fixture(params=[12, AMX])
def product(request, lib, monkeypatch):
    """The library with this height of tiles."""
    if request.param not in lib.tiles:
        pytest.skip("this processor has no such product")
    monkeypatch.setattr(lib, "tile", request.param)
    return lib


def chosen(native, k):
    return native._batch["idx_P"].view(-1, k).long().sort(1).values


@pytest.mark.parametrize(
    ("d", "latents", "k", "rows"),
    [(1, 60, 1, 5), (63, 1000, 4, 31), (64, 1001, 4, 33), (65, 1537, 8, 700), (200, 3000, 16, 129), (256, 4097, 64, 1)],
)
def test_each_product_leads_to_the_largest_float64_pre_activations(product, d, latents, k, rows):
    for threads in (1, 2):  # blocks of four strips and of one
        torch.set_num_threads(threads)
        model, u_ND = make(d=d, latents=latents, k=k), batch(3, rows, d)
        native = stepper(model, loss_settings(), product)
        assert native._int8
        oracle = copy.deepcopy(model).double()
        native.step(u_ND, lr=1e-3)
        best_NK = oracle.pre_acts(u_ND.double()).topk(k).indices
        assert torch.equal(chosen(native, k), best_NK.sort(1).values)
        assert native.candidates_per_row >= k


def test_all_products_end_with_the_same_bits(lib, monkeypatch):
    if len(lib.tiles) < 2:
        pytest.skip("one product or none runs here")
    weights = set()
    for height in lib.tiles:
        monkeypatch.setattr(lib, "tile", height)
        weights |= {bits(lib, threads, dead=0) for threads in (1, 2, 3)}
    assert len(weights) == 1


def test_bounds_beyond_sixteen_bits_and_latents_of_very_unequal_norm_are_chosen_rightly(product):
    model, k = make(d=128, latents=2000, k=8), 8
    with torch.no_grad():
        model.W_enc_FD[5] *= 1e4  # all others share the first few of the 32,767 steps
        model.b_enc_F[17] = 1e6
        model.b_enc_F[18] = -1e6
    u_ND, oracle = batch(1, 300, 128), copy.deepcopy(model).double()
    native = stepper(model, loss_settings(), product)
    native.step(u_ND, lr=1e-3)
    pre_NF = oracle.pre_acts(u_ND.double())
    assert torch.equal(chosen(native, k), pre_NF.topk(k).indices.sort(1).values)
    assert bool((chosen(native, k) == 17).any(1).all())
    assert not bool((chosen(native, k) == 18).any())


def test_rows_of_few_different_values_are_no_exception(product):
    """Half of the dimensions +-1.49, the others +-1.51, beside one 126, and latents of signs in either half: without a
    dither the pre-activations of the first lose a third, those of the others gain one."""
    d, latents, k, rows = 512, 1024, 8, 200
    rng, model = np.random.default_rng(3), make(d=d, latents=latents, k=k)
    signs_FD = np.sign(rng.standard_normal((latents, d)))
    signs_FD[::2, : d // 2] = signs_FD[1::2, d // 2 :] = 0
    u_ND = np.zeros((rows, d))
    for first, few, level in ((1, 5, 1.49), (0, 9, 1.51)):  # each row is near a few latents of each half
        own = 2 * rng.integers(0, latents // 2, (rows, few)) + first
        u_ND += level * np.sign(signs_FD[own].sum(1))
    u_ND[np.arange(rows), rng.integers(0, d, rows)] = 126.0
    with torch.no_grad():
        model.W_enc_FD.copy_(torch.from_numpy(signs_FD))
        model.b_enc_F.copy_(1e-3 * torch.from_numpy(rng.standard_normal(latents)))  # no ties
        model.b_dec_D.zero_()
    u_ND = torch.from_numpy(u_ND.astype(np.float32))
    oracle, native = copy.deepcopy(model).double(), stepper(model, loss_settings(), product)
    native._balance_D.fill_(1.0)
    native.step(u_ND, lr=1e-3)
    assert torch.equal(chosen(native, k), oracle.pre_acts(u_ND.double()).topk(k).indices.sort(1).values)


def test_a_row_that_one_value_rounds_to_zero_needs_few_more_exact_values(product):
    d, latents, k, rows = 1024, 4096, 16, 60
    generator = torch.Generator().manual_seed(2)
    model, place = make(d=d, latents=latents, k=k), torch.arange(0, rows, 3)
    with torch.no_grad():
        model.b_dec_D.zero_()
        model.b_enc_F.zero_()
        model.W_enc_FD.copy_(torch.nn.functional.normalize(model.W_enc_FD, dim=1))
        model.W_enc_FD[:, 7] = 0.02 * torch.randn(latents, generator=generator)
        own_N = torch.randint(0, latents, (rows,), generator=generator)  # each row is a latent's direction
        u_ND = model.W_enc_FD[own_N] * d**0.5
        u_ND[:, 7] = 0
    u_ND[place, 7] = 600.0
    oracle, native = copy.deepcopy(model).double(), stepper(model, loss_settings(), product)
    native._balance_D.fill_(1.0)  # as measured on a batch that had no such row
    native.step(u_ND, lr=1e-3)
    assert torch.equal(chosen(native, k), oracle.pre_acts(u_ND.double()).topk(k).indices.sort(1).values)
    assert int(native._batch["candidates_N"][place].max()) < latents
    assert int(native._batch["candidates_N"][1]) < latents / 4


def test_a_row_that_is_not_finite_changes_no_other_rows_choice(product):
    model, u_ND = make(d=70, latents=1200, k=4), batch(2, 200, 70)
    natives = []
    for value in (0.0, torch.nan, torch.inf):
        changed_ND = u_ND.clone()
        changed_ND[77, 3] = value
        natives.append(stepper(copy.deepcopy(model), loss_settings(), product))
        natives[-1].step(changed_ND, lr=1e-3)
    rows = torch.arange(200) != 77
    for native in natives[1:]:
        assert torch.equal(chosen(native, 4)[rows], chosen(natives[0], 4)[rows])
        assert not native._batch["error_N"][77].isfinite()


def test_a_matrix_library_finds_the_tile_registers_as_it_left_them(lib, monkeypatch):
    if AMX not in lib.tiles:
        pytest.skip("this processor has no tile registers")
    monkeypatch.setattr(lib, "tile", AMX)
    torch.set_num_threads(2)
    left_ND, right_DF = torch.randn(300, 512).bfloat16(), torch.randn(512, 700).bfloat16()
    expected_NF = left_ND.float() @ right_DF.float()
    native = stepper(make(d=128, latents=2000, k=8), loss_settings(), lib)
    for number in range(5):
        product_NF = (left_ND @ right_DF).float()
        native.step(batch(number, 300, 128), lr=1e-3)
        assert float((product_NF - expected_NF).norm() / expected_NF.norm()) < 4e-3


# ---- where arrays lie ----


def test_large_arrays_are_asked_for_in_large_pages_and_are_zeros():
    array = pages.zeros(1024, 2048)
    assert array.shape == (1024, 2048)
    assert not array.any()
    array[3, 4] = 7  # of its own, not shared with a child
    assert float(array.sum()) == 7
    smaps = Path("/proc/self/smaps")
    if not hasattr(mmap, "MADV_HUGEPAGE") or not smaps.exists():
        pytest.skip("this system does not say so")
    place, flags = None, ""
    for line in smaps.read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            place = start <= array.data_ptr() < end
        elif place and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags


def test_a_parameter_moves_with_its_values_and_a_small_one_stays():
    large, small = (torch.nn.Parameter(torch.randn(rows, 2048)) for rows in (600, 3))
    before, at = large.detach().clone(), (large.data_ptr(), small.data_ptr())
    for parameter in (large, small):
        pages.move_(parameter)
    assert torch.equal(large.detach(), before)
    assert large.data_ptr() != at[0] or not hasattr(mmap, "MADV_HUGEPAGE")
    assert small.data_ptr() == at[1]
    assert large.requires_grad


@pytest.mark.parametrize("advice", [9999, None])
def test_a_kernel_without_large_pages_gives_ordinary_ones(monkeypatch, advice):
    monkeypatch.setattr(large_pages.mmap, "MADV_HUGEPAGE", advice, raising=False)
    array = pages.zeros(1024, 2048)
    assert not array.any()
    assert float(array.add_(1).sum()) == 1024 * 2048


def test_memory_that_cannot_be_had_is_out_of_memory():
    with pytest.raises(MemoryError, match="allocate"):
        pages.zeros(1 << 26, 1 << 20)
    with (
        pytest.raises(OutOfMemoryError, match="out of memory at the start"),
        memory_failures_named("at the start", "k"),
    ):
        pages.zeros(1 << 40, 1 << 20)


def test_the_structure_is_as_long_as_the_compiled_one(lib):
    assert ctypes.sizeof(Step) == lib.step_bytes
