"""What surrounds the variants: optimizers, the geometric median, thresholds for a top-k SAE, fine-tuning."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.batches import Peeked
from sae.centre import geometric_median
from sae.errors import ConfigError, ShapeError
from sae.losses import dense_step
from sae.optimizers import Muon, ScheduleFreeSignum, orthogonal_factor
from sae.options import SAEOptions
from sae.runtime import decode, encode
from sae.thresholds import to_thresholds
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.variants import VARIANTS
from sae.variants.start import load_start_

from .toy import D as TOY_D
from .toy import Toy, random_weights
from .variant_models import D, F, K, V, arrays, batch, loss_settings, make

CONFIG = TrainConfig(num_latents=F, k=K, lr=1e-2, momentum=0.9)


# ---- optimizers ----


def test_schedule_free_signum_follows_its_three_sequences():
    model = make("topk").double()
    optimizer = ScheduleFreeSignum(model, CONFIG)
    x, z = arrays(model), arrays(model)
    weights = largest = 0.0
    for number, lr in enumerate((0.005, 0.01, 0.01, 0.002)):
        dense_step(model, batch(number).double(), loss_settings())
        y, grads = arrays(model), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        rows = y["W_dec_FD"]
        grads["W_dec_FD"] -= (grads["W_dec_FD"] * rows).sum(1, keepdims=True) * rows
        largest = max(largest, lr)
        weights += largest**2
        for name in x:
            z[name] = z[name] - lr * np.sign(grads[name])
            x[name] = x[name] + largest**2 / weights * (z[name] - x[name])
        y = {name: 0.1 * z[name] + 0.9 * x[name] for name in x}
        norm_F1 = np.linalg.norm(y["W_dec_FD"], axis=1, keepdims=True)
        for part in (x, z, y):
            part["W_dec_FD"] = part["W_dec_FD"] / norm_F1
        optimizer.update_(lr)
        for name, mine in arrays(model).items():
            np.testing.assert_allclose(mine, y[name], rtol=1e-9, atol=1e-12, err_msg=name)
    trained = arrays(model)
    with optimizer.evaluation():
        np.testing.assert_allclose(model.W_enc_FD.detach().numpy(), x["W_enc_FD"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.W_dec_FD.detach().norm(dim=1).numpy(), 1)
    assert all(np.array_equal(trained[name], mine) for name, mine in arrays(model).items())


def test_the_orthogonal_factor_is_that_of_the_svd_up_to_its_five_rounds_and_torchs_own():
    rng = np.random.default_rng(0)
    for shape in ((30, 8), (8, 30)):
        matrix = torch.from_numpy(rng.standard_normal(shape) @ np.diag(np.geomspace(1, 9, shape[1])))
        found = orthogonal_factor(matrix).numpy()
        left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
        rotated = left.T @ found @ right.T  # a diagonal near 1
        np.testing.assert_allclose(rotated - np.diag(np.diag(rotated)), 0, atol=1e-12)
        assert 0.65 < np.diag(rotated).min() <= np.diag(rotated).max() < 1.25
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = matrix.float()
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        theirs = -parameter.detach().double().numpy() / (0.2 * 30**0.5)
        assert np.linalg.norm(theirs - found) < 0.05 * np.linalg.norm(found)  # theirs is in bfloat16


def test_muon_moves_matrices_along_the_orthogonal_factor_of_their_gradient():
    model = make("topk", decoder_rows="free")
    optimizer = Muon(model, CONFIG)
    dense_step(model, batch(), loss_settings())
    before, grad = arrays(model), model.W_enc_FD.grad.double().numpy().copy()
    optimizer.update_(1e-2)
    moved = (arrays(model)["W_enc_FD"] - before["W_enc_FD"]) / -1e-2
    left, _, right = np.linalg.svd(grad, full_matrices=False)
    # five Newton-Schulz rounds bring singular values near 1, not to it; the length is that of an Adam step
    direction = (left @ right) * 0.2 * max(F, D) ** 0.5
    assert (moved * direction).sum() / np.linalg.norm(moved) / np.linalg.norm(direction) > 0.95
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(direction), rel=0.3)
    bias = arrays(model)["b_dec_D"] - before["b_dec_D"]
    np.testing.assert_allclose(np.abs(bias), 1e-2, rtol=1e-3)  # Adam's first step


# ---- the start ----


def test_the_geometric_median_has_balanced_directions_and_ignores_far_rows():
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((500, 6)) * np.geomspace(0.1, 3, 6)
    centre_D = geometric_median(x_ND, tolerance=1e-12, most_rounds=2000)
    to_rows_ND = x_ND - centre_D
    pull_D = (to_rows_ND / np.linalg.norm(to_rows_ND, axis=1, keepdims=True)).sum(0)
    assert np.linalg.norm(pull_D) < 1e-6 * len(x_ND)  # the gradient of the sum of distances
    far_ND = np.concatenate([x_ND, np.full((10, 6), 1e4)])
    assert np.linalg.norm(geometric_median(far_ND) - centre_D) < 0.2
    assert np.linalg.norm(far_ND.mean(0) - x_ND.mean(0)) > 100
    assert np.array_equal(geometric_median(np.ones((4, 3))), np.ones(3))
    with pytest.raises(ShapeError, match="needs rows"):
        geometric_median(np.zeros((0, 3)))


@pytest.mark.parametrize("init", ["mean", "geometric_median", "zero"])
def test_the_decoder_bias_starts_where_the_setting_says(tmp_path, init):
    toy = Toy(batch=256)
    config = TrainConfig(num_latents=64, k=4, batch_tokens=256, options=SAEOptions(b_dec_init=init))
    run = Trainer(config, toy, **toy.statistics(), folder=tmp_path)
    expected = {
        "mean": toy.statistics()["mean_D"],
        "geometric_median": geometric_median(Toy().rows(256, 0, 1)),
        "zero": np.zeros(TOY_D),
    }[init]
    np.testing.assert_allclose(run.weights().b_dec_D, expected, rtol=1e-5, atol=1e-6)


def test_a_peeked_source_gives_the_same_batches_and_states():
    plain, peeked = Toy(), Peeked(Toy())
    assert peeked.state() == plain.state()
    assert np.array_equal(peeked.first, Toy().next())
    for _ in range(3):
        assert np.array_equal(peeked.next(), plain.next())
        assert peeked.state() == plain.state()
    peeked = Peeked(Toy())
    peeked.load_state({"served": 2})
    assert np.array_equal(peeked.next(), plain.rows(512, 0, 3))


# ---- thresholds for a top-k SAE ----


def active(w, x_ND):
    idx_NK, vals_NK = encode(w, x_ND)
    fires_NF = np.zeros((len(x_ND), w.num_latents), bool)
    row_P, slot_P = np.nonzero(vals_NK > 0)
    fires_NF[row_P, idx_NK[row_P, slot_P]] = True
    return fires_NF


@pytest.mark.parametrize("variant", ["topk", "groupmax"])
def test_thresholds_keep_the_mean_l0_or_every_latents_rate(variant):
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=12, latents=60, k=5, variant=variant)
    x_ND = rng.standard_normal((400, 12)).astype(np.float32)
    chosen_NF = active(w, x_ND)
    one = to_thresholds(w, x_ND, "global")
    assert len(set(one.threshold_F.tolist())) == 1
    assert active(one, x_ND).sum() == chosen_NF.sum()
    each = to_thresholds(w, x_ND, "latent")
    np.testing.assert_array_equal(active(each, x_ND).sum(0), chosen_NF.sum(0))
    assert len(set(each.threshold_F.tolist())) > 30
    pre_NF = (x_ND - w.b_dec_D) @ w.W_enc_FD.T + w.b_enc_F
    np.testing.assert_array_equal(active(each, x_ND), pre_NF > each.threshold_F)


@pytest.mark.parametrize("mode", ["global", "latent"])
def test_thresholds_make_another_sae_that_says_of_which_it_was_made(mode):
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=12, latents=60, k=5, training={"id": "0123456789abcdef", "tokens": 7}, freq_F=np.ones(60))
    x_ND = rng.standard_normal((400, 12)).astype(np.float32)
    found = to_thresholds(w, x_ND, mode)
    above_NF = pre_acts_of(w, x_ND) > found.threshold_F * (
        1 + 1e-5
    )  # of a latent never chosen theta is its largest one
    np.testing.assert_allclose(found.freq_F, above_NF.mean(axis=0), rtol=1e-6)
    assert found.training["thresholds"] == {"mode": mode, "rows": 400, "of": "0123456789abcdef"}
    assert found.training["tokens"] == 7
    digest = hashlib.sha256(b"0123456789abcdef" + found.threshold_F.astype("<f4").tobytes()).hexdigest()
    assert found.training["id"] == digest[:16]
    assert (found.trained_id, w.trained_id) == ("0123456789abcdef", "0123456789abcdef")
    again = to_thresholds(found, x_ND, mode) if mode == "global" else found
    assert again.trained_id == w.trained_id
    unnamed = to_thresholds(replace(w, training={}), x_ND, mode)
    assert unnamed.training == {"thresholds": {"mode": mode, "rows": 400}}
    assert unnamed.trained_id == ""


def pre_acts_of(w, x_ND):
    """(N, F) in float64."""
    return (x_ND.astype(np.float64) - w.b_dec_D) @ w.W_enc_FD.T.astype(np.float64) + w.b_enc_F


@pytest.mark.parametrize(
    ("name", "options"), [("batchtopk", {}), ("batchtopk", {"decoder_rows": "free"}), ("matryoshka", {})]
)
def test_thresholds_of_a_trained_batchtopk_keep_its_choice_over_all_rows(name, options):
    model, x_ND = make(name, **options), (batch(3, rows=500) * 4).numpy()
    for number in range(8):  # theta is a running mean, of batches of other rows
        dense_step(model, batch(number), loss_settings())
    w = exported(model)
    assert w.variant == "threshold"
    pre_NF = pre_acts_of(w, x_ND)
    edge = np.sort(pre_NF, axis=None)[-K * len(x_ND)]
    chosen_NF = pre_NF >= edge  # the K N largest of these rows
    assert active(w, x_ND).sum() != chosen_NF.sum() == K * len(x_ND)
    one = to_thresholds(w, x_ND, "global")
    assert len(set(one.threshold_F.tolist())) == 1
    assert one.threshold_F[0] < edge < one.threshold_F[0] * (1 + 1e-3)
    np.testing.assert_array_equal(active(one, x_ND), chosen_NF)
    each = to_thresholds(w, x_ND, "latent")
    np.testing.assert_array_equal(active(each, x_ND), chosen_NF)
    silent_F = ~chosen_NF.any(axis=0) & (pre_NF > 0).any(axis=0)
    np.testing.assert_allclose(each.threshold_F[silent_F], pre_NF.max(axis=0)[silent_F], rtol=1e-4)
    for latent in np.flatnonzero(chosen_NF.any(axis=0)):  # between its last row that is kept and the next
        own = np.sort(pre_NF[:, latent])[::-1]
        kept = int(chosen_NF[:, latent].sum())
        expected = (own[kept - 1] + max(own[kept], 0)) / 2
        assert each.threshold_F[latent] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_one_threshold_is_fitted_again_and_can_become_one_for_each_latent():
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=12, latents=60, k=5)
    x_ND = rng.standard_normal((400, 12)).astype(np.float32)
    one = to_thresholds(w, x_ND, "global")
    off = replace(one, threshold_F=3 * one.threshold_F)
    assert active(off, x_ND).sum() < 0.5 * active(one, x_ND).sum()
    np.testing.assert_array_equal(to_thresholds(off, x_ND).threshold_F, one.threshold_F)
    each = to_thresholds(off, x_ND, "latent")
    np.testing.assert_array_equal(active(each, x_ND), active(one, x_ND))


def test_a_relu_sae_has_one_threshold_of_zero_and_gets_those_of_its_k():
    w = random_weights(np.random.default_rng(0), d=12, latents=60, k=5, variant="threshold", threshold_F=np.zeros(60))
    x_ND = np.random.default_rng(1).standard_normal((400, 12)).astype(np.float32)
    edge = np.sort(pre_acts_of(w, x_ND), axis=None)[-5 * len(x_ND)]
    for mode in ("global", "latent"):
        np.testing.assert_array_equal(active(to_thresholds(w, x_ND, mode), x_ND), pre_acts_of(w, x_ND) >= edge)


def test_fewer_positive_activations_than_k_all_fire():
    w = random_weights(np.random.default_rng(0), d=12, latents=60, k=50, variant="threshold", threshold_F=np.ones(60))
    x_ND = np.random.default_rng(1).standard_normal((100, 12)).astype(np.float32)
    positive_NF = pre_acts_of(w, x_ND) > 0
    assert positive_NF.sum() < 50 * len(x_ND)
    for mode in ("global", "latent"):
        np.testing.assert_array_equal(active(to_thresholds(w, x_ND, mode), x_ND), positive_NF)


def test_thresholds_refuse_what_they_cannot_do():
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=12, latents=60, k=5)
    x_ND = rng.standard_normal((400, 12)).astype(np.float32)
    with pytest.raises(ConfigError, match="global, latent"):
        to_thresholds(w, x_ND, "row")
    with pytest.raises(ShapeError, match="got none"):
        to_thresholds(w, x_ND[:0])
    for own in (exported(make("jumprelu")), exported(make("gated")), to_thresholds(w, x_ND, "latent")):
        with pytest.raises(ConfigError, match=r"a threshold for each latent already.*thresholds at none"):
            to_thresholds(own, np.ones((3, own.d_in), np.float32))


# ---- fine-tuning ----


def exported(model):
    return model.to_weights(mean_D=np.zeros(D, np.float32), variance=1.0, hook="h")


@pytest.mark.parametrize("name", ["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"])
def test_a_model_started_from_an_exported_sae_computes_the_same(name):
    source = make(name)
    if name == "batchtopk":
        dense_step(source, batch(), loss_settings())
    w = exported(source)
    target = make(name, seed=5, scale=2.0)
    load_start_(target, w)
    again, x_ND = exported(target), (batch(3) * 4).numpy()
    np.testing.assert_array_equal(active(again, x_ND), active(w, x_ND))
    np.testing.assert_allclose(decode(again, *encode(again, x_ND)), decode(w, *encode(w, x_ND)), rtol=1e-4, atol=1e-4)


def test_foreign_conventions_are_folded_in():
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=D, latents=F, k=K, b_dec_subtracted=False)
    model = make("topk", scale=8.0)
    load_start_(model, w)
    x_ND = batch().numpy()
    found = exported(model)
    np.testing.assert_allclose(decode(found, *encode(found, x_ND)), decode(w, *encode(w, x_ND)), rtol=1e-3, atol=1e-3)
    long_rows = replace(w, variant="threshold", threshold_F=rng.random(F), W_dec_FD=3 * w.W_dec_FD)
    model = make("jumprelu", threshold_start=1e-6)
    load_start_(model, long_rows)
    found = exported(model)
    np.testing.assert_allclose(
        decode(found, *encode(found, x_ND)), decode(long_rows, *encode(long_rows, x_ND)), rtol=1e-3, atol=1e-3
    )


def test_jumprelu_starts_from_thresholds_of_zero_a_little_above_it():
    model = make("jumprelu")
    load_start_(model, random_weights(np.random.default_rng(0), d=D, latents=F, k=K))
    expected = 0.01 * (V / D) ** 0.5
    np.testing.assert_allclose(model.log_theta_F.exp().detach().numpy(), expected, rtol=1e-5)


def test_a_start_that_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=D, latents=F, k=K)
    rows_FD = np.linspace(1, 2, F, dtype=np.float32)[:, None] * w.W_dec_FD
    one_threshold = replace(w, variant="threshold", threshold_F=np.full(F, 0.5, np.float32), W_dec_FD=rows_FD)
    for start, model, said in (
        (random_weights(rng, d=D, latents=F // 2, k=K), make("topk"), "has 96 latents of width 24, this run 192"),
        (
            replace(w, W_dec_FD=rows_FD),
            make("topk"),
            "rows of norm 1 to 2",
        ),
        (replace(w, norm_mode="layer"), make("topk"), "set input_norm to match"),
        (one_threshold, make("batchtopk"), "its one threshold would choose others.*sae.variant=jumprelu"),
        (one_threshold, make("matryoshka", decoder_rows="free"), "rows of norm 1 to 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_start_(model, start)


@pytest.mark.parametrize("rows", ["unit", "free"])
def test_a_batchs_choice_starts_from_thresholds_that_are_one_beside_the_norms(rows):
    norm_F = np.linspace(2, 3, F, dtype=np.float32)
    w = random_weights(np.random.default_rng(0), d=D, latents=F, k=K)
    w = replace(w, variant="threshold", threshold_F=0.7 / norm_F, W_dec_FD=norm_F[:, None] * w.W_dec_FD)
    model, x_ND = make("batchtopk", decoder_rows=rows, scale=8.0), batch().numpy()
    load_start_(model, w)
    assert int(model.batches) == 1  # the first batch moves the threshold, and does not replace it
    found = exported(model)
    assert 0.01 < active(w, x_ND).mean() < 0.9
    np.testing.assert_array_equal(active(found, x_ND), active(w, x_ND))
    np.testing.assert_allclose(decode(found, *encode(found, x_ND)), decode(w, *encode(w, x_ND)), rtol=1e-3, atol=1e-3)


def test_topk_starts_from_rows_of_one_length_whatever_it_is():
    w, x_ND = random_weights(np.random.default_rng(0), d=D, latents=F, k=K), batch().numpy()
    model = make("topk", scale=8.0)
    load_start_(model, replace(w, W_dec_FD=2 * w.W_dec_FD))
    found, twice = exported(model), replace(w, W_dec_FD=2 * w.W_dec_FD)
    np.testing.assert_allclose(
        decode(found, *encode(found, x_ND)), decode(twice, *encode(twice, x_ND)), rtol=1e-3, atol=1e-3
    )


def test_fine_tuning_goes_on_from_where_the_sae_was(tmp_path):
    toy = Toy(batch=256)
    config = TrainConfig(
        num_latents=96, k=4, batch_tokens=256, tokens=120 * 256, log_steps=1, lr=8e-3, warmup_steps=5,
        encoder_dtype="float32", checkpoint_steps=0,
    )  # fmt: skip
    first, second = [], []
    weights = Trainer(config, toy, **toy.statistics(), folder=tmp_path / "a", log=first.append).fit()
    longer = replace(config, tokens=10 * 256, lr=1e-4, variant="batchtopk")
    run = Trainer(
        longer, Toy(batch=256, seed=1), **toy.statistics(), folder=tmp_path / "b", log=second.append, start=weights
    )
    run.fit()
    assert first[-1]["fvu"] < 0.8 * first[0]["fvu"]
    assert second[0]["fvu"] < 1.2 * first[-1]["fvu"] < 0.6 * first[0]["fvu"]
    with pytest.raises(ConfigError, match=r"start: '[0-9a-f]{16}' there, None now"):
        Trainer(longer, Toy(batch=256, seed=1), **toy.statistics(), folder=tmp_path / "b").fit(resume=True)
    assert set(VARIANTS) == {"topk", "batchtopk", "matryoshka", "groupmax", "jumprelu", "relu", "gated"}


def test_layer_norm_rows_keep_their_own_units():
    rng = np.random.default_rng(0)
    w = random_weights(rng, d=16, latents=40, k=4, norm_mode="layer", norm_eps=1e-5, norm_correction=1)
    x_ND = (rng.standard_normal((20, 16)) * rng.uniform(1, 50, (20, 1)) + 3).astype(np.float32)
    x = x_ND.astype(np.float64)
    mu, sigma = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    pre_NF = ((x - mu) / (sigma + 1e-5) - w.b_dec_D) @ w.W_enc_FD.T.astype(np.float64) + w.b_enc_F
    acts_NF = np.where(pre_NF >= -np.sort(-pre_NF, axis=1)[:, 3:4], np.maximum(pre_NF, 0), 0)
    expected_ND = sigma * (acts_NF @ w.W_dec_FD + w.b_dec_D) + mu
    idx_NK, vals_NK = encode(w, x_ND)
    np.testing.assert_allclose(decode(w, idx_NK, vals_NK, x_ND), expected_ND, rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match="needs the rows that were encoded"):
        decode(w, idx_NK, vals_NK)
    torch.testing.assert_close(
        torch.from_numpy(encode(w, 7 * x_ND)[1]), torch.from_numpy(vals_NK), rtol=1e-4, atol=1e-4
    )


def test_auxk_in_bfloat16_is_for_sparse_gradients_and_recorded_as_it_came_to():
    toy = Toy(batch=256)
    run = Trainer(replace(CONFIG, auxk_dtype="bfloat16"), toy, **toy.statistics(), folder="x")
    assert run.learner.identity()["auxk_dtype"] == "bfloat16"
    run = Trainer(replace(CONFIG, variant="relu"), toy, **toy.statistics(), folder="x")
    assert run.learner.identity()["auxk_dtype"] == "float32"
    with pytest.raises(ConfigError, match="use auxk_dtype=auto or float32"):
        Trainer(replace(CONFIG, variant="relu", auxk_dtype="bfloat16"), toy, **toy.statistics(), folder="x")
