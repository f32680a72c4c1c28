"""What values the settings may have: every number of every command has a range."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args, get_origin, get_type_hints

import pytest

from pipeline.config import (
    ApplyConfig,
    Config,
    EvaluateConfig,
    HookConfig,
    InterventionConfig,
    SAEConfig,
    TrainerConfig,
)
from pipeline.ranges import LEAST, MOST, check_number, check_ranges
from sae.errors import ConfigError


def number_settings(kind=Config, key=""):
    """Setting to int or float, of a list that of its items."""
    found = {}
    for field in fields(kind):
        of, name = get_type_hints(kind)[field.name], f"{key}.{field.name}".lstrip(".")
        of = get_args(of)[0] if get_origin(of) is list else of
        if is_dataclass(of):
            found |= number_settings(of, name)
        elif of in (int, float):
            found[name] = of
    return found


NUMBERS = number_settings()


def test_the_ranges_are_of_settings_that_there_are():
    assert NUMBERS.keys() >= LEAST.keys() | MOST.keys()
    check_ranges(Config())


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_without_bounds(key):
    odd = [10**20, -(10**20)] if NUMBERS[key] is int else [float("inf"), -float("inf"), float("nan"), 1e308]
    for value in odd:
        with pytest.raises(ConfigError, match=rf"^{key}=.*: expected a number of at (least|most) "):
            check_number(key, value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(sae=SAEConfig(seed=2**63)), f"sae.seed={2**63}: expected a number of at most {2**63 - 1}"),
        (Config(sae=SAEConfig(num_latents=2**31)), f"sae.num_latents={2**31}: expected a number of at most {2**31 - 1}"),
        (Config(sae=SAEConfig(prefixes=[4, 0])), "sae.prefixes=0: expected a number of at least 1"),
        (Config(sae=SAEConfig(multi_coef=1e308)), "sae.multi_coef=1e+308: expected a number of at most 1000000.0"),
        (Config(trainer=TrainerConfig(beta2=0.0)), "trainer.beta2=0.0: expected a number of at least 1e-06"),
        (Config(trainer=TrainerConfig(beta2=1.0)), "trainer.beta2=1.0: expected a number of at most 0.999999"),
        (Config(trainer=TrainerConfig(eps=1e308)), "trainer.eps=1e+308: expected a number of at most 1"),
        (Config(trainer=TrainerConfig(decay_share=1.5)), "trainer.decay_share=1.5: expected a number of at most 1"),
        (Config(evaluate=EvaluateConfig(probe_k=[1, -1])), "evaluate.probe_k=-1: expected a number of at least 1"),
        (Config(evaluate=EvaluateConfig(probe_k=[2, 1, 2])), "evaluate.probe_k names a value twice: 2, 1, 2"),
        (Config(trainer=TrainerConfig(lr_search=[0.1, 0.1])), "trainer.lr_search names a value twice: 0.1, 0.1"),
        (Config(hook=HookConfig(points=["a", "a"])), "hook.points names a value twice: a, a"),
        (
            Config(evaluate=EvaluateConfig(probe_k=[])),
            "evaluate.probe_k=[] evaluate.probe_test_share=0.2: expected one number or more, and a share below 1",
        ),
        (
            Config(apply=ApplyConfig(interventions=[InterventionConfig(coeffs=[float("nan")])])),
            "apply.interventions.coeffs=nan: expected a number of at least -3.4e+38",
        ),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_named(config, said):
    with pytest.raises(ConfigError) as refused:
        check_ranges(config)
    assert str(refused.value) == said


def test_seeds_and_counts_of_rows_may_be_large():
    check_ranges(Config(sae=SAEConfig(seed=2**63 - 1), trainer=TrainerConfig(tokens=2**40, seed=2**40)))
