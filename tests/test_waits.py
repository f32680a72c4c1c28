from __future__ import annotations

import os
import subprocess
import sys

import pytest

TORCH = """
import os, sys
import pipeline.stages.train
from pipeline.waits import asleep
assert "torch" not in sys.modules, "the stage must load torch inside"
with asleep():
    import torch
print(os.environ.get("GOMP_SPINCOUNT"))
"""
LLAMA = """
import os
import pipeline.llama.model
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP, or none, there")
@pytest.mark.parametrize("code", [TORCH, LLAMA], ids=["torch", "llama.cpp"])
@pytest.mark.parametrize(("given", "spins", "left"), [({}, "3000", "None"), ({"GOMP_SPINCOUNT": "77"}, "77", "77")])
def test_threads_sleep_where_they_wait_unless_told_otherwise_and_children_inherit_nothing(code, given, spins, left):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr  # what the library that was loaded has read
    assert done.stdout.split() == [left]
