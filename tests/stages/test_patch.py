"""What `ggscope patch` draws and warns about."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.lenses.patching import PatchResult
from pipeline.stages.patch import picture


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
