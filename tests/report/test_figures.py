"""The README's picture."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.report.data import TrainingCurve
from pipeline.report.figures import OWN, summary_figure

ROW = {"fvu": 0.5, "ce_recovered": 0.3}
EVALUATION = {
    "ce_recovered": 0.97,
    "same_rows": {"fvu": 0.12},
    "baselines": {"pca": ROW, "untrained": {"fvu": None, "ce_recovered": -2.0}, "zero": ROW},
}
CURVE = TrainingCurve(tokens=[0, 1e5, 2e5], fvu=[0.9, 0.3, 0.2])


def test_the_svg_shows_the_numbers_and_is_the_same_every_time(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fixed"}):
        for name in ("a.svg", "b.svg"):
            summary_figure(tmp_path / name, CURVE, EVALUATION, "SAE of tiny")
    text = (tmp_path / "a.svg").read_text()
    shown = re.sub(r"<[^>]+>", " ", text)
    for expected in ("97.0 %", "30.0 %", "-200.0 %", "0.120", "0.500", "this SAE", "k components", "SAE of tiny"):
        assert expected in shown
    assert text == (tmp_path / "b.svg").read_text()


def test_points_that_the_curve_leaves_out_are_in_its_title(tmp_path):
    import matplotlib

    long = TrainingCurve(tokens=[1e3 * i for i in range(40)], fvu=[0.5] * 40)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for curve, said in ((long, True), (CURVE, False)):
            summary_figure(tmp_path / "a.svg", curve, {}, "t")
            assert ("FVU while training, the first 5 % left out" in (tmp_path / "a.svg").read_text()) == said


def test_a_training_of_one_row_is_a_point_and_not_nothing(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    def inked(curve):
        summary_figure(tmp_path / "a.png", curve, {}, "t")
        image = imread(tmp_path / "a.png")[:, :, :3]
        return int((np.abs(image - to_rgb(OWN)).max(axis=2) < 0.02).sum())

    assert inked(None) == 0
    assert inked(TrainingCurve(tokens=[2048], fvu=[0.7])) > 20


@pytest.mark.parametrize("curve", [CURVE, None])
def test_a_png_is_written_even_without_a_curve_or_numbers(tmp_path, curve):
    summary_figure(tmp_path / "a.png", curve, EVALUATION if curve else {}, "t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
