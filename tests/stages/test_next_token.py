"""What `ggscope heads` and `ggscope latents` show of their results."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.lenses.heads import HeadsResult
from pipeline.lenses.latents import LatentsResult
from pipeline.lenses.next_token import NextToken
from pipeline.stages import heads, latents
from pipeline.stages.next_token import said, title, with_text
from tests.interventions.tiny import tiny, token, write_tiny_llama

SELF, NOT, NAME = (token(word) for word in (" self", " not", "$"))
TARGET = NextToken(tokens=np.array([0, NOT, SELF]), answer=SELF, wrong=None, likeliest=NOT, plain=-1.5)


def of_heads(**more):
    return HeadsResult(
        target=TARGET, blocks=(1, 5), counts=(2, 1), effect_LH=np.array([[0.25, -2.0], [1.0, np.nan]]),
        kl_LH=np.array([[0.1, 0.2], [0.3, np.nan]]), likeliest_LH=np.array([[NOT, SELF], [NOT, -1]]), by_mean=False, **more,
    )  # fmt: skip


def of_latents(count=3):
    return LatentsResult(
        target=TARGET, active=9, latents_N=np.arange(count) + 7, activation_N=np.arange(count) + 0.5,
        position_N=np.arange(count)[::-1] % 3, tokens_N=np.ones(count, int), effect_N=np.arange(count) - 1.75,
        kl_N=np.arange(count) / 10, likeliest_N=np.array([SELF] + [NOT] * (count - 1)),
    )  # fmt: skip


def cells(table):
    """Rows of a table as plain text, and whether they are in bold."""
    rows = zip(*([cell.plain for cell in column._cells] for column in table.columns), strict=True)
    return [(*row, shown.style == "bold") for row, shown in zip(rows, table.rows, strict=True)]


def test_the_table_has_the_strongest_heads_and_in_bold_those_that_change_the_token():
    found = cells(heads.table(tiny()[0], of_heads(), 2))
    assert found == [("L1H1", "-2.000", "0.200", "' self'", True), ("L5H0", "+1.000", "0.300", "' not'", False)]


def test_the_table_of_latents_names_the_token_of_the_largest_activation():
    found = cells(latents.table(tiny()[0], of_latents(), {7: "a" * 41, 9: "b" * 40}, 2))
    first = (f"7 ({'a' * 39}…)", "-1.750", "0.000", "' self'", "0.50", "' self' at 2", True)
    assert found == [first, ("8", "-0.750", "0.100", "' not'", "1.50", "' not' at 1", False)]
    assert latents.named(9, {9: "b" * 40}) == f"9 ({'b' * 40})"


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("by_mean", [False, True])
def test_the_picture_has_a_grid_of_effects_and_one_of_divergence(by_mean):
    result = dataclasses.replace(of_heads(), by_mean=by_mean)
    figure = heads.picture(result, "of ' $'")
    left, right = figure.axes[:2]
    np.testing.assert_array_equal(left.images[0].get_array().filled(np.nan), result.effect_LH)
    np.testing.assert_array_equal(right.images[0].get_array().filled(np.nan), result.kl_LH)
    assert left.images[0].get_clim() == (-2, 2)
    assert labels(left.yaxis) == ["1", "5"]
    assert labels(left.xaxis) == ["0", "1"]
    off = "its mean in place of what it writes" if by_mean else "off"
    assert figure.texts[0].get_text() == rf"each head {off}: of ' \$'"


def test_the_bars_are_the_strongest_latents_from_the_top():
    figure = latents.picture(of_latents(50), {56: "$x"}, "of ' $'")
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches[:2]] == [47.25, 46.25]
    assert len(left.patches) == len(right.patches) == latents.MOST_BARS
    assert labels(left.yaxis)[:2] == [r"56 (\$x)", "55"]
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert figure.texts[0].get_text() == r"each latent off: of ' \$'"


def test_what_is_looked_at_is_said_in_words():
    model, pair = tiny()[0], dataclasses.replace(TARGET, wrong=NAME)
    assert said(model, TARGET) == "log-probability ' self'"
    assert said(model, pair) == "logit difference ' self' - '$'"
    assert title(model, TARGET) == "log-probability ' self': -1.500, likeliest next token ' not'"
    shown = with_text(model, of_heads().to_dict(), "heads")
    assert (shown["answer_text"], shown["wrong_text"], shown["likeliest_text"]) == (" self", None, " not")
    assert shown["answer"] == TARGET.answer
    assert shown["text"][1:] == [" not", " self"]
    assert [one["likeliest_text"] for one in shown["heads"]] == [" not", " self", " not"]
    assert with_text(model, pair.to_dict() | {"heads": []}, "heads")["wrong_text"] == "$"


def test_only_the_blocks_that_are_named_are_swept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    write_tiny_llama(tmp_path / "tiny.gguf")
    assert main(["heads", "--prompt", "x", "heads.blocks=[3]", "model.path=tiny.gguf", "model.n_threads=1"]) == 0
    out = capsys.readouterr().out
    assert "4 heads" in out
    assert "L3H" in out
    assert "L0H" not in out
    assert main(["heads", "model.path=tiny.gguf"]) == 2
    assert "expected a prompt: --prompt TEXT" in capsys.readouterr().err
