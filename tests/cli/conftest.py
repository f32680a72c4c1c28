"""One finished extract and train run, made by the command line, that several tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = "extract.calibration_tokens=1024"  # 8,192 by default, as much work as the captures of most tests
SMALL = ["corpus.max_tokens=6000", "store.shard_rows=1024", QUICK]
TRAIN = ["sae.num_latents=256", "sae.k=8", "trainer.tokens=40960", "trainer.dead_after_tokens=8000"]


def ggscope(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *args], cwd=cwd, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == code, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made_once")
    ggscope("extract", *SMALL, cwd=folder)
    ggscope("train", *TRAIN, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def made(made_once, tmp_path_factory):
    """A folder with one finished extract and one finished train run."""
    return Path(shutil.copytree(made_once, tmp_path_factory.mktemp("made") / "copy"))
