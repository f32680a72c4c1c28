"""What the settings of an intervention become, and what is said of one that changes nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import InterventionConfig
from pipeline.interventions.base import Where
from pipeline.readout import ReadoutEvent
from pipeline.stages import live
from pipeline.stages.live import LONGEST, LiveSAE, intervention, interventions, positions_of, without_rows
from sae.encoders import NumpyEncoder
from sae.errors import ConfigError
from tests.interventions.tiny import D, sae_at, tiny


def config(kind="ablate", **settings):
    return InterventionConfig(
        kind=kind, **({"latents": [3, 5]} if kind not in ("heads", "reconstruct") else {}) | settings
    )


@pytest.fixture
def saes():
    w = sae_at(1)
    opened = {
        "": LiveSAE(path=None, weights=w, encoder=NumpyEncoder(w)),
        "b": LiveSAE(path=None, weights=sae_at(2), encoder=None),
    }
    return SimpleNamespace(get=opened.__getitem__, model=tiny()[0], context=None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"positions": [4, 1]}, (4, 1)),
        ({"token_range": [2, 4]}, (2, 3, 4)),
        ({"token_range": [3, 3]}, (3,)),
        ({"token_range": [LONGEST - 2, LONGEST - 1]}, (LONGEST - 2, LONGEST - 1)),
    ],
)
def test_positions_are_named_or_a_range_with_both_its_ends(settings, expected):
    assert positions_of(config(**settings)) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"token_range": [4, 3]},
        {"token_range": [1, 2, 3]},
        {"token_range": [1]},
        {"token_range": [1, 2], "positions": [1]},
        {"token_range": [LONGEST - 1, LONGEST]},
    ],
)
def test_other_ranges_are_refused(settings):
    with pytest.raises(ConfigError, match=r"intervention\.token_range: "):
        positions_of(config(**settings))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        (config("steer", coeff=2.0), {"coeffs": (2.0, 2.0)}),
        (config("steer", coeffs=[2.0, 3.0]), {"coeffs": (2.0, 3.0)}),
        (config("clamp", value=0.0), {"values": (0.0, 0.0)}),
        (config("ablate"), {}),
        (config("reconstruct", keep_error=True), {"keep_error": True}),
        (config("reconstruct"), {"keep_error": False}),
    ],
)
def test_every_setting_reaches_the_edit(settings, numbers, saes):
    settings = replace(settings, phase="response", positions=[4, 6])
    (edit,) = intervention(settings, saes)
    assert edit.where == Where(phase="response", positions=(4, 6))
    assert edit.weights is saes.get("").weights
    assert str(edit.point) == edit.weights.hook
    assert {name: getattr(edit, name) for name in numbers} == numbers
    if settings.latents:
        assert edit.latents == (3, 5)
    if settings.kind != "steer":
        assert edit.encoder is saes.get("").encoder
    (elsewhere,) = intervention(replace(settings, hook="blocks.3.hook_resid_post", sae="b"), saes)
    assert (str(elsewhere.point), elsewhere.weights) == ("blocks.3.hook_resid_post", saes.get("b").weights)


def test_several_edits_stay_apart_and_none_is_no_edit(saes):
    groups = interventions([config(), config("none"), config("heads", heads=["L1H0", "L0H2"])], saes)
    assert [len(group) for group in groups] == [1, 2]
    for settings in (config("flip"), config("ablate", coeff=1.0), config("steer", coeffs=[1.0]), config("clamp")):
        with pytest.raises(ConfigError):
            intervention(settings, saes)


@pytest.mark.parametrize("by_mean", [False, True])
def test_heads_are_off_at_every_row_of_the_phase(by_mean, saes, monkeypatch):
    means = {0: np.zeros(D, np.float32), 2: np.ones(D, np.float32)}
    monkeypatch.setattr(live, "head_means", lambda *_: means if by_mean else None)
    settings = config("heads", heads=["L2H1", "L0H3"], phase="prompt", positions=[1, 2])
    edits = intervention(settings, saes)
    assert [(str(edit.point), edit.heads, edit.count) for edit in edits] == [
        ("blocks.0.attn.hook_z", (3,), 4),
        ("blocks.2.attn.hook_z", (1,), 4),
    ]
    assert all(edit.where == Where(phase="prompt", positions=(1, 2), flagged=True) for edit in edits)
    assert [edit.mean_D for edit in edits] == ([means[0], means[2]] if by_mean else [None, None])
    assert [edit.heads for edit in intervention(replace(settings, keep=True), saes)] == [(0, 1, 2), (0, 2, 3)]


def test_why_nothing_was_changed():
    events = [
        ReadoutEvent(pos=pos, token=5, text="x", phase=phase, flagged=True, logprob=None, readings=())
        for pos, phase in enumerate(("prompt", "prompt", "response"))
    ]
    assert without_rows(Where(), events) == "every row is the first one, BOS or a special token"
    response = without_rows(Where(phase="response"), events)
    assert response == "every row of the response is the first one, BOS or a special token"
    assert without_rows(Where(flagged=True), events) == ""
    assert without_rows(Where(positions=(2,)), events) == ""
    four, five = (without_rows(Where(positions=tuple(range(7, last))), events) for last in (11, 12))
    assert four == "no row was at 7, 8, 9, 10; the positions were 0 to 2"
    assert five == "no row was at 7, 8, 9, 10, ...; the positions were 0 to 2"
    assert without_rows(Where(phase="prompt", positions=(2,)), events).startswith("no row of the prompt was at 2;")
