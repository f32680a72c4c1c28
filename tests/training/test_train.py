"""`ggscope train` with several SAEs, with a search for the learning rate, and what it leaves in the run folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipeline.config import Config, SAEConfig, TogetherConfig, TrainerConfig
from pipeline.run import read_manifest
from pipeline.training.settings import train_configs
from sae.checkpoint import load_weights
from sae.errors import ConfigError
from sae.train_config import TrainConfig
from tests.cli.conftest import ggscope, last_line

from .conftest import TRAIN

PNG = b"\x89PNG\r\n"


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "freq_F")
    )


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("together") / "run"
    done = ggscope("train", *TRAIN, "together.k=[3,5]", "together.seed=[0,1]", f"run_dir={run}", cwd=folder)
    return run, done


def test_several_saes_are_to_the_bit_those_of_runs_of_their_own(together, folder, tmp_path):
    run, done = together
    names = ["k3-seed0", "k3-seed1", "k5-seed0", "k5-seed1"]
    assert "4 SAEs, 7,680 tokens" in done.stdout
    manifest = read_manifest(run)
    assert list(manifest["metrics"]["saes"]) == names
    for name in names:
        weights = load_weights(manifest["outputs"][f"sae:{name}"])
        numbers = manifest["metrics"]["saes"][name]
        rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
        assert (numbers["sae_id"], numbers["fvu"]) == (weights.training["id"], rows[-1]["fvu"])
        seconds = sum(rows[0]["tokens"] / row["tokens_per_s"] for row in rows)  # of rows of equally many steps
        assert numbers["tokens_per_s"] == pytest.approx(7680 / seconds, rel=0.05)
        assert numbers["kernel"] in ("torch", "native")
        assert numbers["threads"] == 1
    assert (run / "metrics.png").read_bytes().startswith(PNG)
    alone = tmp_path / "alone"
    ggscope("train", *TRAIN, "sae.k=5", "sae.seed=1", f"run_dir={alone}", cwd=folder)
    assert same(load_weights(alone / "sae"), load_weights(run / "k5-seed1" / "sae"))
    assert not same(load_weights(alone / "sae"), load_weights(run / "k5-seed0" / "sae"))


def test_two_ranks_of_torchrun_share_a_run_folder(folder, tmp_path):
    runs = {kind: tmp_path / kind for kind in ("data", "latent")}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "pipeline.cli",
    ]
    said, starts = "", [(f"trainer.parallel={kind}", f"run_dir={run}", 0) for kind, run in runs.items()]
    for kind, where, code in (*starts, ("trainer.parallel=data", "trainer.seed=1", 1)):
        command = [*torchrun, "train", *TRAIN, kind, where]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        said = done.stderr
        assert done.returncode == code, said
    assert "under torchrun: expected `train` with run_dir=FOLDER" in said
    one = tmp_path / "one"
    ggscope("train", *TRAIN, f"run_dir={one}", cwd=folder)
    expected = json.loads((one / "manifest.json").read_text())["metrics"]
    for run in runs.values():
        manifest = json.loads((run / "manifest.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
        assert manifest["status"] == "finished"
        assert manifest["metrics"]["fvu"] == pytest.approx(expected["fvu"], rel=1e-2)
        a, b = (load_weights(place / "sae").W_dec_FD for place in (run, one))
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def test_a_later_stage_asks_which_of_several_saes_is_meant(together, folder, tmp_path):
    shutil.copytree(together[0], tmp_path / "runs" / "train" / "2026-01-01_00-00-00")
    done = ggscope("convert", cwd=tmp_path, code=2)
    assert "holds 4 SAEs; choose one with convert.source=" in last_line(done)


def test_a_search_trains_as_if_its_rate_had_been_given(folder, tmp_path):
    run, given = tmp_path / "run", tmp_path / "given"
    rates = "trainer.lr_search=[1e-4,3e-3]"
    done = ggscope("train", *TRAIN, rates, "trainer.lr_search_share=0.2", f"run_dir={run}", cwd=folder)
    assert "lr 0.003 taken: the lowest FVU after 1,536 tokens" in " ".join(done.stderr.split())
    manifest = json.loads((run / "manifest.json").read_text())
    found = manifest["metrics"]["lr_search"]
    assert found == json.loads((run / "lr_search.json").read_text())[""]
    assert found["best"] == 0.003
    assert (run / "metrics.png").read_bytes().startswith(PNG)
    ggscope("train", *TRAIN, "trainer.lr=0.003", f"run_dir={given}", cwd=folder)
    assert same(load_weights(run / "sae"), load_weights(given / "sae"))
    assert load_weights(run / "sae").training["config"]["lr"] == 0.003


def test_the_best_checkpoint_becomes_an_sae_of_its_own_where_it_is_not_the_last(folder, tmp_path):
    run = tmp_path / "run"
    falling = ["sae.k_start=64", "sae.k_anneal_share=1"]  # from 64 to 4 latents: FVU rises towards the end
    options = ["trainer.save_best=true", "trainer.checkpoint_steps=15", "trainer.log_steps=15", f"run_dir={run}"]
    ggscope("train", *TRAIN, *falling, *options, cwd=folder)
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert list(rows) == [15, 30, 45, 60]
    best_step = min(rows, key=lambda step: rows[step]["fvu"])
    assert best_step != 60
    last, best = load_weights(run / "sae"), load_weights(run / "sae_best")
    assert (best.training["step"], last.training["step"]) == (best_step, 60)
    assert best.training["metrics"]["fvu"] == rows[best_step]["fvu"]
    assert best.training["id"] != last.training["id"]
    assert read_manifest(run)["outputs"]["sae_best"] == str(run / "sae_best")


def test_several_variants_train_together_each_as_alone(folder, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    ggscope("train", *TRAIN, "together.variant=[topk,gated]", f"run_dir={run}", cwd=folder)
    saes = {name: load_weights(run / name / "sae") for name in ("topk", "gated")}
    assert {name: w.training["config"]["variant"] for name, w in saes.items()} == {"topk": "topk", "gated": "gated"}
    ggscope("train", *TRAIN, "sae.variant=gated", f"run_dir={alone}", cwd=folder)
    found = load_weights(alone / "sae")
    assert same(found, saes["gated"])
    assert np.array_equal(found.threshold_F, saes["gated"].threshold_F)


def test_names_are_what_the_saes_differ_in():
    config = Config(
        sae=SAEConfig(num_latents=64, k=4), trainer=TrainerConfig(seed=7),
        together=TogetherConfig(num_latents=[64, 128], k=[8], lr=[1e-3, 0.002]),
    )  # fmt: skip
    configs = train_configs(config)
    assert list(configs) == ["n64-lr0.001", "n64-lr0.002", "n128-lr0.001", "n128-lr0.002"]
    wide = configs["n128-lr0.002"]
    assert (wide.num_latents, wide.k, wide.lr, wide.seed) == (128, 8, 0.002, 7)
    (only,) = train_configs(Config(sae=SAEConfig(seed=3))).items()
    assert (only[0], only[1].seed) == ("", 3)


def test_without_settings_the_command_trains_as_the_library_does():
    (found,) = train_configs(Config()).values()
    assert found == TrainConfig(num_latents=found.num_latents, k=found.k)
    assert found.betas == (0.8, 0.999)  # docs/conventions.md


def test_settings_of_several_saes_that_cannot_work_are_named():
    for change, message in (
        ({"together": TogetherConfig(k=[4, 4])}, r"together\.k names a value twice: 4, 4"),
        ({"together": TogetherConfig(k=[4, 9999])}, "k must be at most num_latents = 4096, got 9999"),
        ({"together": TogetherConfig(lr=[1.0, 2.0]), "trainer": TrainerConfig(lr_search=[1.0, 2.0])}, "got both"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_configs(Config(**change))


def test_run_trains_one_sae(folder):
    assert "takes one SAE" in last_line(ggscope("run", "together.k=[3,5]", cwd=folder, code=2))
