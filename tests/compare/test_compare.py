"""`ggscope compare`: the numbers of manifests and evaluations, and the front."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.compare.collect import collect, front, groups, rows_measured
from pipeline.compare.picture import draw_pareto, name_points, plot, short
from pipeline.run import write_json
from sae.checkpoint import save_weights
from sae.errors import ConfigError
from tests.cli.conftest import ggscope, last_line
from tests.sae.toy import random_weights

PNG = b"\x89PNG\r\n"


def make_run(folder, name, *, k=4, fvu=0.3, status="finished", saes=("",), evaluated=None, settings=(), store="s1"):
    """A train run as `ggscope train` leaves it, and an evaluation of its first SAE."""
    run = folder / "runs" / "train" / name
    outputs, numbers = {}, {}
    for i, sae in enumerate(saes):
        sae_id = f"{name}{sae}"
        training = {"id": sae_id, "config": {"lr": 0.001 * (i + 1)} | dict(settings), "store_sha256": store}
        weights = random_weights(np.random.default_rng(i), d=8, latents=20, k=k + i, training=training)
        save_weights(run / sae / "sae", weights)
        outputs[f"sae:{sae}" if sae else "sae"] = str(run / sae / "sae")
        numbers[sae] = {
            "sae_id": sae_id,
            "fvu": fvu + i,
            "l0": float(k + i),
            "dead": 5,
            "tokens": 100,
            "tokens_per_s": 9.0,
        }
    metrics = numbers.get("", {"saes": numbers})
    write_json(run / "manifest.json", {"command": "train", "status": status, "outputs": outputs, "metrics": metrics})
    if evaluated is not None:
        other = folder / "runs" / "evaluate" / name
        other.mkdir(parents=True)
        found = evaluated | {"sae_id": f"{name}{saes[0]}"}
        write_json(other / "manifest.json", {"command": "evaluate", "status": "finished", "metrics": found})
    return run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "a", k=4, fvu=0.3, evaluated={"fvu": 0.35, "ce_recovered": 0.9, "delta_ce_nats": 0.2})
    make_run(tmp_path, "b", k=8, fvu=0.2, saes=("k8", "k9"))
    make_run(tmp_path, "c", status="failed")
    return tmp_path


def test_a_row_holds_what_manifest_sae_and_evaluation_say(runs):
    rows, unfinished = collect([])
    assert unfinished == ["c"]
    assert [row.name for row in rows] == ["a", "b/k8", "b/k9"]
    a, _, last = rows
    assert (a.k, a.num_latents, a.lr, a.fvu, a.l0, a.dead_share, a.tokens) == (4, 20, 0.001, 0.3, 4.0, 0.25, 100)
    assert (a.held_out_fvu, a.ce_recovered, a.delta_ce_nats, a.variant) == (0.35, 0.9, 0.2, "topk")
    assert (last.k, last.lr, last.fvu, last.ce_recovered) == (9, 0.002, 1.2, None)
    assert [row.name for row in collect(["runs/train/b", "runs/train"])[0]] == ["b/k8", "b/k9", "a"]  # none twice
    assert (a.kind, a.held_out_l0) == ("sae", None)
    with pytest.raises(ConfigError, match="runs/report: expected a train run"):
        collect(["runs/report"])


def test_an_evaluation_elsewhere_is_named_beside_the_runs(runs, tmp_path):
    for sae, fvu in (("bk8", 0.25), ("a", 0.5)):
        metrics = {"fvu": fvu, "ce_recovered": 0.8, "delta_ce_nats": 0.1, "sae_id": sae}
        (tmp_path / "ev" / sae).mkdir(parents=True)
        write_json(
            tmp_path / "ev" / sae / "manifest.json", {"command": "evaluate", "status": "finished", "metrics": metrics}
        )
    older = {"command": "evaluate", "status": "finished", "metrics": {"fvu": 0.9, "sae_id": "a"}}
    (tmp_path / "ev" / "Z-older").mkdir()  # before "a": folders are named by the time
    write_json(tmp_path / "ev" / "Z-older" / "manifest.json", older)
    (tmp_path / "ev" / "killed").mkdir()
    killed = {"command": "evaluate", "status": "failed", "metrics": {"fvu": 0.1, "sae_id": "bk9"}}
    write_json(tmp_path / "ev" / "killed" / "manifest.json", killed)
    of_b = collect(["runs/train/b", "ev/bk8"])[0]
    assert [(row.name, row.held_out_fvu) for row in of_b] == [("b/k8", 0.25), ("b/k9", None)]
    assert {row.name: row.held_out_fvu for row in collect(["ev/a"])[0]} == {"a": 0.5, "b/k8": None, "b/k9": None}
    assert {row.name: row.held_out_fvu for row in collect(["ev"])[0]} == {"a": 0.5, "b/k8": 0.25, "b/k9": None}
    assert [row.held_out_fvu for row in collect(["runs/train/b", "ev"])[0]] == [0.25, None]


def test_the_training_of_a_whole_run_is_found_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected train runs in runs/train or runs/run, found none"):
        collect([])
    place = tmp_path / "runs" / "run" / "now"
    place.mkdir(parents=True)
    write_json(place / "manifest.json", {"command": "run", "status": "failed"})
    make_run(tmp_path, "train").rename(place / "train")
    manifest = json.loads((place / "train" / "manifest.json").read_text())
    write_json(place / "train" / "manifest.json", manifest | {"outputs": {"sae": str(place / "train" / "sae")}})
    for places in ([], ["runs/run"], ["runs/run/now"], ["runs/run/now/train"]):
        assert [row.name for row in collect(places)[0]] == ["now/train"]
    make_run(tmp_path, "a")
    assert [row.name for row in collect([])[0]] == ["a", "now/train"]


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in rng.integers(0, 8, (12, 2))]
        unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        assert front(points) == sorted(unbeaten)


def test_table_json_and_picture(runs):
    done = ggscope("compare", cwd=runs)
    assert "left out, not finished: c" in done.stderr
    assert "3 SAEs, 1 of them evaluated" in done.stdout
    assert "lowest FVU 0.2000 at L0 8.0: b/k8" in done.stdout
    assert "25.0%" in done.stdout
    (folder,) = runs.glob("runs/compare/*")
    assert (folder / "pareto.png").read_bytes().startswith(PNG)
    as_json = json.loads(ggscope("compare", "runs/train/b", "format=json", cwd=runs).stdout)
    assert [row["k"] for row in as_json] == [8, 9]
    assert as_json == [row for row in json.loads((folder / "compare.json").read_text()) if row["name"] != "a"]
    assert "expected a train run" in last_line(ggscope("compare", "nowhere", cwd=runs, code=2))


def test_an_sae_without_a_scale_for_ce_recovered_counts_as_evaluated(tmp_path):
    make_run(tmp_path, "g", evaluated={"fvu": 0.35, "ce_recovered": None, "delta_ce_nats": 0.01})
    done = ggscope("compare", cwd=tmp_path)
    assert "1 SAE, 1 of them evaluated" in done.stdout
    assert "0.0100" in done.stdout


def test_points_are_named_by_what_differs(runs, tmp_path):
    rows, _ = collect(["runs/train/b"])
    assert [short(row, rows) for row in rows] == ["k8", "k9"]
    draw_pareto({"": rows[:1]}, tmp_path / "one.png")  # a single point, none evaluated
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_saes_of_other_rows_stand_apart(runs):
    make_run(runs, "d", fvu=0.01, store="s2")
    make_run(runs, "e", fvu=0.02, store="s2")
    found = groups(collect([])[0])
    assert {name.split(", ")[1]: [row.name for row in rows] for name, rows in found.items()} == {
        "store s1": ["a", "b/k8", "b/k9"],
        "store s2": ["d", "e"],
    }
    done = ggscope("compare", cwd=runs)
    assert "5 SAEs, 1 of them evaluated; 2 hook points or stores, whose FVU do not compare" in done.stdout
    assert "store s1: lowest FVU 0.2000 at L0 8.0: b/k8; " in done.stdout
    assert "store s2: lowest FVU 0.0100 at L0 4.0: d\n" in done.stdout


def test_held_out_numbers_stand_over_the_l0_they_were_measured_at(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: drawn.append(figure))
    found = {"fvu": 0.3, "ce_recovered": 0.8, "delta_ce_nats": 0.1, "l0": 5.5}
    for name, k in (("d", 4), ("e", 8)):
        make_run(runs, name, k=k, store="s2", evaluated=found | {"l0": k + 1.5})
    rows = [row for row in collect([])[0] if row.name in "de"]
    assert [(row.l0, row.held_out_l0) for row in rows] == [(4.0, 5.5), (8.0, 9.5)]
    draw_pareto({"": rows}, tmp_path / "a.png")
    for ax in drawn[0].axes:
        assert sorted(point[0] for found in ax.collections for point in found.get_offsets().tolist()) == [5.5, 9.5]
    table = ggscope("compare", cwd=runs).stdout
    assert "held-out L0" in table
    assert "5.5" in table


def test_rows_are_the_same_where_model_text_seed_and_counts_are():
    def manifest(sha256="m", paths=("a.txt",), seed=0, rows=100, splice_rows=50, fvu=0.3):
        return {
            "inputs": {"model": {"sha256": sha256}},
            "config": {"corpus": {"paths": list(paths)}, "evaluate": {"seed": seed}},
            "metrics": {"rows": rows, "splice_rows": splice_rows, "fvu": fvu},
        }

    changes = [{"sha256": "n"}, {"paths": ["b.txt"]}, {"seed": 1}, {"rows": 101}, {"splice_rows": 51}]
    assert rows_measured(manifest()) == rows_measured(manifest(fvu=0.2))
    assert len({rows_measured(manifest(**change)) for change in [{}, *changes]}) == 6


def test_saes_that_were_evaluated_on_other_rows_get_a_warning_and_no_front(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: drawn.append(figure))
    found = {"fvu": 0.3, "ce_recovered": 0.8, "delta_ce_nats": 0.1, "rows": 100, "splice_rows": 90}
    for name, k, changes in (("d", 4, {}), ("e", 8, {"fvu": 0.2, "ce_recovered": 0.9})):
        make_run(runs, name, k=k, store="s2", evaluated=found | changes)
    assert "evaluated on different held-out rows" not in ggscope("compare", cwd=runs).stderr
    rows = [row for row in collect([])[0] if row.name in "de"]
    draw_pareto({"": rows}, tmp_path / "a.png")
    assert [len(ax.lines) for ax in drawn[0].axes] == [1, 1]
    make_run(runs, "f", store="s2", evaluated=found | {"splice_rows": 80})
    said = ggscope("compare", cwd=runs).stderr.replace("\n", " ")
    assert "evaluated on different held-out rows" in said
    assert said.count("warning") == 1  # of that group
    draw_pareto({"": [row for row in collect([])[0] if row.name in "def"]}, tmp_path / "a.png")
    assert [len(ax.lines) for ax in drawn[1].axes] == [0, 0]


def test_a_variant_without_k_shows_none(runs):
    make_run(runs, "f", settings={"variant": "relu"})
    row = next(row for row in collect([])[0] if row.name == "f")
    assert (row.variant, row.k) == ("relu", None)


@pytest.mark.parametrize("inches", [3, 6])
def test_names_beside_points_cover_neither_each_other_nor_a_point_and_stay_in_the_panel(runs, inches):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (row, *_), _ = collect(["runs/train/a"])
    rows = [
        replace(row, name=f"run-k{k}-a_longer_name-seed{s}", l0=float(k), fvu=0.1 + s / 1e4)
        for k in (8, 9)
        for s in range(4)
    ]
    figure = Figure(figsize=(inches, 5))
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    points = plot(ax, rows, "fvu", lower_is_better=True)
    figure.draw_without_rendering()
    name_points(ax, points)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) >= 6
    panel = ax.bbox
    assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 for box in boxes)
    assert all(panel.y0 <= box.y0 and box.y1 <= panel.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(
        box.contains(*point) for box in boxes for point in ax.transData.transform([(r.l0, r.fvu) for r in rows])
    )


def test_a_dozen_saes_are_all_named_inside_their_panel(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: drawn.append(figure))
    (row, *_), _ = collect(["runs/train/a"])
    rows = [
        replace(
            row, name=f"2026-01-31_12-00-{n}-n{n}-k{k}", l0=float(k), held_out_fvu=0.9 / (k * n) ** 0.3, num_latents=n
        )
        for n in (256, 1024, 4096)
        for k in (8, 16, 32, 64)
    ]
    draw_pareto({"": rows}, tmp_path / "a.png")
    panel = drawn[0].axes[0]
    assert len(panel.texts) == 12
    for text in panel.texts:
        box = text.get_window_extent()
        assert panel.bbox.x0 <= box.x0
        assert box.x1 <= panel.bbox.x1


def test_the_legend_names_a_front_only_where_one_is_drawn(runs):
    from matplotlib.figure import Figure

    (row, *_), _ = collect(["runs/train/a"])
    for rows, there in (([row], False), ([row, replace(row, l0=9.0, fvu=0.1)], True)):
        ax = Figure().subplots()
        plot(ax, rows, "fvu", lower_is_better=True)
        assert ("front" in ax.get_legend_handles_labels()[1]) == there == bool(ax.lines)
