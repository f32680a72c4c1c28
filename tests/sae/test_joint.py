"""Several SAEs on the same batches: each as if it were alone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.checkpoint_torch import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from sae.errors import ConfigError, DivergedError, InterruptedRunError, OutOfMemoryError
from sae.saving import BEST, DIVERGED
from sae.trainer import JointTrainer, Trainer, checkpoint_step

from .test_trainer import SMALL, assert_same_weights, trainer
from .toy import D, Toy

# as small as is enough for AuxK to run in some and not in others
CONFIGS = {
    "plain": SMALL,
    "wider": replace(SMALL, num_latents=256, k=3, dead_after_tokens=128),
    "other": replace(SMALL, lr=4e-3, seed=3, auxk_coef=0.0),
}


def joint(folder, configs=CONFIGS, toy=None, **extra):
    toy = toy or Toy(batch=SMALL.batch_tokens)
    return JointTrainer(configs, toy, **toy.statistics(), folder=folder, **extra)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each trained by itself: weights and log rows."""
    found = {}
    for name, config in CONFIGS.items():
        rows = []
        found[name] = trainer(tmp_path_factory.mktemp(name), config, log=rows.append).fit(), rows
    return found


def assert_as_alone(weights, alone):
    assert set(weights) == set(alone)
    for name in alone:
        assert_same_weights(weights[name], alone[name][0])


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "wait_share")} for row in rows]


def test_saes_trained_together_are_to_the_bit_those_trained_alone(alone, tmp_path):
    rows, toy = {name: [] for name in CONFIGS}, Toy(batch=SMALL.batch_tokens)
    weights = joint(tmp_path, toy=toy, log=lambda name, row: rows[name].append(row)).fit()
    assert_as_alone(weights, alone)
    assert toy.served == SMALL.steps  # each batch was read once for all of them
    for name in CONFIGS:
        assert without_times(rows[name]) == without_times(alone[name][1])
    assert rows["wider"][-1]["revived_total"] > 0
    assert not np.array_equal(weights["plain"].W_dec_FD[0], weights["other"].W_dec_FD[0])


def test_compiled_steps_of_saes_trained_together_share_what_they_leave_behind(tmp_path):
    trained = joint(tmp_path)
    trained.fit()
    batches = [learner.stepper._batch for learner in trained.learners.values()]
    for name in ("centred_ND", "grad_ND"):
        assert len({memory[name].data_ptr() for memory in batches}) == 1
        assert batches[0][name].any()
    assert len({memory["vals_P"].data_ptr() for memory in batches}) == len(CONFIGS)


def test_saes_stopped_together_resume_to_the_same_bits(alone, tmp_path):
    class Stopped(Exception):
        pass

    def stop(tokens):
        if tokens == 10 * 128:
            raise Stopped

    with pytest.raises(Stopped):
        joint(tmp_path, progress=stop).fit()
    assert checkpoint_step(tmp_path, *CONFIGS) == 8
    checkpoint_path(tmp_path / "other", 8).unlink()  # as a kill between two of the files leaves it
    assert checkpoint_step(tmp_path, *CONFIGS) == 4
    with pytest.raises(ConfigError, match=r"other already holds step_00000004\.pt"):
        joint(tmp_path).fit()
    assert_as_alone(joint(tmp_path).fit(resume=True), alone)
    assert {name: checkpoint_steps(tmp_path / name) for name in CONFIGS} == {name: [8, 12] for name in CONFIGS}


def signalled(after):
    """A progress call that sends SIGTERM once so many steps are done: it is noted during the next."""
    return lambda tokens: os.kill(os.getpid(), signal.SIGTERM) if tokens == after * 128 else None


def test_a_kill_between_two_files_then_a_stop_leaves_every_sae_the_step_of_the_stop(alone, tmp_path):
    configs = {name: replace(config, keep_last=1) for name, config in CONFIGS.items()}
    with pytest.raises(InterruptedRunError):
        joint(tmp_path, configs, progress=signalled(3)).fit()
    for name in ("plain", "wider"):  # a kill before the file of "other"
        checkpoint_path(tmp_path / name, 8).write_bytes(b"of the history that is not continued")
    with pytest.raises(InterruptedRunError, match="after step 6 of 12"):
        joint(tmp_path, configs, progress=signalled(5)).fit(resume=True)
    assert {name: checkpoint_steps(tmp_path / name) for name in configs} == {name: [6] for name in configs}
    assert_as_alone(joint(tmp_path, configs).fit(resume=True), alone)


def test_a_resume_without_a_step_that_all_have_is_refused(tmp_path):
    joint(tmp_path).fit()
    for step in (8, 12):
        checkpoint_path(tmp_path / "other", step).unlink()
    with pytest.raises(ConfigError, match=r"every SAE has a checkpoint, got plain: 8, 12; wider: 8, 12; other: none"):
        joint(tmp_path).fit(resume=True)
    assert checkpoint_steps(tmp_path / "plain") == [8, 12]


def test_a_kill_in_the_midst_of_the_first_checkpoint_starts_over(alone, tmp_path):
    save_checkpoint(tmp_path / "plain", 4, {})
    assert_as_alone(joint(tmp_path).fit(resume=True), alone)


def test_a_checkpoint_of_several_is_one_of_each(alone, tmp_path):
    joint(tmp_path).fit()
    again = Trainer(CONFIGS["wider"], Toy(batch=128), **Toy().statistics(), folder=tmp_path / "wider")
    assert_same_weights(again.fit(resume=True), alone["wider"][0])


def test_one_that_diverges_is_left_at_its_last_good_checkpoint_while_the_others_go_on(alone, tmp_path):
    configs = CONFIGS | {"wild": replace(SMALL, lr=1e38, warmup_steps=0)}
    run = joint(tmp_path, configs)
    weights = run.fit()
    assert set(run.diverged) == {"wild"}
    message = run.diverged["wild"]
    assert "the loss of wild is" in message
    assert "last good checkpoint: none yet" in message
    for name in CONFIGS:
        assert_same_weights(weights[name], alone[name][0])
    assert json.loads((tmp_path / "wild" / DIVERGED).read_text())["message"] == message
    again = joint(tmp_path, configs)
    assert_as_alone({name: w for name, w in again.fit(resume=True).items() if name in CONFIGS}, alone)
    assert again.diverged == run.diverged


def test_where_all_diverge_the_run_stops(tmp_path):
    with pytest.raises(DivergedError, match=r"the loss of other is nan at step 3, .* at served 3 .*: none yet"):
        joint(tmp_path, toy=Toy(batch=128, poison=3)).fit()


def test_saes_that_cannot_share_batches_are_refused(tmp_path):
    for change, message in (
        ({"batch_tokens": 64}, "share batch_tokens: plain has 128, bad has 64"),
        ({"tokens": 999}, "share tokens: plain has 1536, bad has 999"),
        ({"log_steps": 7}, "share log_steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            joint(tmp_path, CONFIGS | {"bad": replace(SMALL, **change)})
    with pytest.raises(ConfigError, match="at least one SAE"):
        joint(tmp_path, {})


def test_the_checkpoint_of_the_lowest_fvu_is_kept_however_the_run_is_interrupted(tmp_path):
    mean_D = Toy().statistics()["mean_D"]

    class Shifting(Toy):
        """From the ninth batch on rows close to the mean: what an SAE says of them is further off than the mean."""

        def next(self):
            x_BD = super().next()
            near_BD = mean_D + 0.001 * np.random.default_rng(self.served).standard_normal(x_BD.shape)
            return x_BD if self.served <= 8 else near_BD.astype(np.float32)

    config, rows = replace(SMALL, checkpoint_steps=4, log_steps=4, save_best=True, keep_last=1, lr=5e-3), []
    whole = trainer(tmp_path / "whole", config, Shifting(batch=128), log=rows.append)
    whole.fit()
    lowest = min(rows, key=lambda row: row["fvu"])
    assert (lowest["step"], len(rows)) == (8, 3)
    assert whole.learner.best == {"step": 8, "fvu": pytest.approx(lowest["fvu"], rel=1e-12)}
    assert load_checkpoint(tmp_path / "whole" / BEST)["step"] == 8
    assert checkpoint_steps(tmp_path / "whole") == [12]

    def stop(tokens):
        if tokens == 5 * 128:  # noted during the sixth step, after which a checkpoint comes out of turn
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="after step 6"):
        trainer(tmp_path / "part", config, Shifting(batch=128), progress=stop).fit()
    part = trainer(tmp_path / "part", config, Shifting(batch=128))
    part.fit(resume=True)
    assert part.learner.best == whole.learner.best  # the window of step 8 reached back before the interruption
    best = load_checkpoint(tmp_path / "part" / BEST)["model"]
    assert all(torch.equal(t, best[name]) for name, t in load_checkpoint(tmp_path / "whole" / BEST)["model"].items())


def test_running_out_of_memory_says_what_to_lower(tmp_path):
    with pytest.raises(
        OutOfMemoryError,
        match=r"on cpu before the first step .*lower num_latents \(1099511627776\) or batch_tokens \(128",
    ):
        trainer(tmp_path, replace(SMALL, num_latents=2**40))

    class Huge(Toy):
        def next(self):
            x_BD = super().next()
            return x_BD if self.served < 5 else np.broadcast_to(x_BD[:1], (2**40, D))

    with pytest.raises(OutOfMemoryError, match=r"at step 5 .*num_latents \(64, 256\) .* fewer than 3 SAEs"):
        joint(tmp_path, toy=Huge(batch=128)).fit()
    assert checkpoint_step(tmp_path, *CONFIGS) == 4
