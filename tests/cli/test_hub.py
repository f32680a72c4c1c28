"""Models named by hub repository and file: the real loader, on a local hub cache and without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from pipeline.config import ModelConfig
from pipeline.stages.inputs import model_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lens(folder, file):
    cache = folder / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(COMMIT)
    (cache / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    shutil.copy(model_path(ModelConfig()), cache / "snapshots" / COMMIT / "tiny.gguf")
    options = ["model.repo=owner/name", f"model.file={file}", "model.n_threads=1", "--prompt", "import os"]
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "lens", *options], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )  # fmt: skip


def test_a_file_of_a_cached_repository_is_used(tmp_path):
    done = lens(tmp_path, "tiny.gguf")
    assert done.returncode == 0, done.stderr
    assert "tiny.gguf" in done.stdout


def test_a_file_that_cannot_be_had_is_one_line(tmp_path):
    done = lens(tmp_path, "other.gguf")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.file=other.gguf" in done.stderr
