"""What a learner counts and reports, against numpy on made-up results of its steps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.learner import CACHED_ROWS, Learner, Subject
from sae.losses import StepResult
from sae.options import SAEOptions
from sae.train_config import TrainConfig

D, F, B, STEPS = 4, 6, 10, 40
CONFIG = TrainConfig(
    num_latents=F, k=2, batch_tokens=B, tokens=STEPS * B, dead_after_tokens=3 * B, auxk_coef=0.25, warmup_steps=5,
    kernel="torch", encoder_dtype="float32",
)  # fmt: skip
FIRES = (1.0, 0.9, 0.5, 0.3, 0.1, 0.02)  # of a batch that a latent fires in it


def made_up(seed=0):
    """One result a step: error, auxk_loss, fired_F."""
    rng = np.random.default_rng(seed)
    fired_TF = rng.integers(1, B + 1, (STEPS, F)) * (rng.random((STEPS, F)) < FIRES)
    return rng.uniform(1, 9, STEPS), rng.random(STEPS), fired_TF


def learner(config=CONFIG):
    """And what its stepper was told: (lr, dead_F) of each step."""
    subject = Subject(d_in=D, mean_D=np.arange(D) / 2, variance=3.0, hook="h", host={})
    found, told = Learner(config, subject, torch.device("cpu")), []
    error_T, auxk_T, fired_TF = made_up()

    def step(u_ND, *, lr, dead_F=None):
        told.append((lr, None if dead_F is None else dead_F.numpy().copy()))
        t = found.step
        error, auxk = torch.tensor(error_T[t]), torch.tensor(auxk_T[t])
        return StepResult(error=error, auxk_loss=auxk, loss=error / B, fired_F=torch.from_numpy(fired_TF[t]))

    found._stepper = SimpleNamespace(step=step, name="told")
    return found, told


def batches():
    return np.random.default_rng(1).normal(1, 2, (STEPS, B, D)).astype(np.float32)


def dead_before(fired_TF, after=3 * B):
    """(T, F): silent for `after` rows or more when the step begins."""
    idle_F, found = np.zeros(F, int), []
    for fired_F in fired_TF:
        found.append(idle_F >= after)
        idle_F = np.where(fired_F > 0, 0, idle_F + B)
    return np.array(found), idle_F >= after


@pytest.mark.parametrize("way", ["prepare", "_scaled_on_device"])
@pytest.mark.parametrize("rows", [1, CACHED_ROWS, 2 * CACHED_ROWS + 44])
def test_rows_are_scaled_and_their_scatter_is_that_of_float64_wherever_they_are_scaled(rows, way):
    found, _ = learner()
    for seed in (0, 1):
        x_BD = (np.random.default_rng(seed).normal(1, 2, (rows, D)) + 1000 * np.eye(1, D, 2)).astype(np.float32)
        x_BD.setflags(write=False)
        u_BD, scatter = getattr(found, way)(x_BD)
        scaled_BD = x_BD.astype(np.float64) / found.scale
        np.testing.assert_allclose(u_BD.numpy(), scaled_BD, rtol=2e-7)
        expected = ((scaled_BD - np.arange(D) / 2 / found.scale) ** 2).sum()
        assert float(scatter) == pytest.approx(expected, rel=1e-5)


def test_latents_are_dead_after_as_many_silent_rows_as_the_settings_say():
    found, told = learner()
    for x_BD in batches():
        found.train(*found.prepare(x_BD))
    dead_TF, _ = dead_before(made_up()[2])
    assert dead_TF.any(axis=0).sum() >= 2
    for (_, dead_F), expected_F in zip(told, dead_TF, strict=True):
        if expected_F.any():
            np.testing.assert_array_equal(dead_F, expected_F)
        else:
            assert dead_F is None
    assert [lr for lr, _ in told] == [CONFIG.lr_at(step) for step in range(STEPS)]
    alone, told = learner(replace(CONFIG, auxk_coef=0.0))
    for x_BD in batches():
        alone.train(*alone.prepare(x_BD))
    assert all(dead_F is None for _, dead_F in told)


def test_a_variant_without_auxk_hears_of_no_dead_latents_and_revives_none():
    found, told = learner(replace(CONFIG, variant="relu"))
    for x_BD in batches():
        found.train(*found.prepare(x_BD))
    assert all(dead_F is None for _, dead_F in told)
    row = found.report(1.0, 0.0)
    assert row["dead"] > 0
    assert (row["revived"], row["revived_total"]) == (0, 0)


def test_a_falling_k_starts_where_the_settings_say_with_the_first_step():
    found, told = learner(replace(CONFIG, options=SAEOptions(k_start=6, k_anneal_share=0.4)))
    k_T, step = [], found._stepper.step
    found._stepper.step = lambda *given, **more: k_T.append(found.model.k) or step(*given, **more)
    for x_BD in batches():
        found.train(*found.prepare(x_BD))
    assert k_T == [2 + round(4 * max(0.0, 1 - t / (0.4 * STEPS))) for t in range(STEPS)]
    assert len(told) == STEPS


def test_a_report_averages_over_the_steps_since_the_last_one():
    found, _ = learner()
    error_T, auxk_T, fired_TF = made_up()
    dead_TF, _ = dead_before(fired_TF)
    x_TBD = batches()
    scatter_T = ((x_TBD.astype(np.float64) - np.arange(D) / 2) ** 2).sum(axis=(1, 2)) / float(found.scale) ** 2
    revived_T = (dead_TF & (fired_TF > 0)).sum(axis=1)
    start = 0
    for stop in (7, 19, STEPS):
        for x_BD in x_TBD[start:stop]:
            found.train(*found.prepare(x_BD))
        row, part = found.report(2.0, 0.5), slice(start, stop)
        fvu = error_T[part].sum() / scatter_T[part].sum()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert row["auxk_loss"] == pytest.approx(auxk_T[part].mean(), rel=1e-9)
        assert row["loss"] == pytest.approx(fvu + 0.25 * auxk_T[part].mean(), rel=1e-5)
        assert row["l0"] == pytest.approx(fired_TF[part].sum() / (B * (stop - start)), rel=1e-12)
        assert (row["revived"], row["revived_total"]) == (revived_T[part].sum(), revived_T[:stop].sum())
        assert row["dead"] == dead_before(fired_TF[:stop])[1].sum()
        assert row["lr"] == CONFIG.lr_at(stop - 1)  # of the last step that was made
        assert (row["step"], row["tokens"]) == (stop, stop * B)
        assert (row["tokens_per_s"], row["wait_share"]) == (B * (stop - start) / 2, 0.25)
        start = stop
    assert revived_T.sum() > 2


def test_the_best_checkpoint_is_the_first_of_the_lowest_fvu_over_the_steps_since_the_one_before():
    found, _ = learner()
    error_T, *_ = made_up()
    x_TBD = batches()
    scatter_T = ((x_TBD.astype(np.float64) - np.arange(D) / 2) ** 2).sum(axis=(1, 2)) / float(found.scale) ** 2
    lowest, start = np.inf, 0
    for stop in (10, 20, 30, STEPS):
        for x_BD in x_TBD[start:stop]:
            found.train(*found.prepare(x_BD))
        fvu = error_T[start:stop].sum() / scatter_T[start:stop].sum()
        assert found.judge() == (fvu < lowest)
        assert found.judged == pytest.approx(fvu, rel=1e-5)
        lowest, start = min(lowest, fvu), stop
        assert found.best["fvu"] == pytest.approx(lowest, rel=1e-5)
    again = found.best
    found._span_2.copy_(torch.tensor([again["fvu"], 1.0], dtype=torch.float64))
    assert not found.judge()
    assert found.best == again


def test_the_rates_of_the_file_are_those_of_the_last_tenth_of_the_steps():
    found, _ = learner()
    *_, fired_TF = made_up()
    found._stepper.evaluation = torch.no_grad
    for t, x_BD in enumerate(batches()):
        assert (found.weights().freq_F is None) == (t <= 0.9 * STEPS)
        found.train(*found.prepare(x_BD))
    np.testing.assert_allclose(found.weights().freq_F, fired_TF[36:].sum(axis=0) / (4 * B), rtol=1e-6)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_taken_up_again_in_the_last_tenth_it_counts_on_as_if_it_had_not_stopped(variant):
    subject = Subject(d_in=D, mean_D=np.arange(D) / 2, variance=16.0, hook="h", host={})
    config = replace(CONFIG, variant=variant, num_latents=24, auxk_k=4)

    def fresh():
        return Learner(config, subject, torch.device("cpu"))

    def go_on(one, start, stop):
        for x_BD in batches()[start:stop]:
            one.train(*one.prepare(x_BD))

    first, second = fresh(), fresh()
    go_on(first, 0, 30)
    first.report(1.0, 0.0)
    first.judge()
    go_on(first, 30, 38)
    assert first.weights().freq_F is not None
    facts, tensors = json.loads(json.dumps(first.facts())), copy.deepcopy(first.tensors())
    second.load(facts, tensors)
    assert (second.step, second.metrics, second.judged) == (38, first.metrics, first.judged)
    assert second.metrics["step"] == 30
    for one in (first, second):
        go_on(one, 38, STEPS)
        one.judge()
    rows = [one.report(1.0, 0.0) for one in (first, second)]
    assert rows[0].pop("tokens_per_s") > rows[1].pop("tokens_per_s")  # only its own rows were in its time
    assert rows[0] == rows[1]
    assert rows[0]["revived_total"] > 0
    assert (first.judged, first.best) == (second.judged, second.best)
    for name in ("W_enc_FD", "W_dec_FD", "b_enc_F", "b_dec_D", "freq_F"):
        np.testing.assert_array_equal(getattr(first.weights(), name), getattr(second.weights(), name))


@pytest.mark.parametrize(
    ("settings", "subject", "message"),
    [
        ({}, {"hook": "other"}, "hook: 'h' there, 'other' now"),
        ({}, {"variance": 3.5}, "activation_variance: 3.0 there, 3.5 now"),
        ({}, {"mean_D": np.ones(D)}, "activation_mean: "),
        ({}, {"d_in": 3, "mean_D": np.ones(3)}, "d_in: 4 there, 3 now"),
        ({"auxk_dtype": "bfloat16"}, {}, "auxk_dtype: 'float32' there, 'bfloat16' now"),
        ({"k": 1, "seed": 5}, {}, "k: 2 there, 1 now; seed: 0 there, 5 now"),
    ],
)
def test_a_checkpoint_of_other_rows_or_settings_is_refused_by_name(settings, subject, message):
    made = {"d_in": D, "mean_D": np.arange(D) / 2, "variance": 3.0, "hook": "h", "host": {}}
    config, device = replace(CONFIG, auxk_dtype="float32"), torch.device("cpu")
    there = json.loads(json.dumps(Learner(config, Subject(**made), device).identity()))
    now = Learner(replace(config, **settings), Subject(**made | subject), device)
    with pytest.raises(ConfigError, match=message):
        now.check_identity(there)
    same = Learner(replace(config, log_steps=7), Subject(**made), device)
    same.check_identity(there)
    with pytest.raises(ConfigError, match=r"^lost: 1 there, None now$"):
        same.check_identity(there | {"lost": 1})


@pytest.mark.parametrize("fast", [True, False])
def test_what_auto_came_to_is_part_of_a_checkpoints_identity(monkeypatch, fast):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    found, _ = learner(replace(CONFIG, encoder_dtype="auto", auxk_dtype="auto"))
    wanted = "bfloat16" if fast else "float32"
    assert (found.identity()["encoder_dtype"], found.identity()["auxk_dtype"]) == (wanted, wanted)
