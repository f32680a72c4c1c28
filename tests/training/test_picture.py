"""The picture of a training, of few rows and of many."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.training.picture import draw_training, read_rows

ROW = {"fvu": 0.6, "l0": 32.0, "dead": 0, "lr": 0.001, "tokens_per_s": 9e3, "wait_share": 0.0}


def drawn(folder, rows):
    """The picture without its frame of text: 2 x 3 panels, each the number of pixels in the colour of the line."""
    from matplotlib import colormaps
    from matplotlib.image import imread

    lines = [json.dumps(ROW | row | {"tokens": 2048 * (i + 1)}) for i, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    draw_training(folder, [""], folder / "metrics.png", {})
    image = imread(folder / "metrics.png")[:, :, :3]
    line = np.abs(image - np.array(colormaps["viridis"](0.0)[:3])).max(axis=2) < 0.02
    height, width = line.shape
    return np.array([[part.sum() for part in np.split(row, [width // 3, 2 * width // 3], axis=1)]
                     for row in np.split(line, [height // 2])])  # fmt: skip


@pytest.mark.parametrize("rows", [[{}], [{}, {"fvu": 0.5}], [{"fvu": 0.9**i} for i in range(100)]], ids=len)
def test_every_panel_shows_its_rows_however_few(tmp_path, rows):
    assert (drawn(tmp_path, rows) > 15).all()


def test_a_number_that_is_not_finite_leaves_the_rest(tmp_path):
    assert (drawn(tmp_path, [{}, {"fvu": float("inf")}, {"fvu": 0.5}]) > 15).all()


def test_a_line_that_is_no_row_is_left_out(tmp_path):
    row = json.dumps(ROW | {"tokens": 1}).encode()
    junk = [b"5", b'"x"', b"[1]", b"null", b'{"step": 5}', b"\xff", row.replace(b"0.6", b'"x"'), row[:20]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([row, *junk, row]) + b"\n")
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW | {"tokens": 1}] * 2
