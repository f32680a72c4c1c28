"""What `ggscope patch` draws and warns about."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.lenses.patching import PatchResult
from pipeline.stages import patch as stage
from pipeline.stages.patch import picture, table


def result_of(grid_LP, positions, **more):
    return PatchResult(
        site="hook_resid_post", blocks=(2, 5), positions=positions, grid_LP=grid_LP, clean_difference=1.0,
        corrupted_difference=-1.0, clean_tokens=np.arange(4), corrupted_tokens=np.arange(4), answer=1, wrong=2, **more,
    )  # fmt: skip


def test_the_table_has_the_last_block_first_and_both_tokens_where_they_differ():
    grid_LP = np.array([[0.6, -0.001], [np.nan, 0.2]])
    words = ["a", "b", "$", "d"], ["a", "c", "$", "d"]
    shown = table(result_of(grid_LP, (1, 3)), *words)
    assert [str(column.header) for column in shown.columns] == ["block", "b | c", "d"]
    rows = list(zip(*([str(cell) for cell in column._cells] for column in shown.columns), strict=True))
    assert rows == [("5", "", "0.20"), ("2", "0.60", "0.00")]
    assert [cell.style for cell in shown.columns[1]._cells][1] == "bold green"
    by_head = result_of(grid_LP, (1, 3), heads=(0, 1))
    assert [str(column.header) for column in table(by_head, *words).columns][1:] == ["head 0", "head 1"]
    axes = picture(by_head, *words).axes[0]
    assert labels(axes.xaxis) == ["head 0", "head 1"]
    assert labels(axes.yaxis) == ["2", "5"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), grid_LP)
    assert labels(picture(result_of(grid_LP, (2, 3)), *words).axes[0].xaxis) == [r"\$", "d"]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_command_patches_the_site_that_is_named_and_keeps_both_differences(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")
    texts = ["--clean", "x = a", "--corrupted", "x = b", "--answer", " a", "--wrong", " b"]
    assert main(["patch", *texts, "patch.site=hook_mlp_out", "model.n_threads=1", "run_dir=made"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    values = json.loads((tmp_path / "made" / "patch.json").read_text())
    assert values["site"] == "hook_mlp_out"
    assert f"hook_mlp_out, {np.isfinite(np.array(values['grid'], float)).sum()} patches" in said
    assert (values["clean"][-1], values["corrupted"][-1]) == (" a", " b")
    metrics = json.loads((tmp_path / "made" / "manifest.json").read_text())["metrics"]
    assert metrics == {name: values[name] for name in ("clean_difference", "corrupted_difference")}
    assert f"clean {values['clean_difference']:.3f}, corrupted {values['corrupted_difference']:.3f}" in said
    for missing in range(0, 8, 2):
        assert main(["patch", *texts[:missing], *texts[missing + 2 :], "model.n_threads=1"]) == 2
        assert f"{texts[missing]} is missing" in capsys.readouterr().err


def test_patches_are_counted_without_holes_and_an_answer_that_is_no_likelier_is_warned_about(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    result = replace(result_of(np.array([[0.6, 0.1], [0.2, np.nan]]), (1, 3), heads=(0, 1)), clean_difference=0.0)
    monkeypatch.setattr(stage, "patch_sweep", lambda *_args, **_options: result)
    assert (
        main(["patch", "--clean", "a", "--corrupted", "b", "--answer", "a", "--wrong", "b", "model.n_threads=1"]) == 0
    )
    heard = capsys.readouterr()
    assert "hook_resid_post, 3 patches" in " ".join(heard.out.split())
    assert "'a' is no likelier than 'b'" in " ".join((heard.out + heard.err).split())


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("site", ["hook_resid_post", "mlp.hook_expert_weights"])
def test_the_title_fits_the_picture_however_few_the_tokens(count, site):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    result = PatchResult(
        site=site, blocks=(0, 1), positions=tuple(range(count)), grid_LP=np.zeros((2, count)),
        clean_difference=1.0, corrupted_difference=-1.0, clean_tokens=np.arange(count), corrupted_tokens=np.arange(count),
        answer=1, wrong=2,
    )  # fmt: skip
    figure = picture(result, ["$x"] * count, ["$y"] * count)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (title,) = figure.texts
    assert site in title.get_text()
    box, whole = title.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1


@pytest.mark.parametrize(("answer", "wrong", "warned"), [(" a", " b", True), (" b", " a", False)])
def test_a_clean_prompt_that_does_not_prefer_its_answer_is_warned_about(
    answer, wrong, warned, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    texts = ["--clean", "x = a", "--corrupted", "x = b", "--answer", answer, "--wrong", wrong]
    assert main(["patch", *texts, "patch.format=json", "model.n_threads=1"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (f"warning: after the clean prompt {answer!r} is no likelier than {wrong!r}" in said) == warned
