"""The latents' gradients by stripes of columns (`sae/native/sums.c`): the same bits as latent by latent."""

from __future__ import annotations

import pytest
import torch

from sae.native import stepper as module
from sae.native.library import native_library
from sae.native.stepper import NativeStepper
from sae.variants.batchtopk import BatchTopKSAE

from .test_model_and_kernels import NAMES, batch, loss_settings, make
from .test_native import config_of, dead_mask


@pytest.fixture
def lib():
    found = native_library()
    assert found is not None, "the tests need a C compiler, as the project does"
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


def by_stripes(native):
    return bool(native._step.sum_enc_FD)


def trained(lib, rows, *, d=64, kind=None, auxk_dtype=torch.float32, threads=1, stripes):
    """The weights after a step on each of `rows`, and which of them went by stripes."""
    torch.set_num_threads(threads)
    model = make(d=d, latents=700, k=8, **({"kind": kind} if kind else {}))
    native = NativeStepper(model, loss_settings(auxk_dtype=auxk_dtype), config_of(model), lib)
    used = []
    with pytest.MonkeyPatch.context() as patched:
        if not stripes:
            patched.setattr(module, "MOST_SUM_BYTES", 0)
        for number, count in enumerate(rows):
            native.step(batch(number, count, d), lr=1e-2, dead_F=dead_mask(700, 30) if number % 2 else None)
            used.append(by_stripes(native))
    return [getattr(model, name).detach().clone() for name in NAMES], used


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("auxk_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, BatchTopKSAE])
def test_stripes_change_no_bit(lib, kind, auxk_dtype, threads):
    rows = [333, 333, 40, 40]
    expected, used = trained(lib, rows, kind=kind, auxk_dtype=auxk_dtype, stripes=False)
    assert not any(used)
    found, used = trained(lib, rows, kind=kind, auxk_dtype=auxk_dtype, threads=threads, stripes=True)
    assert all(used)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_batches_too_large_for_them_go_latent_by_latent_and_back(lib):
    rows = [100, module.MOST_STRIPE_ROWS + 1, 100]
    expected, _ = trained(lib, rows, stripes=False)
    found, used = trained(lib, rows, stripes=True)
    assert used == [True, False, True]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(("d", "expected"), [(64, True), (65, False), (8, False), (32, True)])
def test_rows_of_whole_stripes_only(lib, d, expected):
    assert trained(lib, [50], d=d, stripes=True)[1] == [expected]
