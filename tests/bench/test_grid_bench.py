"""The pieces of `python -m bench.grid` and of `bench.train --only together`, at sizes of a few kilobytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import grid, train_together
from bench.common import TRAIN_PEER_PYTHON, BenchError
from bench.grid_picture import draw
from bench.grid_runs import HOOK, Point, Runs, Settings
from bench.train_cases import Settings as TrainSettings
from convert.interop.registry import import_sae
from pipeline.config import TrainerConfig
from pipeline.store.reader import ActivationStore
from sae.runtime import decode, encode

TINY = Settings(store_rows=6000, tokens=2048, batch=256, rates=(2e-3, 8e-3), warmup_share=0.125, evaluate_tokens=1024,
                splice_tokens=1024)  # fmt: skip
POINT = Point(num_latents=512, k=16)
WITH_PEERS = pytest.mark.skipif(
    not TRAIN_PEER_PYTHON.exists(), reason="the peers' environment is not there: make bench-env"
)


def quiet(_text: str) -> None:
    pass


def quality(fvu: float, ce: float, k: float) -> dict[str, float]:
    return {"fvu": fvu, "ce_recovered": ce, "l0": k, "dead_share": 0.0, "lr": 4e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(TINY, tmp_path_factory.mktemp("grid"), POINT.num_latents, threads=1, say=quiet)


@pytest.fixture(scope="module")
def store(runs) -> ActivationStore:
    return ActivationStore(runs.store())


def test_our_side_is_searched_trained_and_measured_once(runs, store):
    found = runs.quality("ours", POINT)
    assert found["l0"] == pytest.approx(16, abs=0.5)
    assert 0 < found["fvu"] < 1
    assert found["ce_recovered"] < 1
    searched = runs.rate("ours", POINT)
    assert found["lr"] == searched["best"] == min(searched["fvu"], key=searched["fvu"].get)
    assert found["fvu"] == min(searched["fvu"].values())
    assert runs.rate("ours", Point(num_latents=1024, k=16)) == searched  # chosen at the first width
    files = {path: path.stat().st_mtime_ns for path in runs.folder.rglob("*.json")}
    assert runs.quality("ours", POINT) == found
    assert {path: path.stat().st_mtime_ns for path in runs.folder.rglob("*.json")} == files


def test_the_peers_get_the_batches_that_our_trainer_reads(runs, store):
    path, numbers = runs.rows()
    settings = TrainerConfig()
    source = store.batches(HOOK, batch_rows=TINY.batch, seed=TINY.seed, buffer_rows=settings.buffer_rows)
    x_ND = np.load(path)
    assert x_ND.dtype == np.float32
    assert np.array_equal(x_ND, np.concatenate([source.next() for _ in range(TINY.steps)]))
    all_ND = store.rows(HOOK, 0, store.n_rows)[store.column("flags") == 0].astype(np.float64)
    assert numbers["mean_norm"] == pytest.approx(np.linalg.norm(all_ND, axis=1).mean(), rel=1e-5)
    assert numbers["mean_square"] == pytest.approx((all_ND**2).sum(1).mean(), rel=1e-5)
    assert numbers["variance"] == pytest.approx(((all_ND - all_ND.mean(0)) ** 2).sum(1).mean(), rel=1e-5)


@WITH_PEERS
@pytest.mark.parametrize("library", ["sparsify", "saelens", "dictionary_learning"])
def test_what_a_peer_saves_is_what_it_trained(runs, library, store):
    folder = runs.folder / library / "saved"
    folder.mkdir(parents=True)
    said = runs._peer(library, POINT, lr=4e-3, save=str(folder))["fvu_of_first_batch"]
    weights = import_sae(folder, hook=HOOK).weights
    x_ND = np.load(runs.rows()[0])[: TINY.batch]
    x_hat_ND = decode(weights, *encode(weights, x_ND))
    error = ((x_ND.astype(np.float64) - x_hat_ND) ** 2).sum()
    assert said == pytest.approx(error / TINY.batch / runs.rows()[1]["variance"], rel=1e-4)


def test_a_command_that_fails_is_named_with_its_words(runs):
    with pytest.raises(BenchError, match=r"convert ended with 2.*nowhere"):
        runs._cli("convert", "convert.source=nowhere", run_dir=runs.folder / "fails")


def test_ratios_are_above_one_where_ours_is_better():
    topk, batchtopk = Point(num_latents=64, k=8), Point(num_latents=64, k=8, variant="batchtopk")
    found = {
        "ours": {topk: quality(0.1, 0.98, 8), batchtopk: quality(0.1, 0.9, 8)},
        "peer-1": {topk: quality(0.2, 0.96, 8)},
    }
    fvu, ce = grid.rows(found)
    assert (fvu.case, fvu.peer, fvu.ratio) == ("k8_n64_fvu", "peer-1", pytest.approx(2))
    assert (ce.case, ce.unit, ce.ratio) == ("k8_n64_ce", "CE recovered", pytest.approx(2))


def test_batchtopk_is_compared_where_the_peer_is():
    wanted = grid.points((8, 16), (64,))
    assert [point.name for point in wanted] == ["k8_n64", "k16_n64", "k8_n64_batchtopk"]
    sides = [
        side
        for side, point in grid.tasks(["ours", "sparsify", "dictionary_learning"], wanted)
        if point.variant != "topk"
    ]
    assert sides == ["ours", "dictionary_learning"]


def test_the_picture_has_a_curve_for_each_trainer(tmp_path):
    found = {
        name: {Point(num_latents=64, k=k): quality(0.5 / k, 1 - 0.1 / k, k) for k in (16, 32)}
        for name in ("ours", "peer-1")
    }
    draw(found, tmp_path / "both.png")
    draw({"ours": found["ours"]}, tmp_path / "one.png")
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_the_command_writes_the_rows_it_has_when_a_side_fails(tmp_path, monkeypatch):
    def measured(self, side, point):
        if side != "ours":
            raise BenchError("the other side went away")
        return quality(0.1, 0.9, point.k)

    monkeypatch.setattr(Runs, "quality", measured)
    monkeypatch.setattr(Runs, "version", lambda self, side: side)
    monkeypatch.setattr(grid, "TRAIN_PEER_PYTHON", Path("/"))
    target = tmp_path / "rows.json"
    assert grid.main(["--folder", str(tmp_path / "f"), "--json", str(target), "--sides", "ours", "sparsify"]) == 3
    written = json.loads(target.read_text())
    assert written["machine"]["failed"] == "the other side went away"
    assert written["machine"]["found"]["ours"]["k32_n2048"]["fvu"] == 0.1


def test_several_saes_are_compared_with_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(train_together, "cache_folder", lambda: tmp_path)
    for name, value in {"WIDTH": 32, "LATENTS": 64, "K": 4, "BATCH": 256, "SHARD_ROWS": 2048, "SAES": 2,
                        "LARGER_LATENTS": 128, "LARGER_K": 8}.items():  # fmt: skip
        monkeypatch.setattr(train_together, name, value)
    speed, waiting = train_together.rows(replace(TrainSettings(), threads=1, rounds=1), quiet, 4096)
    assert speed.case == "d32_n64_k4_b256_2saes_cold_store"
    assert speed.ratio == pytest.approx(speed.ours / speed.theirs)
    assert 0 <= waiting.ours < 1
