"""stdout and stderr that nobody reads, that cannot be written, or that are closed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import TRAIN


def shell(command, cwd):
    """Its exit code, stdout, stderr; `G` in the command is the program."""
    done = subprocess.run(
        ["bash", "-c", command.replace("G ", f"{sys.executable} -m pipeline.cli ")],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("where", ["2>&1 | true; exit ${PIPESTATUS[0]}", ">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_a_run_goes_on_to_its_end_though_nobody_can_read_it(where, made, tmp_path):
    store = next(made.glob("runs/extract/*/activations.zarr"))
    options = " ".join([*TRAIN, "trainer.tokens=20480", "sae.l1_coef=0.5"])  # the last is warned of
    code, *said = shell(f"G train {options} store.path={store} run_dir=mine {where}", tmp_path)
    assert (code, *said) == (0, "", "")
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("command", ["--help", "train --help", "completion bash"])
def test_what_only_prints_says_in_one_line_that_it_could_not(command, tmp_path):
    code, _, error = shell(f"G {command} >/dev/full", tmp_path)
    assert code == 2
    assert "standard output" in error
    assert len(error.splitlines()) == 1
    for quiet in (">&-", "| true; exit ${PIPESTATUS[0]}"):
        assert shell(f"G {command} {quiet}", tmp_path) == (0, "", "")


def test_json_to_a_closed_stdout_is_no_bug(made):
    code, _, error = shell("G store info format=json >&-", made)
    assert code == 0
    assert "bug" not in error


def test_errors_that_cannot_be_said_keep_their_exit_code(tmp_path):
    assert shell("G nope 2>/dev/full", tmp_path) == (2, "", "")
