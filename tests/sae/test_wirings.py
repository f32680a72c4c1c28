"""Transcoders, crosscoders and cross-layer transcoders: one spine, other columns."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.kernels import FastStep, has_fast_step
from sae.latent_ranks import shard_
from sae.losses import dense_step
from sae.options import SAEOptions
from sae.ranks import Ranks
from sae.runtime import decode, encode
from sae.steppers import make_stepper
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.variants.build import build
from sae.variants.start import load_start_
from sae.wiring import Wiring

A, B = ("blocks.0.hook_resid_mid", 10), ("blocks.1.hook_resid_mid", 10)
Y, Z = ("blocks.0.hook_mlp_out", 6), ("blocks.1.hook_mlp_out", 8)
F, K, N = 60, 5, 120
WIRINGS = {
    "transcoder": Wiring(kind="transcoder", inputs=(A,), outputs=(Y,)),
    "skip": Wiring(kind="transcoder", inputs=(A,), outputs=(Y,), skip=True),
    "crosscoder": Wiring(kind="crosscoder", inputs=(A, Y, Z)),
    "cross_layer": Wiring(kind="cross_layer", inputs=(A, B), outputs=(Y, Z)),
}
SCALES = {A: 0.5, B: 30.0, Y: 3.0, Z: 0.2}  # hook points of very different size


def ports(wiring):
    return (*wiring.inputs, *wiring.outputs)


class Rows:
    """A BatchSource: outputs are sparse functions of the inputs, everything is shifted."""

    def __init__(self, wiring, batch=N, seed=0):
        self.wiring, self.batch, self.seed, self.served, self.d_in = wiring, batch, seed, 0, wiring.width
        rng = np.random.default_rng(5)
        self.maps = {port: rng.standard_normal((24, port[1])) for port in SCALES}
        self.shift = {port: rng.standard_normal(port[1]) * 2 for port in SCALES}

    def rows(self, count, *key):
        rng = np.random.default_rng(key)
        code = (rng.random((count, 24)) < 0.15) * rng.uniform(0.5, 1.5, (count, 24))
        parts = [SCALES[p] * (code @ self.maps[p] + self.shift[p]) for p in ports(self.wiring)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def next(self):
        self.served += 1
        return self.rows(self.batch, self.seed, self.served)

    def state(self):
        return {"served": self.served}

    def load_state(self, state):
        self.served = state["served"]

    def statistics(self):
        x_NW = self.rows(4000, 99).astype(np.float64)
        mean_W = x_NW.mean(0)
        variances = tuple(float(((x_NW - mean_W)[:, part] ** 2).sum(1).mean()) for part in self.wiring.parts)
        written = variances[len(self.wiring.inputs) :] if self.wiring.two_sided else variances
        return {
            "mean_D": mean_W, "variance": sum(written), "variances": variances, "wiring": self.wiring,
        }  # fmt: skip


def make(name, variant="topk", **options):
    rows, generator = Rows(WIRINGS[name]), torch.Generator().manual_seed(0)
    config = TrainConfig(
        num_latents=F,
        k=K,
        variant=variant,
        encoder_dtype="float32",
        auxk_dtype="float32",
        auxk_k=8,
        options=SAEOptions(**options),
    )
    model, settings = build(
        config, width=rows.d_in, generator=generator, device=torch.device("cpu"), **rows.statistics()
    )  # fmt: skip
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name not in ("W_dec_FD", "b_dec_D"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, settings, rows


def output(p, model, u_NW, k=K):
    """The reconstruction in scaled units, written out hook point by hook point."""
    wiring, parts = model.wiring, model.wiring.parts
    if not wiring.two_sided:
        pre_NF = (u_NW - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"]
    else:
        centre_I, per = model.centre_I.double().numpy(), F // len(wiring.inputs)
        pre_NF = np.concatenate(
            [
                (u_NW[:, parts[i]] - centre_I[parts[i]]) @ p["W_enc_FD"][i * per : (i + 1) * per].T
                for i in range(len(wiring.inputs))
            ],
            axis=1,
        )
        pre_NF = pre_NF + p["b_enc_F"]
    acts_NF = np.zeros_like(pre_NF)
    top_NK = np.argsort(-pre_NF, axis=1)[:, :k]
    np.put_along_axis(acts_NF, top_NK, np.maximum(np.take_along_axis(pre_NF, top_NK, axis=1), 0), axis=1)
    W_FO = p["W_dec_FD"].copy()
    if wiring.kind == "cross_layer":
        W_FO[F // 2 :, : Y[1]] = 0  # the second layer's latents do not reach the first layer's output
    out_NO = acts_NF @ W_FO + p["b_dec_D"]
    return out_NO + (u_NW[:, : A[1]] - centre_I) @ p["W_skip_OD"].T if wiring.skip else out_NO


@pytest.mark.parametrize("name", WIRINGS)
def test_the_loss_is_the_written_one_and_its_gradient_the_finite_difference(name):
    model, settings, rows = make(name)
    model = model.double()
    u_NW = rows.rows(N, 1).astype(np.float64) / model.scale

    def written(p):
        return ((u_NW[:, model.wiring.target] - output(p, model, u_NW)) ** 2).sum() / N

    result = dense_step(model, torch.from_numpy(u_NW), settings)
    model.project_decoder_grad_()
    p = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    assert float(result.loss) == pytest.approx(written(p), rel=1e-12)
    rng = np.random.default_rng(0)
    for parameter_name, parameter in model.named_parameters():
        direction = rng.standard_normal(p[parameter_name].shape)
        if parameter_name == "W_dec_FD":  # along the sphere, where it may move
            direction -= (direction * p["W_dec_FD"]).sum(1, keepdims=True) * p["W_dec_FD"]
        sides = [written(p | {parameter_name: p[parameter_name] + s * direction}) for s in (1e-7, -1e-7)]
        slope = float((parameter.grad.numpy() * direction).sum())
        tolerance = {"rel": 1e-4, "abs": 1e-5}
        if name == "cross_layer" and parameter_name == "W_dec_FD":
            direction[F // 2 :, : Y[1]] = 0
            direction -= (direction * p["W_dec_FD"]).sum(1, keepdims=True) * p["W_dec_FD"]
            slope = float((parameter.grad.numpy() * direction).sum())
            sides = [written(p | {parameter_name: p[parameter_name] + s * direction}) for s in (1e-7, -1e-7)]
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-7, **tolerance), parameter_name


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu", "relu", "gated"])
@pytest.mark.parametrize("name", WIRINGS)
def test_the_exported_weights_compute_what_the_model_does_in_raw_units(name, variant):
    model, settings, rows = make(name, variant, decoder_rows="free" if variant == "relu" else "unit")
    statistics = rows.statistics()
    if variant == "batchtopk":
        dense_step(model, torch.from_numpy((rows.rows(N, 1) / model.scale).astype(np.float32)), settings)
    x_NW = rows.rows(200, 7)
    with torch.no_grad():
        expected_NO = model.eval()(torch.from_numpy(x_NW)).numpy()
    weights = model.to_weights(mean_D=statistics["mean_D"], variance=statistics["variance"], hook=A[0])
    read_NI = x_NW[:, : model.wiring.d_in]
    idx_NK, vals_NK = encode(weights, read_NI)
    found_NO = decode(weights, idx_NK, vals_NK, read_NI)
    assert (vals_NK > 0).any()
    for part in model.wiring.parts[-2:] if name == "cross_layer" else ():
        columns = slice(part.start - model.wiring.d_in, part.stop - model.wiring.d_in)
        np.testing.assert_allclose(found_NO[:, columns], expected_NO[:, columns], rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(found_NO - expected_NO) < 1e-5 * np.linalg.norm(expected_NO)
    assert [width for _, width in weights.ports] == [width for _, width in ports(model.wiring)]
    assert bool(weights.hook_out) == model.wiring.two_sided
    np.testing.assert_allclose(weights.mean_D, statistics["mean_D"][model.wiring.target], rtol=1e-6)
    if name == "cross_layer":
        assert not weights.W_dec_FD[F // 2 :, : Y[1]].any()
        assert not weights.W_enc_FD[: F // 2, A[1] :].any()
        assert not weights.W_enc_FD[F // 2 :, : A[1]].any()


@pytest.mark.parametrize("name", ["transcoder", "skip", "crosscoder"])
def test_a_model_started_from_exported_weights_computes_the_same(name):
    (source, _, rows), (target, *_) = make(name), make(name)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(torch.ones_like(parameter))
    statistics = {"mean_D": rows.statistics()["mean_D"], "variance": 1.0, "hook": A[0]}
    weights = source.to_weights(**statistics)
    norm_F = np.linalg.norm(weights.W_dec_FD, axis=1)
    assert norm_F.max() <= 1 + 1e-6  # activations are in units of the output of the largest scale
    assert (name == "crosscoder") == (norm_F.min() < 0.9)
    load_start_(target, weights)
    x_NW = torch.from_numpy(rows.rows(N, 1))
    with torch.no_grad():
        expected_NO, found_NO = source(x_NW).numpy(), target(x_NW).numpy()
    np.testing.assert_allclose(found_NO, expected_NO, rtol=1e-4, atol=1e-4 * np.abs(expected_NO).max())
    again = target.to_weights(**statistics)
    for field in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", *(["W_skip_OD"] if name == "skip" else [])):
        there, here = getattr(weights, field), getattr(again, field)
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4 * np.abs(there).max())


@pytest.mark.parametrize("dead", [0, 3, 50])
@pytest.mark.parametrize("variant", ["topk", "batchtopk", "groupmax"])
@pytest.mark.parametrize("name", ["transcoder", "skip", "crosscoder"])
def test_the_fast_step_has_the_gradients_of_float64_autograd(name, variant, dead):
    model, settings, rows = make(name, variant)
    assert has_fast_step(model)
    u_NW = torch.from_numpy((rows.rows(N, 1) / model.scale).astype(np.float32))
    dead_F = torch.arange(F) % (F // dead) == 0 if dead == 3 else torch.arange(F) < dead
    dead_F = dead_F if dead else None
    oracle = copy.deepcopy(model).double()
    expected = dense_step(oracle, u_NW.double(), settings, dead_F)
    result = FastStep(model, settings)(u_NW, dead_F)
    assert torch.equal(result.fired_F, expected.fired_F)
    for number in ("loss", "error", "auxk_loss"):
        assert float(getattr(result, number)) == pytest.approx(float(getattr(expected, number)), rel=1e-5), number
    assert (float(result.auxk_loss) > 0) == bool(dead)
    theirs = dict(oracle.named_parameters())
    assert ("W_skip_OD" in theirs) == (name == "skip")
    for parameter_name, parameter in model.named_parameters():
        wanted = theirs[parameter_name].grad
        gap = float((parameter.grad.double() - wanted).norm() / wanted.norm())
        assert gap < 2e-5, parameter_name


@pytest.mark.parametrize("name", ["transcoder", "skip"])
def test_a_transcoders_step_tells_the_latents_of_its_input(name):
    model, settings, rows = make(name)
    u_NW = torch.from_numpy((rows.rows(N, 1) / model.scale).astype(np.float32))
    stepper = make_stepper(model, settings, TrainConfig(num_latents=F, k=K, kernel="torch"))
    wanted_NK = model.double().pre_acts(u_NW[:, : model.wiring.d_in].double()).topk(K).indices
    model.float()
    assert torch.equal(stepper.chosen(u_NW).sort(1).values, wanted_NK.sort(1).values)


def test_in_bfloat16_the_general_path_reads_a_transcoders_input():
    model, settings, rows = make("transcoder")
    u_NW = torch.from_numpy((rows.rows(N, 1) / model.scale).astype(np.float32))
    settings = replace(settings, encoder_dtype=torch.bfloat16)
    result = FastStep(model, settings)(u_NW)
    fast = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected = dense_step(model, u_NW, settings)
    assert torch.equal(result.fired_F, expected.fired_F)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_latents_of_a_transcoder_are_not_shared_out():
    model, _, _ = make("transcoder")
    config = TrainConfig(num_latents=F, k=K, parallel="latent")
    with pytest.raises(ConfigError, match="that reconstructs what it reads"):
        shard_(model, config=config, ranks=Ranks(0, 2))


def test_a_cross_layer_transcoder_trains_by_autograd():
    assert not has_fast_step(make("cross_layer")[0])


def test_training_leaves_outputs_of_earlier_layers_out_of_reach():
    model, settings, rows = make("cross_layer")
    stepper = make_stepper(model, settings, TrainConfig(num_latents=F, k=K, kernel="torch"))
    before = model.W_dec_FD.detach().clone()
    for number in range(5):
        stepper.step(torch.from_numpy((rows.rows(N, number) / model.scale).astype(np.float32)), lr=0.01)
    assert not model.W_dec_FD[F // 2 :, : Y[1]].any()
    assert (model.W_dec_FD != before)[F // 2 :, Y[1] :].any(dim=1).float().mean() > 0.9
    norm_F = torch.linalg.vector_norm(model.W_dec_FD, dim=1)
    torch.testing.assert_close(norm_F, torch.ones_like(norm_F))


def test_the_crosscoders_l1_penalty_sums_the_norms_at_each_hook_point():
    model, settings, rows = make("crosscoder", "relu", decoder_rows="free")
    model = model.double()
    u_NW = rows.rows(N, 1).astype(np.float64) / model.scale
    loss = float(dense_step(model, torch.from_numpy(u_NW), settings).loss)
    p = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    acts_NF = np.maximum((u_NW - p["b_dec_D"]) @ p["W_enc_FD"].T + p["b_enc_F"], 0)
    norm_F = sum(np.linalg.norm(p["W_dec_FD"][:, part], axis=1) for part in model.wiring.parts)
    error = ((u_NW - acts_NF @ p["W_dec_FD"] - p["b_dec_D"]) ** 2).sum() / N
    weight = 2 * (settings.variance / rows.d_in) ** 0.5
    assert loss == pytest.approx(error + weight * (acts_NF @ norm_F).sum() / N, rel=1e-12)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", WIRINGS)
def test_a_short_training_ends_better_and_the_weights_say_so(tmp_path, name, variant):
    rows, log = Rows(WIRINGS[name], batch=256), []
    config = TrainConfig(
        num_latents=96, k=8, batch_tokens=256, tokens=80 * 256, log_steps=1, lr=5e-3, warmup_steps=5, variant=variant,
        encoder_dtype="float32", checkpoint_steps=0,
    )  # fmt: skip
    statistics = rows.statistics()
    run = Trainer(config, rows, **statistics, hook=A[0], host={}, folder=tmp_path, log=log.append)
    weights = run.fit()
    assert log[-1]["fvu"] < 0.6 * log[0]["fvu"]
    x_NW = rows.rows(2000, 7)
    read_NI, target_NO = x_NW[:, : run.model.wiring.d_in], x_NW[:, run.model.wiring.target]
    error_NO = (target_NO - decode(weights, *encode(weights, read_NI), read_NI)).astype(np.float64)
    scale_O = np.asarray(run.model.scale)[run.model.wiring.target]  # every hook point counts alike
    centred_NO = target_NO - statistics["mean_D"][run.model.wiring.target]
    fvu = ((error_NO / scale_O) ** 2).sum() / ((centred_NO / scale_O) ** 2).sum()
    assert fvu == pytest.approx(log[-1]["fvu"], rel=0.2)
    inputs = (("blocks.9.hook_resid_mid", run.model.wiring.inputs[0][1]), *run.model.wiring.inputs[1:])
    elsewhere = statistics | {"wiring": replace(run.model.wiring, inputs=inputs)}
    again = Trainer(config, Rows(WIRINGS[name]), **elsewhere, hook=A[0], host={}, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"inputs: \[\['blocks.0.hook_resid_mid', 10\]"):
        again.fit(resume=True)


def test_hook_points_that_do_not_fit_the_kind_are_refused():
    for settings, said in (
        ({"kind": "transcoder", "inputs": (A,)}, "as many outputs as inputs, got 0 and 1"),
        ({"kind": "crosscoder", "inputs": (A,)}, "reads at least 2 hook points, got 1"),
        ({"kind": "crosscoder", "inputs": (A, B), "outputs": (Y,)}, "leave the outputs out"),
        ({"kind": "cross_layer", "inputs": (A, Z), "outputs": (Y, Y)}, "equally wide"),
        ({"kind": "crosscoder", "inputs": (A, B), "skip": True}, "a skip matrix is a transcoder's"),
        ({"kind": "mixture"}, "known are sae, crosscoder"),
    ):
        with pytest.raises(ConfigError, match=said):
            Wiring(**settings)
    rows, device = Rows(WIRINGS["cross_layer"]), torch.device("cpu")
    odd = TrainConfig(num_latents=61, k=5)
    with pytest.raises(ConfigError, match="num_latents divisible by 2"):
        build(odd, width=rows.d_in, generator=torch.Generator(), device=device, **rows.statistics())
    with pytest.raises(ConfigError, match="input_norm=layer is for SAEs"):
        make("transcoder", input_norm="layer")
    assert replace(WIRINGS["skip"], skip=False) == WIRINGS["transcoder"]
