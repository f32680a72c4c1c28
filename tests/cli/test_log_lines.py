"""Warnings that the packages log reach who types the command."""

from __future__ import annotations

import os
import subprocess
import sys

from .conftest import TRAIN, last_line


def train(cwd, *options, code=0, **environment):
    command = [sys.executable, "-m", "pipeline.cli", "train", *TRAIN, "trainer.tokens=8192", *options]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"} | environment
    )
    assert done.returncode == code, done.stderr
    return done


def test_training_without_a_compiler_says_so_once_and_so_does_a_resume_that_is_refused_for_it(made, tmp_path):
    store = f"store.path={next(made.glob('runs/extract/*/activations.zarr'))}"
    without = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = train(tmp_path, store, **without).stderr
    assert said.count("warning: training without compiled kernels, which is slower: ") == 1
    assert "warning" not in train(tmp_path, store, "run_dir=native", "trainer.kernel=auto").stderr
    refused = train(tmp_path, "resume=native", code=2, **without)
    assert "warning: training without compiled kernels" in refused.stderr
    assert "stepper: 'native' there, 'torch' now" in last_line(refused)
