from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.batch_select import Guess, batch_edge, edge_of, entries_from, largest, select_batch
from sae.errors import ConfigError
from sae.kernels import FastStep, has_fast_step
from sae.losses import dense_step
from sae.model import apply_update_
from sae.options import SAEOptions
from sae.runtime import decode, encode
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.variants import VARIANTS
from sae.variants.batchtopk import LEAST_WEIGHT

from .toy import Toy
from .variant_models import (
    LOSSES,
    D,
    F,
    K,
    N,
    V,
    arrays,
    batch,
    batch_topk,
    loss_settings,
    make,
    mask,
    pre_acts,
    relative,
    row_topk,
)

FAST = ("batchtopk", "groupmax")


# ---- each loss is the paper's, its gradient the slope ----


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_the_written_one_and_its_gradient_the_finite_difference(case):
    options, written = LOSSES[case]
    model, u_ND = make(case.split()[0], **options).double(), batch().double()
    result = dense_step(model, u_ND, loss_settings())
    p = arrays(model)
    assert float(result.loss) == pytest.approx(written(p, u_ND.numpy(), frozen=p), rel=1e-12)
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if name == "log_theta_F":
            continue  # its gradient is an estimate, below
        direction = rng.standard_normal(p[name].shape)
        slope = float((parameter.grad.numpy() * direction).sum())
        sides = [written(p | {name: p[name] + s * direction}, u_ND.numpy(), frozen=p) for s in (1e-8, -1e-8)]
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-8, rel=3e-5, abs=1e-5), name


def test_thresholds_of_jumprelu_get_the_papers_straight_through_estimate():
    model, u_ND = make("jumprelu").double(), batch().double()
    dense_step(model, u_ND, loss_settings())
    p, u, width = arrays(model), u_ND.numpy(), 0.5 * (V / D) ** 0.5
    theta_F, pre_NF = np.exp(p["log_theta_F"]), pre_acts(p, u)
    kernel_NF = (np.abs((pre_NF - theta_F) / width) < 0.5) / width
    grad_acts_NF = -2 / N * (u - (pre_NF * (pre_NF > theta_F)) @ p["W_dec_FD"] - p["b_dec_D"]) @ p["W_dec_FD"].T
    by_theta_F = (grad_acts_NF * -theta_F * kernel_NF).sum(0) - 0.01 * V / N * kernel_NF.sum(0)
    assert (kernel_NF > 0).sum() > 500
    np.testing.assert_allclose(model.log_theta_F.grad.numpy(), by_theta_F * theta_F, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "case", [case for case in LOSSES if case.split()[0] in ("topk", "batchtopk", "matryoshka", "groupmax")]
)
def test_auxk_is_gaos_and_reaches_the_encoder(case):
    options, written = LOSSES[case]
    model, u_ND, dead_F = make(case.split()[0], **options).double(), batch().double(), mask(30)
    result = dense_step(model, u_ND, loss_settings(), dead_F)
    p, dead = arrays(model), dead_F.numpy()
    with torch.no_grad():
        error_ND = (u_ND - model.reconstruct(model.acts(model.pre_acts(u_ND)), u_ND)).numpy()

    def auxk(p):
        pre_NF = pre_acts(p, u_ND.numpy())
        ranked_NF = np.where(dead, pre_NF * (1 if model.unit_rows else np.linalg.norm(p["W_dec_FD"], axis=1)), -np.inf)
        acts_NF = np.zeros_like(pre_NF)
        top_NA = np.argsort(-ranked_NF, axis=1)[:, :10]
        np.put_along_axis(acts_NF, top_NA, np.maximum(np.take_along_axis(pre_NF, top_NA, axis=1), 0), axis=1)
        return ((error_ND - acts_NF @ p["W_dec_FD"]) ** 2).sum() / ((error_ND - error_ND.mean(0)) ** 2).sum()

    def whole(p):
        return written(p, u_ND.numpy()) + V / 32 * auxk(p)

    assert float(result.auxk_loss) == pytest.approx(auxk(p), rel=1e-12)
    assert float(result.loss) == pytest.approx(whole(p), rel=1e-12)
    direction = np.random.default_rng(0).standard_normal((F, D)) * dead[:, None]
    slope = float((model.W_enc_FD.grad.numpy() * direction).sum())
    sides = [whole(p | {"W_enc_FD": p["W_enc_FD"] + s * direction}) for s in (1e-8, -1e-8)]
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-8, rel=3e-5)
    assert abs(slope) > 1e-3


# ---- fast against general ----


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dead", [0, 5, 30, 120])
def test_fast_gradients_equal_a_float64_autograd_over_all_latents(name, dead):
    model, u_ND, dead_F = make(name), batch(), mask(dead)
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, u_ND.double(), loss_settings(), dead_F)
    assert has_fast_step(model)
    result = FastStep(model, loss_settings())(u_ND, dead_F)
    for (parameter_name, mine), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert relative(mine.grad.double(), theirs.grad) < 1e-6, parameter_name
    for number in ("error", "auxk_loss", "loss"):
        assert float(getattr(result, number)) == pytest.approx(float(getattr(expected, number)), rel=1e-6)
    assert torch.equal(result.fired_F, expected.fired_F)
    if name == "batchtopk":
        assert float(result.fired_F.sum()) == K * N
        assert float(model.theta) == pytest.approx(float(oracle.theta), rel=1e-6)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_layer_norm_takes_the_fast_step_and_its_error_is_that_of_the_rows_themselves(name):
    model, dead_F = make(name, input_norm="layer", scale=1.0), mask(30)
    x_ND = batch() * torch.linspace(0.1, 20, N)[:, None] + 3
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, x_ND.double(), loss_settings(), dead_F)
    result = FastStep(model, loss_settings())(x_ND, dead_F)
    assert float(result.error) == pytest.approx(float(expected.error), rel=1e-5)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert relative(mine.grad.double(), theirs.grad) < 1e-5
    x = x_ND.double().numpy()
    mu, sigma, p = x.mean(1, keepdims=True), x.std(1, keepdims=True), arrays(oracle)
    n_ND = (x - mu) / (sigma + 1e-5)
    acts_NF = np.maximum(pre_acts(p, n_ND), 0)
    acts_NF *= (row_topk if name == "topk" else batch_topk)(acts_NF, K)
    error_ND = sigma * (n_ND - acts_NF @ p["W_dec_FD"] - p["b_dec_D"])
    assert float(expected.error) == pytest.approx((error_ND**2).sum(), rel=1e-10)


@pytest.mark.parametrize("name", FAST)
def test_bfloat16_only_chooses_and_the_values_are_float32(name):
    settings, u_ND, model = loss_settings(encoder_dtype=torch.bfloat16), batch(), make(name)
    oracle, exact = copy.deepcopy(model), copy.deepcopy(model)
    expected = dense_step(oracle, u_ND, settings)
    result = FastStep(model, settings)(u_ND)
    assert torch.equal(result.fired_F, expected.fired_F)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-6
    agree = 1 - int((result.fired_F - dense_step(exact, u_ND, loss_settings()).fired_F).abs().sum()) / (2 * K * N)
    assert agree > 0.99


@pytest.mark.parametrize("name", FAST)
def test_forty_fast_steps_end_at_the_weights_of_forty_general_ones(name):
    fast, general = make(name), make(name)
    step = FastStep(fast, loss_settings())
    fast_adam = torch.optim.Adam(fast.parameters(), lr=1e-3, fused=True)
    general_adam = torch.optim.Adam(general.parameters(), lr=1e-3)
    start_FD = fast.W_dec_FD.detach().clone()
    for number in range(40):
        step(batch(number), mask(30))
        apply_update_(fast, fast_adam)
        dense_step(general, batch(number), loss_settings(), mask(30))
        apply_update_(general, general_adam)
    assert relative(fast.W_dec_FD.detach(), start_FD) > 1e-2
    for mine, theirs in zip(fast.parameters(), general.parameters(), strict=True):
        assert relative(mine.detach(), theirs.detach()) < 2e-5
    if name == "batchtopk":
        assert float(fast.theta) == pytest.approx(float(general.theta), rel=1e-4)


def test_the_choice_over_a_batch_does_not_depend_on_the_guess():
    generator = torch.Generator().manual_seed(0)
    for pre_NF in (
        torch.randn(50, 512, generator=generator),
        torch.randint(-4, 5, (50, 512), generator=generator).float(),
    ):
        wanted_NF = torch.from_numpy(batch_topk(pre_NF.numpy(), 6))  # equal values: the earlier row, the lower latent
        assert int(wanted_NF.sum()) == 300
        assert torch.equal(select_batch(pre_NF, 300), wanted_NF)
        for least in (1e-30, 0.5, float(pre_NF[wanted_NF].min())):
            found = entries_from(pre_NF, least, 6)
            chosen_P = largest(found, batch_edge(found.value_P, 300), 512)
            chosen_NF = torch.zeros_like(wanted_NF)
            chosen_NF[found.row_P[chosen_P], found.latent_P[chosen_P]] = True
            assert torch.equal(chosen_NF, wanted_NF)
    few_NF = torch.where(pre_NF > 3, pre_NF, -1.0)
    assert int(select_batch(few_NF, 20_000).sum()) == int((few_NF > 0).sum()) < 20_000


def test_a_guess_that_is_too_high_is_lowered_until_all_that_matters_was_seen():
    pre_NF = torch.randn(50, 512, generator=torch.Generator().manual_seed(0))
    for least in (0.0, 3.0, 1e9):
        guess, passes = Guess(), 0
        guess.least = least
        if not least:
            guess.first(pre_NF[::5], 300 / pre_NF.numel())
        while True:
            seen_P, passes = entries_from(pre_NF, guess.least, 6).value_P, passes + 1
            if guess.good(len(seen_P), 300, edge_of(seen_P, 300)):
                break
        assert len(seen_P) >= 300
        assert passes < 8


def test_blocks_of_rows_do_not_change_batchtopk():
    torch.manual_seed(0)
    model = VARIANTS["batchtopk"](
        d_in=D, num_latents=4096, k=8, mean_D=np.zeros(D), scale=1.0, generator=torch.Generator().manual_seed(0)
    )
    oracle, u_ND = copy.deepcopy(model).double(), batch(rows=1100)
    step = FastStep(model, loss_settings())
    for _ in range(2):  # without and with the guess of a batch before
        step(u_ND)
    dense_step(oracle, u_ND.double(), loss_settings())
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert relative(mine.grad.double(), theirs.grad) < 1e-6


# ---- what changes while training ----


def test_theta_is_the_mean_of_the_smallest_activations_first_and_follows_them_later():
    model = make("batchtopk")
    smallest = np.random.default_rng(0).uniform(1, 2, 300)
    expected = 0.0
    for number, value in enumerate(smallest):
        model.observe_(torch.tensor([value + 1, value]))
        expected += max(1 / (number + 1), LEAST_WEIGHT) * (value - expected)
        if number == 19:
            assert float(model.theta) == pytest.approx(smallest[:20].mean(), rel=1e-5)
    assert float(model.theta) == pytest.approx(expected, rel=1e-5)


def test_k_falls_to_its_end_and_penalties_grow_to_theirs():
    model = make("topk", k_start=46, k_anneal_share=0.5)
    seen = []
    for step in range(100):
        model.schedule_(step, 100)
        seen.append(model.k)
    assert seen[0] == 46
    assert seen[25] == 26
    assert seen == sorted(seen, reverse=True)
    assert set(seen[50:]) == {K}
    model = make("relu", sparsity_warmup_share=0.1)
    weights = []
    for step in range(100):
        model.schedule_(step, 100)
        weights.append(model.sparsity_weight)
    np.testing.assert_allclose(weights[:11], [*(np.arange(1, 11) / 10), 1])


# ---- export ----


EXPORTS = [
    *[(name, {}) for name in VARIANTS],
    ("topk", {"decoder_rows": "free"}),
    ("batchtopk", {"decoder_rows": "free"}),
    ("relu", {"decoder_rows": "unit"}),
    ("topk", {"input_norm": "layer"}),
    ("jumprelu", {"input_norm": "layer"}),
]


@pytest.mark.parametrize(("name", "options"), EXPORTS)
def test_the_exported_weights_compute_what_the_model_does_in_evaluation_mode(name, options):
    model = make(name, **options, scale=1.0 if options.get("input_norm") else 4.0)
    if name in ("batchtopk", "matryoshka"):
        for number in range(3):
            dense_step(model, batch(number), loss_settings())
    x_ND = batch(7) * model.scale
    weights = model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h")
    with torch.no_grad():
        model.eval()
        expected_ND = model(x_ND).numpy()
        acts_NF = model.acts(model.pre_acts(model.prepare(x_ND / model.scale).input_ND))
    idx_NK, vals_NK = encode(weights, x_ND.numpy())
    found_ND = decode(weights, idx_NK, vals_NK, x_ND.numpy())
    assert np.linalg.norm(found_ND - expected_ND) < 1e-6 * np.linalg.norm(expected_ND)
    fires_NF = np.zeros((N, F), bool)
    np.put_along_axis(fires_NF, idx_NK, vals_NK > 0, axis=1)
    fires_NF[np.arange(N)[:, None].repeat(idx_NK.shape[1], 1)[vals_NK > 0], idx_NK[vals_NK > 0]] = True
    np.testing.assert_array_equal(fires_NF, (acts_NF > 0).numpy())
    assert fires_NF.any()
    np.testing.assert_allclose(np.linalg.norm(weights.W_dec_FD, axis=1), 1, rtol=1e-5)


def test_gates_below_and_above_zero_both_become_exact_thresholds():
    model = make("gated")
    weights = model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h")
    assert (weights.threshold_F == 0).any()
    assert (weights.threshold_F > 0).any()
    p, x_ND = arrays(model), batch().double().numpy() * model.scale
    u_ND = x_ND / model.scale
    gate_NF = pre_acts(p, u_ND)
    mag_NF = np.exp(p["r_F"]) * ((u_ND - p["b_dec_D"]) @ p["W_enc_FD"].T) + p["b_mag_F"]
    acts_NF = (gate_NF > 0) * np.maximum(mag_NF, 0)
    idx_NK, vals_NK = encode(weights, x_ND.astype(np.float32))
    found_NF = np.zeros((N, F))
    for row, (idx_K, vals_K) in enumerate(zip(idx_NK, vals_NK, strict=True)):
        found_NF[row, idx_K[vals_K > 0]] = vals_K[vals_K > 0]
    np.testing.assert_allclose(found_NF, acts_NF * model.scale, rtol=1e-4, atol=1e-4)


# ---- training ----

SMALL = TrainConfig(
    num_latents=96, k=4, batch_tokens=256, tokens=120 * 256, log_steps=1, lr=5e-3, warmup_steps=5, encoder_dtype="float32",
    checkpoint_steps=0, auxk_coef=1 / 32, dead_after_tokens=10 * 256,
)  # fmt: skip
TRAINED = [
    *[(name, {}) for name in VARIANTS if name != "topk"],
    ("topk", {"decoder_rows": "free", "k_start": 16, "multi_k": 16}),
    ("topk", {"input_norm": "layer", "b_dec_init": "geometric_median"}),
    ("topk", {"input_norm": "none", "b_dec_init": "zero"}),
]


@pytest.mark.parametrize(("name", "options"), TRAINED)
def test_a_short_training_ends_better_than_it_began_and_the_file_says_so(tmp_path, name, options):
    rows, toy = [], Toy(batch=256)
    config = replace(SMALL, variant=name, options=SAEOptions(**options))
    run = Trainer(config, toy, **toy.statistics(), folder=tmp_path, log=rows.append)
    weights = run.fit()
    assert rows[-1]["fvu"] < 0.85 * rows[0]["fvu"]
    x_ND = toy.rows(2000, 777)
    idx_NK, vals_NK = encode(weights, x_ND)
    error_ND = x_ND - decode(weights, idx_NK, vals_NK, x_ND)
    fvu = float((error_ND.astype(np.float64) ** 2).sum() / ((x_ND - x_ND.mean(0, dtype=np.float64)) ** 2).sum())
    assert fvu == pytest.approx(rows[-1]["fvu"], rel=0.2)
    l0 = float((vals_NK > 0).sum(1).mean())
    assert l0 == pytest.approx(rows[-1]["l0"], rel=0.15)
    assert weights.k == pytest.approx(l0, rel=0.2, abs=1)
    assert weights.training["config"]["variant"] == name


def test_a_checkpoint_of_another_variant_or_option_is_refused(tmp_path):
    config, toy = replace(SMALL, tokens=2 * 256), Toy(batch=256)
    Trainer(config, toy, **toy.statistics(), folder=tmp_path).fit()
    for changed, said in (
        (replace(config, variant="batchtopk"), "variant: 'topk' there, 'batchtopk' now"),
        (replace(config, options=SAEOptions(k_start=8)), "k_start: 0 there, 8 now"),
        (replace(config, optimizer="signum"), "optimizer: 'adam' there, 'signum' now"),
    ):
        with pytest.raises(ConfigError, match=said):
            Trainer(changed, Toy(batch=256), **toy.statistics(), folder=tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("batchtopk", "adam"), ("gated", "adam"), ("topk", "signum"), ("relu", "muon")]
)
def test_a_resumed_run_of_any_variant_and_optimizer_has_the_same_bits(tmp_path, name, optimizer):
    options = SAEOptions(b_dec_init="geometric_median", k_start=8 if name in ("batchtopk", "topk") else 0)
    config = replace(
        SMALL,
        variant=name,
        tokens=12 * 256,
        checkpoint_steps=5,
        keep_last=9,
        optimizer=optimizer,
        lr=1e-3,
        options=options,
    )
    toy = Toy(batch=256)
    whole = Trainer(config, toy, **toy.statistics(), folder=tmp_path).fit()
    for path in tmp_path.glob("step_*.pt"):
        if path.name != "step_00000005.pt":
            path.unlink()
    again = Trainer(config, Toy(batch=256), **toy.statistics(), folder=tmp_path).fit(resume=True)
    for field in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "threshold_F", "freq_F"):
        assert np.array_equal(getattr(whole, field), getattr(again, field)) or getattr(whole, field) is None, field


def test_settings_that_a_variant_would_ignore_are_refused():
    for config, said in (
        ({"variant": "jumprelu", "options": SAEOptions(k_start=8)}, "k_start is a setting of topk"),
        ({"variant": "gated", "options": SAEOptions(decoder_rows="free")}, "decoder_rows=free is a setting of topk"),
        ({"variant": "groupmax", "k": 5}, "divisible by k"),
        ({"variant": "matryoshka", "options": SAEOptions(prefixes=(8, 200))}, "up to num_latents = 96"),
        ({"variant": "vanilla"}, "known are topk, batchtopk"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(SMALL, **config)
    with pytest.raises(ConfigError, match="sizes that grow"):
        SAEOptions(prefixes=(8, 8))
    toy = Toy()
    with pytest.raises(ConfigError, match="trains by autograd, in float32"):
        Trainer(replace(SMALL, variant="relu", encoder_dtype="bfloat16"), toy, **toy.statistics(), folder="x")
