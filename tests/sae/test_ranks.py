"""Two ranks of torchrun (gloo) are one process on the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.ranks import Ranks

from .train_ranks import FIELDS

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(folder, *words, ranks):
    folder.mkdir(exist_ok=True)
    start = TORCHRUN if ranks == 2 else []
    command = [sys.executable, *start, "-m", "tests.sae.train_ranks", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run(folder / "one", ranks=1)
    hashes = run(folder / "two", ranks=2)
    return folder, hashes


def test_two_ranks_end_where_one_process_does(both):
    folder, hashes = both
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]  # every rank made the same updates
    one, two = (np.load(folder / name / "weights.npz") for name in ("one", "two"))
    for name in ("a", "b"):
        for field in FIELDS:
            a, b = one[f"{name}.{field}"], two[f"{name}.{field}"]
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a), (name, field)
    rows = [json.loads((folder / name / "rows.json").read_text()) for name in ("one", "two")]
    assert rows[0]["a"][-1]["revived_total"] > 0  # AuxK ran
    for a, b in zip(rows[0]["a"] + rows[0]["b"], rows[1]["a"] + rows[1]["b"], strict=True):
        for key in ("fvu", "l0", "loss", "auxk_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
        assert b["tokens"] == a["tokens"]


def test_ranks_of_which_one_is_stopped_all_stop_and_resume_to_the_same_bits(both, tmp_path):
    _, hashes = both
    messages = run(tmp_path, "stop=10", ranks=2)
    assert messages[1].startswith("SIGTERM after step 11 of 24")
    assert messages[0].startswith("another rank was stopped after step 11 of 24")
    assert run(tmp_path, "resume", ranks=2) == hashes


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="a multiple of the 3 ranks, got 10"):
        Ranks(1, 3).part(torch.zeros(10, 2))
    parts = [Ranks(rank, 2).part(torch.arange(6)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), torch.arange(6))
