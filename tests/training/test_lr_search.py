"""The search for a learning rate: on the toy, with the trainer itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import TrainerConfig
from pipeline.training.lr_search import RESULT, candidates, search, smallest_good
from sae.errors import ConfigError, DivergedError
from sae.trainer import JointTrainer, TrainConfig, Trainer
from tests.sae.toy import Toy

CONFIG = TrainConfig(num_latents=64, k=4, batch_tokens=128, tokens=100 * 128, warmup_steps=50, encoder_dtype="float32")
RATES = [1e-4, 3e-3, 1e38]


def run(folder, rates=RATES, share=0.2, configs=None, progress=lambda *_: None, resume=False):
    toy = Toy(batch=128)
    opened = []

    def open_trainer(configs, **extra):
        opened.append(JointTrainer(configs, toy, **toy.statistics(), **extra))
        return opened[-1]

    settings = TrainerConfig(lr_search=rates, lr_search_share=share)
    found = search(
        settings, configs or {"": CONFIG}, folder=folder, checkpoints=folder / "tries", open_trainer=open_trainer,
        resume=resume, progress=progress,
    )  # fmt: skip
    return found, toy, opened


def mean_fvu_of_last_quarter(lr, folder):
    rows, toy = [], Toy(batch=128)
    config = replace(CONFIG, lr=lr, tokens=20 * 128, warmup_steps=5, log_steps=1)
    Trainer(config, toy, **toy.statistics(), folder=folder, log=rows.append).fit()
    scatter = [
        ((Toy().rows(128, 0, i) - toy.statistics()["mean_D"]).astype(np.float64) ** 2).sum() for i in range(1, 21)
    ]
    error = [row["fvu"] * s for row, s in zip(rows, scatter, strict=True)]
    return sum(error[15:]) / sum(scatter[15:])


def test_the_rate_of_the_lowest_fvu_is_found_and_the_data_goes_back_to_its_start(tmp_path):
    found, toy, _ = run(tmp_path)
    expected = {str(lr): mean_fvu_of_last_quarter(lr, tmp_path / str(lr)) for lr in RATES[:2]}
    fvu = dict(found[""]["fvu"])
    assert fvu.pop("1e+38") is None
    assert fvu == pytest.approx(expected, rel=1e-4)
    assert found[""]["best"] == min(RATES[:2], key=lambda lr: expected[str(lr)]) == 3e-3
    assert found[""]["tokens"] == 20 * 128
    assert toy.served == 0
    assert json.loads((tmp_path / RESULT).read_text()) == found
    assert not (tmp_path / "tries").exists()
    again, _, opened = run(tmp_path, resume=True)
    assert (again, opened) == (found, [])  # read, not searched again


@pytest.mark.parametrize(("share", "steps", "judged"), [(0.2, 20, 5), (0.215, 22, 5), (0.09, 9, 2), (1.0, 100, 25)])
def test_a_search_takes_its_share_of_the_steps_and_judges_by_their_last_quarter(share, steps, judged):
    tries = candidates(TrainerConfig(lr_search=[1e-3, 2e-3], lr_search_share=share), {"": CONFIG})
    for config in tries.values():
        assert config.steps == steps
        assert steps - config.checkpoint_steps == judged  # the next checkpoint is the end


def test_of_rates_that_are_close_the_smallest_is_taken():
    assert smallest_good({4e-3: 0.2428, 8e-3: 0.2258, 1.6e-2: 0.2240}) == 8e-3
    assert smallest_good({4e-3: 0.1470, 8e-3: 0.1439, 1.6e-2: 0.1519}) == 8e-3
    assert smallest_good({1.6e-2: 0.3, 4e-3: 0.2}) == 4e-3


def test_each_of_several_saes_has_its_own_rate(tmp_path):
    configs = {"k4": CONFIG, "k8": replace(CONFIG, k=8)}
    found, _, opened = run(tmp_path, configs=configs)
    assert set(opened[0].learners) == {f"{name}-lr{lr}" for name in configs for lr in RATES}
    assert found["k4"] == run(tmp_path / "alone", configs={"": CONFIG})[0][""]
    assert found["k8"]["fvu"] != found["k4"]["fvu"]


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, *_):
        if done == 17 * 128:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "a", progress=stop)
    found, _, opened = run(tmp_path / "a", resume=True)
    assert found == run(tmp_path / "b")[0]
    assert opened[0].source.served == 0


def test_settings_that_make_no_search_are_named():
    for rates, share, message in (
        ([1e-3], 0.5, "at least two different learning rates"),
        ([1e-3, 1e-3], 0.5, "at least two different learning rates"),
        ([1e-3, 2e-3], 0.01, "of 100 steps are 1, too few"),
        ([1e-3, 2e-3], 0.0, "a share above 0"),
        ([1e-3, -1.0], 0.5, "lr must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            candidates(TrainerConfig(lr_search=rates, lr_search_share=share), {"": CONFIG})


def test_where_every_rate_diverges_it_stops(tmp_path):
    with pytest.raises(DivergedError, match="the loss of lr"):
        run(tmp_path, rates=[1e38, 2e38])
    assert not (tmp_path / RESULT).exists()
