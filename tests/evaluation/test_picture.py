"""The picture shows the numbers it is given, and numbers that do not exist as a dash."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.evaluation.latents import COSINE_BINS, distribution
from pipeline.evaluation.picture import draw_evaluation


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    run = {"fvu": 0.3, "l0": 8.0, "ce_recovered": None, "delta_ce_nats": 0.5, "delta_ce_ci95": [0.4, 0.6], "kl": 0.25}
    return {
        **run, "dead_share": 0.125, "dense_share": 0.03, "splice_rows": 1234, "same_rows": {"fvu": 0.31, "l0": 8.0},
        "density_histogram": {"log10_edges": [-2.0, -1.5, -1.0, -0.5, 0.0], "counts": [3, 7, 2, 1], "dead": 2},
        "dictionary": {
            "searched": 15,
            "decoder_nearest": distribution(rng.uniform(0.2, 0.6, 15)),
            "encoder_nearest": distribution(np.full(15, np.nan)),
            "encoder_decoder_cosine": distribution(rng.uniform(-0.5, 0.9, 15)),
        },
        "baselines": {"zero": run | {"delta_ce_ci95": [None, None], "kl": None}, "mean": run},
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the panels of the figure that was written."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(result):
        draw_evaluation(tmp_path / "e.png", result, "a title")
        assert (tmp_path / "e.png").stat().st_size > 20_000
        figure = figures.pop()
        return [ax for part in figure.subfigs for ax in part.axes]

    return draw


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_histogram_has_its_counts_and_dense_latents_their_own_colour(result, drawn):
    density, *_ = drawn(result)
    assert [bar.get_height() for bar in density.patches] == [3, 7, 2, 1]
    colours = [bar.get_facecolor() for bar in density.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert "dead 12.50%\ndense 3.00%" in texts(density)


def test_the_table_shows_every_run_and_a_dash_for_what_does_not_exist(result, drawn):
    *_, table = drawn(result)
    found = texts(table)
    assert [name for name in found if name in ("this SAE", "mean ablation", "zero ablation")] == [
        "this SAE", "mean ablation", "zero ablation",
    ]  # fmt: skip
    assert found[7:14] == ["this SAE", "0.310", "8.0", "–", "0.5000", "± 0.1000", "0.2500"]
    assert found[-2:] == ["–", "–"]


def test_a_joint_run_a_matching_and_a_probe_get_their_place(result, drawn):
    result["joint"] = {"hooks": ["a", "b"], "ce_recovered": 0.5, "delta_ce_nats": 1.0, "delta_ce_ci95": [0.9, 1.1]}
    result["joint"]["ce_recovered_ci95"] = [0.4, 0.6]
    matched = {"mean": 0.81, "above_0.7": 0.64, "above_0.9": 0.09}
    result["stability"] = {"decoder": matched, "encoder": matched | {"mean": 0.42}, "shared": 0.33}
    score = {"accuracy": 0.75, "auc": 0.8}
    result["probing"] = {"ks": [1, 5], "test_texts": 40, "dense": score, "majority": {"accuracy": 0.6}}
    result["probing"] |= {f"{kind}_top_{k}": {"accuracy": 0.7 + k / 100} for kind in ("sae", "raw") for k in (1, 5)}
    *_, table, stability, probing = drawn(result)
    assert "2 SAEs together" in texts(table)
    assert "50.0% ± 10.0%" in texts(table)
    assert texts(stability) == ["0.81", "0.64", "0.09", "0.42", "0.64", "0.09"]
    assert "33% shared" in stability.get_title(loc="left")
    np.testing.assert_allclose(probing.lines[0].get_ydata(), [0.71, 0.75])
    assert "40 texts" in probing.get_title(loc="left")


def test_a_panel_of_what_was_not_measured_is_left_out(result, drawn):
    whole = drawn(result)
    del result["dictionary"]["encoder_decoder_cosine"]  # as of a transcoder
    titles = [ax.get_title(loc="left") for ax in drawn(result)]
    assert [ax.get_title(loc="left") for ax in whole if ax.get_title(loc="left") not in titles] == [
        "encoder against decoder, each latent"
    ]
    assert len(titles) == len(whole) - 1


def test_a_distribution_counts_what_is_there_and_says_nothing_of_nothing():
    values = np.array([-1, -0.99, 0.21, 0.95, 1.0000001, np.nan])
    found = distribution(values)
    assert sum(found["counts"]) == 5
    assert [found["counts"][i] for i in (0, 60, 97, 99)] == [2, 1, 1, 1]
    assert found["mean"] == pytest.approx(np.nanmean(values))
    assert found["above_0.9"] == 2 / 5
    assert found["quantiles"]["0.5"] == 0.21
    assert distribution(np.full(3, np.nan)) == {
        "mean": None, "above_0.9": None, "quantiles": {}, "counts": [0] * COSINE_BINS,
    }  # fmt: skip
