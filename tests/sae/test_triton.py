"""The Triton kernels in Triton's interpreter, and compiled for a GPU that need not be there.

triton is no part of the development environment (a gigabyte, unused on a CPU): `pip install triton` runs these tests.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # read when kernels are defined, triton's own among them
    pytest.importorskip("triton", reason="triton is not installed: pip install triton (1 GB) runs these tests")
    from sae.gpu import check, kernels
    from sae.gpu.check import trial, trouble
    from sae.gpu.kernels import AdamStep, Extra, latents_pass_, pairs_by_latent, rows_pass, sum_by_latent, topk
    from sae.gpu.stepper import TritonStepper

from sae.errors import ConfigError
from sae.losses import dense_step
from sae.model import apply_update_
from sae.options import SAEOptions
from sae.steppers import TorchStepper, pick_kernel
from sae.train_config import TrainConfig
from sae.trainer import Trainer

from .test_model_and_kernels import NAMES, batch, loss_settings, make, relative
from .toy import Toy

BF16 = torch.bfloat16
CPU = torch.device("cpu")
D, F, K, N = 13, 40, 5, 24  # D fills no block of columns, K none of rows


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.interpreted(), "triton was imported before this file; run it alone"


def chosen(rng, rows=N, latents=F, k=K):
    return torch.from_numpy(np.stack([rng.permutation(latents)[:k] for _ in range(rows)]).astype(np.int32))


def normal(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)


def wide(tensor):
    return tensor.double().numpy()


# ---- the kernels one by one, against numpy in float64 ----


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("latents", "k", "segment"), [(1, 1, 64), (7, 7, 64), (200, 6, 16384), (200, 6, 64), (257, 64, 64), (130, 40, 64)]
)
def test_top_k_takes_the_largest_and_of_equal_entries_the_lowest_indices(monkeypatch, latents, k, segment, dtype):
    monkeypatch.setattr(kernels, "SEGMENT", segment)
    rng = np.random.default_rng(latents)
    pre_NF = normal(rng, 6, latents, dtype=dtype)
    pre_NF[1] = 0
    pre_NF[2] = torch.from_numpy(rng.integers(-2, 3, latents)).to(dtype)
    pre_NF[3] = -pre_NF[3].abs()
    if latents > 100:
        pre_NF[4, 90], pre_NF[4, 3], pre_NF[4, 7] = torch.inf, -torch.inf, torch.nan
    idx_NK = topk(pre_NF, k).long()
    expected_NK = pre_NF.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(idx_NK.sort(1).values, expected_NK.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("d", "k"), [(D, K), (32, 16), (1, 1), (700, 3)])
def test_the_rows_are_those_of_the_equations_in_float64(d, k, dtype):
    rng = np.random.default_rng(d)
    u_ND, W_enc_FD, W_dec_FD = (normal(rng, n, d, dtype=dtype) for n in (N, F, F))
    b_dec_D, b_enc_F, idx_NK = normal(rng, d), normal(rng, F), chosen(rng, k=k)
    b_enc_F[:3] = -100.0
    found = rows_pass(u_ND, b_dec_D, W_enc_FD, b_enc_F, W_dec_FD, idx_NK)
    centred_ND, idx = wide(u_ND) - wide(b_dec_D), idx_NK.long().numpy()
    pre_NK = np.einsum("nd,nkd->nk", centred_ND, wide(W_enc_FD)[idx]) + wide(b_enc_F)[idx]
    vals_NK = np.maximum(pre_NK, 0)
    error_ND = np.einsum("nk,nkd->nd", vals_NK, wide(W_dec_FD)[idx]) - centred_ND
    grad_ND = 2 / N * error_ND
    grad_vals_NK = np.einsum("nd,nkd->nk", grad_ND, wide(W_dec_FD)[idx]) * (vals_NK > 0)
    assert 0 < (vals_NK == 0).mean() < 1
    expected = (centred_ND, grad_ND, vals_NK, grad_vals_NK, (error_ND**2).sum(1))
    for ours, theirs, name in zip(found, expected, found._fields, strict=True):
        assert np.linalg.norm(wide(ours) - theirs) <= 1e-6 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_pass_over_the_latents_is_projection_adam_and_unit_rows_in_float64(dtype, extra):
    rng = np.random.default_rng(3)
    idx_NK, grad_vals_NK = chosen(rng, latents=F - 4), normal(rng, N, K)  # the last four latents have no pair
    idx_NK[0, 0] = 0
    idx_NK[1:, 0] = torch.where((idx_NK[1:] == 7).any(1), idx_NK[1:, 0], 7)  # and one has more than a block
    vals_NK = normal(rng, N, K).relu()
    vals_NK[:, 0] += 0.5
    grad_vals_NK *= vals_NK > 0
    centred_ND, grad_ND = normal(rng, N, D, dtype=dtype), normal(rng, N, D, dtype=dtype)
    enc, dec = ([normal(rng, F, D), normal(rng, F, D), normal(rng, F, D).square()] for _ in range(2))
    dec[0] /= dec[0].norm(dim=1, keepdim=True)
    adam = AdamStep(beta1=0.9, beta2=0.999, eps=1e-3, step_size=0.02, root_correction=0.7)
    of_F = torch.full((F,), -1, dtype=torch.int32)
    of_F[torch.tensor([1, F - 1])] = torch.tensor([1, 0], dtype=torch.int32)
    more = Extra(of_F, normal(rng, 2, D), normal(rng, 2, D))

    def updated(parts, gradient_FD, *, unit):
        weight, m, v = (wide(part) for part in parts)
        if unit:
            gradient_FD = gradient_FD - (gradient_FD * weight).sum(1, keepdims=True) * weight
        m = 0.9 * m + 0.1 * gradient_FD
        v = 0.999 * v + 0.001 * gradient_FD**2
        weight = weight - 0.02 * m / (np.sqrt(v) / 0.7 + 1e-3)
        return (weight / np.linalg.norm(weight, axis=1, keepdims=True) if unit else weight), m, v

    sums = []
    for table_ND, weight_NK in ((centred_ND, grad_vals_NK), (grad_ND, vals_NK)):
        sum_FD = np.zeros((F, D))
        np.add.at(sum_FD, idx_NK.numpy(), wide(weight_NK)[..., None] * wide(table_ND)[:, None])
        sums.append(sum_FD)
    if extra:
        for sum_FD, part in zip(sums, more[1:], strict=True):
            sum_FD[1] += wide(part)[1]
            sum_FD[F - 1] += wide(part)[0]
    expected = (*updated(enc, sums[0], unit=False), *updated(dec, sums[1], unit=True))
    pairs = pairs_by_latent(F, idx_NK, vals_NK, grad_vals_NK)
    bias_F = np.zeros(F)
    np.add.at(bias_F, idx_NK.numpy(), wide(grad_vals_NK))
    np.testing.assert_allclose(wide(sum_by_latent(pairs)), bias_F, atol=1e-6)
    fired_F = np.bincount(idx_NK.numpy().ravel(), (vals_NK.numpy() > 0).ravel(), minlength=F)
    np.testing.assert_array_equal(pairs.start_F1.diff().numpy(), fired_F)
    assert fired_F.max() > 16
    assert (fired_F == 0).sum() >= 4
    latents_pass_(tuple(enc), tuple(dec), pairs, centred_ND, grad_ND, adam, more if extra else None)
    for ours, theirs in zip((*enc, *dec), expected, strict=True):
        assert np.linalg.norm(wide(ours) - theirs) <= 1e-6 * np.linalg.norm(theirs)


# ---- the step ----


def small(seed=0, **options):
    model = make(d=D, latents=F, k=K, seed=seed)
    return model, TrainConfig(num_latents=F, k=K, options=SAEOptions(**options))


def dead_mask(count):
    dead_F = torch.zeros(F, dtype=torch.bool)
    dead_F[torch.randperm(F, generator=torch.Generator().manual_seed(1))[:count]] = True
    return dead_F if count else None


@pytest.mark.parametrize("dead", [0, 2, 12])
def test_a_step_is_that_of_float64_autograd_and_adam(dead):
    model, config = small()
    u_ND, dead_F, settings = batch(rows=N, d=D), dead_mask(dead), loss_settings(auxk_k=6)
    oracle = copy.deepcopy(model).double()
    before = {name: getattr(oracle, name).detach().clone() for name in NAMES}
    expected = dense_step(oracle, u_ND.double(), settings, dead_F)
    apply_update_(oracle, torch.optim.Adam(oracle.parameters(), lr=1e-2, betas=config.betas, eps=config.eps))
    result = TritonStepper(model, settings, config).step(u_ND, lr=1e-2, dead_F=dead_F)
    for name in NAMES:
        moved = getattr(oracle, name).detach() - before[name]
        assert relative(getattr(model, name).detach().double() - before[name], moved) < 2e-5, name
    for number in ("error", "auxk_loss", "loss"):
        assert float(getattr(result, number)) == pytest.approx(float(getattr(expected, number)), rel=1e-6)
    assert torch.equal(result.fired_F, expected.fired_F)


def test_steps_with_a_falling_k_end_at_the_weights_of_the_torch_stepper():
    (one, config), (other, _) = small(k_start=9, k_anneal_share=0.9), small(k_start=9, k_anneal_share=0.9)
    for model in (one, other):
        model.options = config.options
    ours, theirs = TritonStepper(one, loss_settings(), config), TorchStepper(other, loss_settings(), config)
    seen = set()
    for number in range(4):
        for model in (one, other):
            model.schedule_(number, 4)
        seen.add(one.k)
        dead_F = dead_mask(3) if number == 2 else None
        found, expected = (s.step(batch(number, rows=N, d=D), lr=1e-3, dead_F=dead_F) for s in (ours, theirs))
        assert torch.equal(found.fired_F, expected.fired_F)
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert len(seen) > 2
    for name in NAMES:
        assert relative(getattr(one, name).detach(), getattr(other, name).detach()) < 2e-6, name


def test_where_bfloat16_chooses_the_step_is_the_torch_steppers_but_for_ties():
    (one, config), (other, _) = small(), small()
    settings = loss_settings(encoder_dtype=BF16)
    u_ND = batch(rows=4 * N, d=D)
    centred_ND = (u_ND - one.b_dec_D.detach()).bfloat16()
    pre_NF = torch.addmm(one.b_enc_F.detach().bfloat16(), centred_ND, one.W_enc_FD.detach().bfloat16().t())
    top = pre_NF.topk(K + 1).values
    u_ND = u_ND[(top[:, K - 1] > top[:, K]).nonzero().flatten()[:N]]
    assert len(u_ND) == N
    found, expected = (
        kind(m, settings, config).step(u_ND, lr=1e-3) for kind, m in ((TritonStepper, one), (TorchStepper, other))
    )
    assert torch.equal(found.fired_F, expected.fired_F)
    assert float(found.error) == pytest.approx(float(expected.error), rel=1e-6)
    for name in NAMES:
        assert relative(getattr(one, name).detach(), getattr(other, name).detach()) < 1e-6, name


def test_training_ends_where_the_torch_kernel_ends_and_resumes_to_the_same_bits(tmp_path):
    def trainer(folder, kernel="triton", **extra):
        toy, settings = Toy(batch=16), replace(config, kernel=kernel)
        return Trainer(settings, toy, **toy.statistics(), folder=tmp_path / folder, **extra)

    def stop(tokens):
        if tokens == 48:
            raise InterruptedError

    config = TrainConfig(
        num_latents=F, k=4, batch_tokens=16, tokens=64, encoder_dtype="float32", device="cpu", log_steps=1,
        checkpoint_steps=2, dead_after_tokens=16, warmup_steps=0, prefetch_batches=0,
    )  # fmt: skip
    rows = []
    whole = trainer("whole", log=rows.append).fit()
    theirs = trainer("torch", kernel="torch").fit()
    for name in NAMES:
        ours, expected = getattr(whole, name), getattr(theirs, name)
        assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected), name
    assert max(row["auxk_loss"] for row in rows) > 0
    with pytest.raises(InterruptedError):
        trainer("part", progress=stop).fit()
    with pytest.raises(ConfigError, match="stepper: 'triton' there, 'torch' now"):
        trainer("part", kernel="torch").fit(resume=True)
    again = trainer("part").fit(resume=True)
    assert all(np.array_equal(getattr(again, name), getattr(whole, name)) for name in NAMES)


# ---- whether they are taken ----


def test_the_trial_before_they_are_taken_passes_and_names_what_differs(monkeypatch):
    monkeypatch.setattr(check, "ROWS", 8)
    assert trial(D, F, K, CPU) == ""
    right = kernels.topk
    monkeypatch.setattr(kernels, "topk", lambda pre_NF, k: right(-pre_NF, k))
    assert trial(D, F, K, CPU) == "top-k of torch.float32 differs from torch's"

    def fails(pre_NF, k):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\n(more)")

    monkeypatch.setattr(kernels, "topk", fails)
    assert trial(D, F, K, CPU) == "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"


def test_triton_is_taken_in_the_interpreter_when_asked_for_and_refused_for_other_models(monkeypatch):
    model, config = small()
    asked = replace(config, kernel="triton")
    assert pick_kernel(model, asked, CPU) == "triton"
    assert pick_kernel(model, config, CPU) != "triton"
    with pytest.raises(ConfigError, match="kernel=triton is for variant topk"):
        pick_kernel(model, replace(asked, optimizer="signum"), CPU)
    trouble.cache_clear()
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match="cannot be had: on a CPU they need Triton's interpreter"):
        pick_kernel(model, asked, CPU)
    trouble.cache_clear()


def test_every_kernel_compiles_to_machine_code_for_an_h100():
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row_by_row, by_latent = ["_values_kernel", "_rows_kernel"], ["_latents_kernel", "_sum_by_latent_kernel"]
    assert done.stdout.split() == ["_topk_kernel"] * 2 + row_by_row + by_latent


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae.gpu import kernels

def compiled(kernel, pointers, scalars, **constants):
    names = kernel.arg_names
    types = dict(zip((n for n in names if n not in constants), [*pointers, *scalars], strict=True))
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print(kernel.fn.__name__)

F, I = "*fp32", "*i32"
for pointer, bits in (("*bf16", 16), (F, 32)):
    compiled(kernels._topk_kernel, [pointer, I], ["i32"] * 4, SIZE=4096, BITS=bits)
columns, rows = kernels._blocks(2048)
compiled(kernels._values_kernel, [F] * 3 + [I, F], ["i32"] * 2, BLOCK_C=rows, BLOCK_D=columns)
compiled(kernels._rows_kernel, [F] * 5 + [I] + [F] * 5, ["i32", "i32", "fp32"], BLOCK_K=rows, BLOCK_D=columns)
columns, rows = kernels._blocks(2048, tables=2)
pointers = [I] * 3 + [F] * 4 + [I] + [F] * 8
scalars = ["i32"] + ["fp32"] * 5
compiled(kernels._latents_kernel, pointers, scalars, HAS_EXTRA=True, BLOCK_P=rows, BLOCK_D=columns)
compiled(kernels._sum_by_latent_kernel, [I, F, F], [], BLOCK=kernels.PAIRS)
"""
