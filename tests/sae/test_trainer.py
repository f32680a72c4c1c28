from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.batches import Prefetcher
from sae.checkpoint_torch import checkpoints, load_checkpoint
from sae.errors import ConfigError, DivergedError, FormatError, InterruptedRunError, ShapeError
from sae.metrics import ReconstructionMetrics
from sae.runtime import decode, encode
from sae.trainer import TrainConfig, Trainer, checkpoint_step, pick_device
from sae.untrained import untrained_weights

from .toy import D, Toy

# float32: what encoder_dtype=auto means depends on the chip, and bfloat16 may choose other latents near ties
SMALL = TrainConfig(
    num_latents=64, k=4, batch_tokens=128, tokens=12 * 128, checkpoint_steps=4, log_steps=3, lr=1e-3,
    encoder_dtype="float32", auxk_dtype="float32", dead_after_tokens=10_000_000,
)  # fmt: skip


def trainer(folder, config=SMALL, toy=None, **extra):
    toy = toy or Toy(batch=config.batch_tokens)
    return Trainer(config, toy, **toy.statistics(), folder=folder, **extra)


def assert_same_weights(a, b):
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "freq_F"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def fvu(weights, x_ND):
    idx_NK, vals_NK = encode(weights, x_ND)
    metrics = ReconstructionMetrics(weights.d_in, weights.num_latents)
    metrics.update(x_ND, decode(weights, idx_NK, vals_NK), idx_NK, vals_NK)
    return metrics.result()


# ---- it learns ----


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_it_untangles_superposed_features_and_beats_pca_and_the_untrained_sae(tmp_path, kernel):
    toy, k = Toy(batch=1024), 8
    config = TrainConfig(
        num_latents=256, k=k, batch_tokens=1024, tokens=300 * 1024, lr=5e-3, warmup_steps=20, decay_share=0.3,
        dead_after_tokens=20 * 1024, log_steps=50, kernel=kernel,
    )  # fmt: skip
    rows = []
    weights = trainer(tmp_path, config, toy, log=rows.append).fit()
    x_ND = toy.rows(8000, 777)
    result = fvu(weights, x_ND)
    centred_ND = x_ND - x_ND.mean(0, dtype=np.float64)
    singular = np.linalg.svd(centred_ND, compute_uv=False) ** 2
    pca = singular[k:].sum() / singular.sum()
    untrained = fvu(untrained_weights(D, 256, k, seed=0, sample_ND=x_ND, **toy.statistics()), x_ND)["fvu"]
    assert result["fvu"] < 0.2 < 0.4 < min(pca, untrained)
    assert result["l0"] <= k
    assert result["dead_share"] < 0.1
    np.testing.assert_allclose(np.linalg.norm(weights.W_dec_FD, axis=1), 1, rtol=1e-5)
    best_F = (weights.W_dec_FD @ toy.features_FD.T).max(axis=0)  # cosine of each true feature's best latent
    assert np.median(best_F) > 0.9
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["fvu"] == pytest.approx(result["fvu"], rel=0.15)
    np.testing.assert_allclose(weights.freq_F, result["density_F"], atol=0.02)


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_auxk_revives_latents_that_would_stay_dead(tmp_path, kernel):
    dead = {}
    for coef in (0.0, 1 / 32):
        # rows of norm 1 overshoot and shrink towards those cut below, so that 150 steps are enough to see a revival
        settings = {"num_latents": 192, "tokens": 150 * 128, "dead_after_tokens": 10 * 128, "lr": 3e-3}
        config = replace(SMALL, auxk_coef=coef, kernel=kernel, init_scale=1.0, **settings)
        rows = []
        run = trainer(tmp_path / str(coef), config, log=rows.append)
        with torch.no_grad():
            run.model.W_enc_FD[::2] *= 0.2  # too short to be among the k largest
        run.fit()
        dead[coef] = rows[-1]["dead"]
        assert (rows[-1]["revived_total"] > 0) == (coef > 0)
        assert (max(row["auxk_loss"] for row in rows) > 0) == (coef > 0)
        assert sum(row["revived"] for row in rows) == rows[-1]["revived_total"]
    assert dead[0.0] > 50
    assert dead[1 / 32] < 0.5 * dead[0.0]


def test_auxk_is_left_out_while_no_latent_is_dead(tmp_path):
    rows = []
    with_auxk = trainer(tmp_path / "a", replace(SMALL, auxk_coef=1.0), log=rows.append).fit()
    assert {row["dead"] for row in rows} == {0}
    assert_same_weights(with_auxk, trainer(tmp_path / "b", replace(SMALL, auxk_coef=0.0)).fit())


# ---- what it says ----


def test_the_logged_numbers_are_those_of_the_batches(tmp_path):
    rows, seen, toy = [], [], Toy(batch=128)
    run = trainer(tmp_path, replace(SMALL, log_steps=1, tokens=128), toy, log=rows.append, progress=seen.append)
    before = run.weights()
    x_ND = Toy().rows(128, 0, 1)
    idx_NK, vals_NK = encode(before, x_ND)
    error = ((x_ND - decode(before, idx_NK, vals_NK)).astype(np.float64) ** 2).sum()
    scatter = ((x_ND - toy.statistics()["mean_D"]).astype(np.float64) ** 2).sum()
    weights = run.fit()
    (row,) = rows
    assert row["fvu"] == pytest.approx(error / scatter, rel=1e-5)
    assert row["l0"] == pytest.approx((vals_NK > 0).sum() / 128)
    assert (row["step"], row["tokens"], row["dead"], row["revived"], row["auxk_loss"]) == (1, 128, 0, 0, 0)
    assert row["loss"] == row["fvu"]
    assert 0 <= row["wait_share"] <= 1
    assert row["tokens_per_s"] > 0
    assert seen == [128]
    assert weights.training["metrics"] == row
    assert weights.training["config"]["lr"] == SMALL.lr


def test_what_is_left_over_at_the_end_joins_the_last_row(tmp_path):
    rows = []
    for steps in (8, 9, 11):
        trainer(tmp_path / str(steps), replace(SMALL, tokens=steps * 128, log_steps=3), log=rows.append).fit()
    assert [row["step"] for row in rows] == [3, 8, 3, 6, 9, 3, 6, 11]


def test_devices_and_batches_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, got 'tpu'"):
        pick_device("tpu")
    toy = Toy()
    toy.rows = lambda count, *key: np.zeros((count, D + 1), np.float32)  # a source that changes its width
    run = Trainer(SMALL, toy, **Toy().statistics(), folder=tmp_path)
    with pytest.raises(ShapeError, match=rf"must be \(rows, {D}\), the source gave \(512, {D + 1}\)"):
        run.fit()


# ---- stopping and going on ----


def start(*arguments):
    command = [sys.executable, "-m", "tests.sae.train_toy", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(*arguments):
    with start(*arguments) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    return output.splitlines()


def kill_at(folder, step, number, *arguments):
    """Start, send the signal once that step is logged, return what came out."""
    lines = []
    with start(folder, *arguments) as process:
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith(f"step {step} "):
                process.send_signal(number)
    return process.returncode, lines


@pytest.mark.parametrize("kernel", ["torch", "native"])
def test_killed_and_interrupted_runs_end_at_the_bits_of_an_undisturbed_one(tmp_path, kernel):
    word = f"kernel={kernel}"
    whole = finish(tmp_path / "whole", word)
    assert any(line.startswith("step") and not line.endswith(" 0") for line in whole)  # latents were dead: AuxK ran
    folder = tmp_path / "stopped"
    code, lines = kill_at(folder, 17, signal.SIGKILL, word)
    assert code == -signal.SIGKILL
    assert "weights" not in lines[-1]
    code, lines = kill_at(folder, 40, signal.SIGTERM, "resume", word)
    assert lines[0] == next(line for line in whole if line.startswith("step 15 "))  # from the checkpoint of step 14
    name, exit_code, message = lines[-1].split(" ", 2)
    assert (code, name, exit_code) == (0, "InterruptedRunError", "130")
    assert message.startswith("SIGTERM after step 4")
    assert "resume=latest continues" in message
    last = finish(folder, "resume", word)
    assert last[-1] == whole[-1]
    assert last[-1].startswith("weights ")
    assert [path.name for path in checkpoints(folder)] == [path.name for path in checkpoints(tmp_path / "whole")]


@pytest.mark.parametrize(
    ("words", "kills"),
    [
        (["every=2"], 3),
        (["every=1", "joint"], 2),
        pytest.param(["every=1"], 40, marks=pytest.mark.long),
        pytest.param(["every=1", "joint"], 20, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_random_moments_ends_at_the_same_bits(words, kills, tmp_path):
    whole, rng, folder = finish(tmp_path / "whole", *words), np.random.default_rng(kills), tmp_path / "killed"
    done = 0
    while done < kills:
        with start(folder, *words, "resume") as process:
            more, delay = (
                rng.integers(1, 2 + 60 // kills),
                rng.uniform(0, 0.02),
            )  # steps, then any place in the next few
            for line in process.stdout:
                if line.startswith("weights"):
                    assert done, "ended before it was killed once"
                    break
                more -= 1
                if more == 0:
                    time.sleep(delay)
                    process.kill()
        if process.returncode == 0:
            break
        done += 1
    assert finish(folder, *words, "resume")[-1] == whole[-1]
    assert not list(folder.rglob("*.pt"))[5:]  # nothing piles up


def test_waiting_for_rows_is_what_the_metrics_say_it_is(tmp_path):
    class Slow(Toy):
        def next(self):
            time.sleep(0.1)
            return super().next()

    shares = {}
    for name, toy, ahead in (("slow", Slow(batch=128), 0), ("ready", Ready(batch=128), 2)):
        rows = []
        run = trainer(tmp_path / name, replace(SMALL, prefetch_batches=ahead), toy, log=rows.append)
        started = time.perf_counter()
        run.fit()
        shares[name] = run.wait_share
        waited = sum(row["wait_share"] * 3 * 128 / row["tokens_per_s"] for row in rows)  # seconds, from share and speed
        assert waited < time.perf_counter() - started
        if name == "slow":
            assert waited > 12 * 0.1
    assert shares["ready"] < shares["slow"] < 1


class Ready(Toy):
    """One batch, made before."""

    def next(self):
        if not hasattr(self, "made"):
            self.made = super().next()
        return self.made


def test_a_full_disk_stops_the_run_with_the_earlier_checkpoint_intact(tmp_path):
    lines = finish(tmp_path, "limit=20000")  # from step 20 on no file may grow beyond that
    name, exit_code, message = lines[-1].split(" ", 2)
    assert (name, exit_code) == ("DiskError", "2")
    assert "step_00000021.pt: File too large" in message
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000007.pt", "step_00000014.pt"]
    assert not list(tmp_path.glob("*.partial"))
    assert load_checkpoint(checkpoints(tmp_path)[-1])["step"] == 14


def test_ctrl_c_writes_a_checkpoint_and_the_old_handler_is_back_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path, progress=lambda tokens: os.kill(os.getpid(), signal.SIGINT) if tokens == 640 else None)
    with pytest.raises(InterruptedRunError, match=r"Ctrl-C after step 6 of 12; checkpoint .*step_00000006\.pt"):
        run.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint_step(tmp_path) == 6
    assert_same_weights(trainer(tmp_path).fit(resume=True), trainer(tmp_path / "whole").fit())


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_unless_nohup_has_it_ignored(ignored, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        run = trainer(tmp_path, progress=lambda tokens: os.kill(os.getpid(), signal.SIGHUP) if tokens == 640 else None)
        if ignored:
            run.fit()
        else:
            with pytest.raises(InterruptedRunError, match=r"SIGHUP after step 6 of 12; checkpoint .*00000006\.pt"):
                run.fit()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_reading_ahead_does_not_change_the_result_nor_where_a_run_resumes(tmp_path):
    plain = trainer(tmp_path / "plain", replace(SMALL, prefetch_batches=0)).fit()
    ahead = trainer(tmp_path / "ahead", replace(SMALL, prefetch_batches=5)).fit()
    assert_same_weights(plain, ahead)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_no_batch_is_read_that_is_not_trained_on(tmp_path):
    toy = Toy(batch=SMALL.batch_tokens)
    trainer(tmp_path, replace(SMALL, prefetch_batches=5), toy).fit()
    assert toy.served == 12


def test_ctrl_c_does_not_wait_for_rows_that_do_not_come(tmp_path):
    class Stuck(Toy):
        def next(self):
            if self.served == 5:
                release.wait(60)
            return super().next()

    release, started = threading.Event(), time.monotonic()
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(InterruptedRunError, match=r"Ctrl-C after step 5 of 12; checkpoint .*step_00000005\.pt"):
        trainer(tmp_path, toy=Stuck(batch=128)).fit()
    assert time.monotonic() - started < 30
    release.set()
    assert_same_weights(trainer(tmp_path).fit(resume=True), trainer(tmp_path / "whole").fit())


def test_an_error_of_the_source_reaches_the_caller_from_the_reading_thread():
    class Broken(Toy):
        def next(self):
            raise ShapeError("the shard is gone")

    with Prefetcher(Broken(), 2, 10) as batches, pytest.raises(ShapeError, match="the shard is gone"):
        batches.next()


def test_a_finished_run_is_not_trained_again_and_gives_the_same_weights(tmp_path):
    first = trainer(tmp_path).fit()
    rows = []
    again = trainer(tmp_path, log=rows.append).fit(resume=True)
    assert rows == []
    assert_same_weights(first, again)
    assert again.training == first.training
    with pytest.raises(ConfigError, match=r"already holds step_00000012\.pt; resume it or take another folder"):
        trainer(tmp_path).fit()


def test_resuming_with_other_settings_or_other_rows_names_the_difference(tmp_path):
    trainer(tmp_path).fit()
    for change, message in (
        ({"lr": 2e-3}, r"lr: 0\.001 there, 0\.002 now"),
        ({"tokens": 24 * 128}, "tokens: 1536 there, 3072 now"),
        ({"seed": 1, "auxk_coef": 0.5}, "auxk_coef: 0.03125 there, 0.5 now; seed: 0 there, 1 now"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, replace(SMALL, **change)).fit(resume=True)
    toy = Toy(batch=128)
    other = toy.statistics() | {"hook": "blocks.7.hook_mlp_out", "variance": 5.0}
    with pytest.raises(
        ConfigError, match=r"activation_variance: .* 5\.0 now; hook: 'blocks\.0\.hook_resid_post' there"
    ):
        Trainer(SMALL, toy, **other, folder=tmp_path).fit(resume=True)
    free = replace(SMALL, log_steps=1, checkpoint_steps=0, keep_last=9, prefetch_batches=0, encoder_dtype="float32")
    trainer(tmp_path, free).fit(resume=True)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer(tmp_path, replace(SMALL, checkpoint_steps=2, keep_last=3)).fit()
    assert [int(path.stem[5:]) for path in checkpoints(tmp_path)] == [8, 10, 12]
    assert checkpoint_step(tmp_path / "nothing") == 0


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        DivergedError,
        match=r"loss is nan at step 10, whose batch of 128 rows ends in the data at served 10 .*checkpoint: .*step_00000008\.pt; ",
    ):
        trainer(tmp_path, toy=Toy(batch=128, poison=10)).fit()
    assert all(bool(t.isfinite().all()) for t in load_checkpoint(checkpoints(tmp_path)[-1])["model"].values())
    with pytest.raises(DivergedError, match="none yet"):
        trainer(tmp_path / "early", toy=Toy(batch=128, poison=1)).fit()


class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_a_checkpoint_that_is_damaged_or_hostile_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path / "run").fit()
    newest = checkpoints(tmp_path / "run")[-1]
    good = newest.read_bytes()
    for damaged in (good[: len(good) // 2], b"", pickle.dumps(Payload(), protocol=2)):
        newest.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"step_00000012\.pt cannot be read .*; delete it"):
            trainer(tmp_path / "run").fit(resume=True)
    torch.save({"x": Payload()}, newest)
    with pytest.raises(FormatError, match=r"cannot be read \(it holds other things than tensors and text\); delete it"):
        trainer(tmp_path / "run").fit(resume=True)
    torch.save({"format": "other"}, newest)
    with pytest.raises(FormatError, match="is not a ggscope-training file"):
        trainer(tmp_path / "run").fit(resume=True)
    assert not (tmp_path / "PWNED").exists()
    newest.unlink()
    assert_same_weights(trainer(tmp_path / "run").fit(resume=True), trainer(tmp_path / "other").fit())
