"""`ggscope train trainer.source=stream`: the SAE a store would have given, whatever stops the run on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sae.checkpoint import load_weights

from .conftest import OPTIONS, POINT, ggscope

TRAIN = [
    "train", "trainer.source=stream", *OPTIONS, "sae.num_latents=128", "sae.k=4", "trainer.batch_tokens=128",
    "trainer.tokens=7680", "trainer.buffer_rows=1600", "trainer.dead_after_tokens=2000", "trainer.n_threads=1",
    "trainer.warmup_steps=5", "trainer.checkpoint_steps=10", "trainer.log_steps=10",
]  # fmt: skip

FROM_STORE = """
import json, sys
import numpy as np, torch
from pathlib import Path
from pipeline.store.reader import ActivationStore
from sae.checkpoint import save_weights
from sae.trainer import TrainConfig, Trainer
torch.set_num_threads(1)
store, pilot = ActivationStore("store"), json.loads(Path(sys.argv[1], "stream.json").read_text())["pilot"]
hook = sys.argv[2]
source = store.batches(
    hook, batch_rows=128, seed=0, buffer_rows=1600, block_starts=np.array(json.loads(sys.argv[4]))
)
config = TrainConfig(num_latents=128, k=4, batch_tokens=128, tokens=7680, dead_after_tokens=2000, warmup_steps=5,
                     checkpoint_steps=10, log_steps=10)
trainer = Trainer(config, source, mean_D=np.array(pilot["mean"]), variance=pilot["variance"], hook=hook,
                  host=store.meta.model, folder=sys.argv[3])
save_weights(Path(sys.argv[3]) / "sae", trainer.fit())
"""


def tensors(run):
    weights = load_weights(run / "sae")
    return {name: getattr(weights, name) for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "freq_F", "mean_D")}


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("straight")
    ggscope(*TRAIN, f"run_dir={run}", cwd=folder)
    return run


def test_the_sae_is_the_one_of_a_store_with_the_same_blocks(straight, store, capture, folder, tmp_path):
    starts = json.dumps(capture.header.block_starts.tolist())
    command = [sys.executable, "-c", FROM_STORE, str(straight), POINT, str(tmp_path), starts]
    subprocess.run(command, cwd=folder, check=True, timeout=100)
    streamed, expected = tensors(straight), tensors(tmp_path)
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "freq_F"):
        np.testing.assert_array_equal(streamed[name], expected[name], err_msg=name)
    stats = store.stats(POINT)
    assert stats.count < 7680  # more than an epoch
    weights = load_weights(straight / "sae")
    np.testing.assert_allclose(weights.mean_D, stats.mean_D, rtol=1e-6)
    assert weights.variance == pytest.approx(stats.variance, rel=1e-12)


def test_the_sae_says_where_its_rows_came_from(straight, store):
    training = load_weights(straight / "sae").training
    assert training["source"] == "stream"
    assert training["corpus_hash"] == store.meta.corpus_hash
    assert training["outlier_threshold"] == store.hooks[POINT].outlier_threshold
    assert training["statistics"] == {"rows": store.stats(POINT).count, "of": "corpus"}
    assert "store_sha256" not in training
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["inputs"]["corpus"]["sha256"] == store.meta.corpus_hash
    assert manifest["inputs"]["model"]["sha256"] == store.meta.model["sha256"]
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["wait_share"] < 1 for row in rows)


def test_several_saes_and_a_search_take_a_stream_as_one_sae_does(straight, folder, tmp_path):
    run = tmp_path / "run"
    search = ["trainer.lr_search=[1e-5,2e-3]", "trainer.lr_search_share=0.2", "together.k=[3,4]"]
    ggscope(*TRAIN, *search, f"run_dir={run}", cwd=folder)
    assert {found["best"] for found in json.loads((run / "lr_search.json").read_text()).values()} == {0.002}
    for name, array in tensors(
        run / "k4"
    ).items():  # captured anew after the search, and 0.002 is the rate of `straight`
        np.testing.assert_array_equal(array, tensors(straight)[name], err_msg=name)


def child_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        ("both", signal.SIGINT, 130),
        pytest.param("both", signal.SIGTERM, 130, marks=pytest.mark.long),
        ("parent", signal.SIGKILL, -signal.SIGKILL),
        ("child", signal.SIGKILL, 2),
    ],
)
def test_a_stopped_training_resumes_to_bit_identical_weights(straight, folder, tmp_path, whom, number, code):
    run = tmp_path / "run"
    slow = [*TRAIN, "trainer.checkpoint_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *slow, f"run_dir={run}"], cwd=folder, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not [p for p in run.glob("checkpoints/step_*.pt") if int(p.stem.removeprefix("step_")) >= 20]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child = child_of(process.pid)
    for pid in {"both": [process.pid, child], "parent": [process.pid], "child": [child]}[whom]:
        os.kill(pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    if whom == "child":
        assert "the capture process died: SIGKILL" in error.strip().splitlines()[-1]
    if whom == "both":
        assert "resume=" in error.strip().splitlines()[-1]
    assert json.loads((run / "manifest.json").read_text())["status"] != "finished"
    ggscope(*TRAIN, f"resume={run}", cwd=folder)
    for name, array in tensors(run).items():
        np.testing.assert_array_equal(array, tensors(straight)[name], err_msg=name)
    assert load_weights(run / "sae").variance == load_weights(straight / "sae").variance


def test_a_streamed_sae_is_evaluated_without_a_store(straight, folder):
    options = [*OPTIONS[:6], "evaluate.tokens=600", "evaluate.splice_tokens=300", "model.n_threads=1"]
    run = straight.with_name("evaluated")
    done = ggscope("evaluate", *options, f"sae.path={straight / 'sae'}", f"run_dir={run}", cwd=folder)
    assert "PCA, k components FVU" in done.stdout
    found = json.loads((run / "evaluation.json").read_text())
    assert 0 < found["baselines"]["pca"]["fvu"] < found["baselines"]["mean"]["fvu"]
    assert found["baselines"]["untrained"]["fvu"] is not None
    assert "store" not in json.loads((run / "manifest.json").read_text())["inputs"]


def test_a_part_of_the_corpus_is_said_to_be_one(folder, tmp_path):
    done = ggscope(*TRAIN, "trainer.tokens=1280", f"run_dir={tmp_path / 'run'}", cwd=folder)
    assert "a part of the corpus" in done.stdout
    statistics = load_weights(tmp_path / "run" / "sae").training["statistics"]
    assert statistics["of"] == "rows captured"
    assert 1280 <= statistics["rows"] < 7680


def test_settings_that_cannot_work_are_one_line(folder, tmp_path):
    two = f"hook.points=[{POINT},blocks.0.hook_resid_post]"
    for change, text in (
        (two, "one hook point"),
        ("trainer.source=tape", "store, stream"),
        ("corpus.paths=[none-*.txt]", "none-*.txt"),
    ):
        done = ggscope(*TRAIN, change, f"run_dir={tmp_path / text[:5]}", cwd=folder, code=2)
        assert text in done.stderr.strip().splitlines()[-1]


def test_run_is_for_stores(tmp_path):
    done = ggscope("run", "trainer.source=stream", cwd=tmp_path, code=2)
    assert "ggscope train trainer.source=stream" in done.stderr.strip().splitlines()[-1]


def test_a_resumed_stream_keeps_its_corpus_and_another_one_is_refused(folder, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "x.txt").write_text("def f():\n    return 1\n" * 300)
    options = [*TRAIN, f"corpus.paths=[{tmp_path}/*.txt]", "trainer.tokens=1280"]
    first = ggscope(*options, f"run_dir={run}", cwd=folder)
    (tmp_path / "x.txt").write_text("def g():\n    return 2\n" * 300)
    again = ggscope(*options, f"resume={run}", cwd=folder)  # its text is in the run folder
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    shutil.rmtree(run / "corpus")
    done = ggscope(*options, f"resume={run}", cwd=folder, code=2)
    assert "corpus was" in done.stderr
