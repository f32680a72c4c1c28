"""Schedules and counts that follow from the settings of a training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sae.errors import ConfigError
from sae.trainer import TrainConfig, Trainer

from .test_trainer import SMALL
from .toy import Toy


def test_the_learning_rate_warms_up_holds_and_decays_to_the_end():
    config = replace(SMALL, tokens=100 * 128, lr=1.0, warmup_steps=10, decay_share=0.2)
    assert [config.lr_at(step) for step in (0, 4, 9, 50, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [config.lr_at(step) for step in (90, 99)] == pytest.approx([0.5, 0.05])
    flat = replace(config, warmup_steps=0, decay_share=0.0)
    assert {flat.lr_at(step) for step in range(100)} == {1.0}


def test_a_run_shorter_than_its_warm_up_leaves_it_after_a_quarter():
    config = replace(SMALL, tokens=40 * 128, lr=1.0, warmup_steps=100, decay_share=0.0)
    assert [config.lr_at(step) for step in (0, 4, 9, 10, 39)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert replace(config, tokens=2 * 128).lr_at(0) == 1.0


@pytest.mark.parametrize(
    ("tokens", "expected"), [(10, 1), (4_000_000, 200_000), (200_000_000, 10_000_000), (10**12, 10_000_000)]
)
def test_latents_count_as_dead_after_a_share_of_the_run_or_ten_million_tokens(tokens, expected):
    settings = {"num_latents": 8, "k": 2, "tokens": tokens}
    assert TrainConfig(**settings).dead_after_tokens == expected
    assert TrainConfig(**settings, dead_after_tokens=77).dead_after_tokens == 77


def test_auxk_works_in_a_short_run_of_default_settings(tmp_path):
    rows, toy = [], Toy(batch=128)
    config = TrainConfig(num_latents=512, k=2, batch_tokens=128, tokens=60 * 128, log_steps=1, device="cpu")
    weights = Trainer(config, toy, **toy.statistics(), folder=tmp_path, log=rows.append).fit()
    assert max(row["dead"] for row in rows) > 0
    assert max(row["auxk_loss"] for row in rows) > 0
    assert weights.training["config"]["dead_after_tokens"] == 384


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 65}, "k must be at most num_latents = 64, got 65"),
        ({"k": 0}, "k must be at least 1"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"decay_share": 1.5}, "decay_share must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "betas must be two in"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_a_batch_of_one_row_has_no_scatter_for_auxk(tmp_path):
    with pytest.raises(ConfigError, match="batch_tokens must be 2 or more, or auxk_coef 0, got 1"):
        replace(SMALL, batch_tokens=1)
    config = replace(SMALL, batch_tokens=1, tokens=30, auxk_coef=0.0, dead_after_tokens=2)
    toy = Toy(batch=1)
    assert Trainer(config, toy, **toy.statistics(), folder=tmp_path).fit().training["tokens"] == 30
