"""Training that is cut in two, starts from odd weights, or finds no memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.errors import OutOfMemoryError
from sae.untrained import untrained_weights

from .test_trainer import SMALL, trainer
from .toy import D, Toy


def test_a_row_that_a_kill_cut_in_two_is_that_of_an_undisturbed_run(tmp_path):
    config = replace(SMALL, log_steps=6, dead_after_tokens=2 * 128, lr=3e-2, init_scale=1.0)

    def with_dead_latents(folder, **extra):
        run = trainer(folder, config, **extra)
        with torch.no_grad():
            run.model.W_enc_FD[::2] *= 0.2
        return run

    def numbers(row):
        return {name: value for name, value in row.items() if name not in ("tokens_per_s", "wait_share")}

    def stop(tokens):
        if tokens == 5 * 128:  # the checkpoint of step 4 is there, the row of step 6 is not
            raise RuntimeError("stopped")

    whole, rows = [], []
    with_dead_latents(tmp_path / "whole", log=whole.append).fit()
    with pytest.raises(RuntimeError, match="stopped"):
        with_dead_latents(tmp_path / "cut", log=rows.append, progress=stop).fit()
    assert rows == []
    trainer(tmp_path / "cut", config, log=rows.append).fit(resume=True)
    assert [numbers(row) for row in rows] == [numbers(row) for row in whole]
    assert [row["step"] for row in rows] == [6, 12]
    assert min(rows[0][name] for name in ("revived", "auxk_loss")) > 0


@pytest.mark.parametrize(
    ("kernel", "optimizer"), [("native", "adam"), ("torch", "adam"), ("torch", "signum"), ("torch", "muon")]
)
def test_a_decoder_row_of_zeros_in_the_sae_to_start_from_stays_and_harms_nothing(tmp_path, kernel, optimizer):
    config, toy = replace(SMALL, kernel=kernel, optimizer=optimizer), Toy(batch=128)
    start = untrained_weights(D, 64, 4, seed=0, sample_ND=toy.rows(2000, 7), **toy.statistics())
    start.W_dec_FD[5], start.b_enc_F[5] = 0, -1e6  # it never fires
    weights = trainer(tmp_path, config, toy, start=replace(start, variant="threshold", threshold_F=np.zeros(64))).fit()
    assert not weights.W_dec_FD[5].any()
    assert np.isfinite(weights.W_dec_FD).all()
    np.testing.assert_allclose(np.linalg.norm(np.delete(weights.W_dec_FD, 5, 0), axis=1), 1, rtol=1e-5)


def test_no_memory_for_a_checkpoint_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_arguments):
        raise MemoryError

    monkeypatch.setattr("sae.checkpoint_torch.torch.save", full)
    with pytest.raises(
        OutOfMemoryError, match=r"while the checkpoint of step 4 was written .*lower num_latents \(64\)"
    ):
        trainer(tmp_path).fit()
