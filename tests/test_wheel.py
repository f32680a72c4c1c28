"""A wheel installed elsewhere runs the whole pipeline on the embedded model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "corpus.max_tokens=20000", "sae.num_latents=512", "trainer.tokens=120000", "trainer.dead_after_tokens=20000",
    "evaluate.tokens=4000", "evaluate.splice_tokens=1024", "evaluate.random_model_tokens=4000", "report.tokens=4000",
    "extract.calibration_tokens=1024",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a Python that finds the wheel's packages before this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True, timeout=300)
    return os.environ | {"PYTHONPATH": str(folder / "site"), "COLUMNS": "200"}


def test_the_wheel_holds_the_packages_the_configs_and_the_model(installed):
    site = Path(installed["PYTHONPATH"])
    for name in (
        "conf/run.yaml",
        "conf/experiment/demo_cpu.yaml",
        "conf/corpus/jsonl.yaml",
        "conf/executor/pool.yaml",
        "conf/inspect.yaml",
        "conf/store.yaml",
        "pipeline/llama/ask.c",
        "pipeline/llama/products.c",
        "pipeline/llama/reading.c",
        "pipeline/llama/reading.h",
        "pipeline/store/rows.c",
        "pipeline/data/pylm.gguf",
        "sae/model.py",
        "sae/native/step.c",
        "sae/native/sums.c",
        "sae/native/vectors.h",
        "convert/sae_gguf.py",
    ):
        assert (site / name).is_file(), name
    assert not (site / "models").exists()
    assert not (site / "tests").exists()


def test_the_whole_pipeline_runs_from_the_wheel(installed, tmp_path):
    where = subprocess.run(
        [sys.executable, "-c", "import pipeline; print(pipeline.__file__)"],
        cwd=tmp_path,
        env=installed,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(installed["PYTHONPATH"])
    command = [sys.executable, "-m", "pipeline.cli", "run", "experiment=demo_cpu", *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = tmp_path.glob("runs/run/*")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    report = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(
        r"(?:src|href)\s*=\s*[\"']?https?:|url\([\"']?https?:|@import", report
    )  # the text may hold URLs
    evaluation = json.loads((run / "evaluate" / "manifest.json").read_text())["metrics"]
    assert evaluation["ce_recovered"] > 0.5
    assert set(evaluation["baselines"]) >= {"pca", "untrained", "random_model"}
    assert "SAE beside its baselines" in done.stdout
    again = subprocess.run(
        [*command, f"resume={run}"], cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already finished, kept") == 7
