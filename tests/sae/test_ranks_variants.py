"""Two ranks that share the rows of a batch are one process on all of them, whatever the variant and the wiring."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sae.ranks import Ranks

from .test_ranks import TORCHRUN
from .train_variants import CASES, CHOSEN, batches, trained
from .variant_models import batch_topk

NAMES = [f"{kind}.{name}" for kind, (_, configs) in CASES.items() for name in configs]
WITH_AUXK = [name for name in NAMES if not {"relu", "gated", "jumprelu"} & set(name.replace(".", " ").split())]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two ranks."""
    two = tmp_path_factory.mktemp("two")
    command = [sys.executable, *TORCHRUN, "-m", "tests.sae.train_variants", str(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    hashes = [path.read_text() for path in sorted(two.glob("rank-*.txt"))]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]  # both made the same updates
    return two


@pytest.fixture(scope="module")
def both(two, tmp_path_factory):
    """Arrays and metric rows of one process, and of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two; more only wait for each other at this size
    one = trained(tmp_path_factory.mktemp("one"), Ranks())
    torch.set_num_threads(threads)
    return one, (np.load(two / "weights.npz"), json.loads((two / "rows.json").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_end_at_the_weights_of_one_process(both, name):
    (one, rows), (two, two_rows) = both
    fields = [key for key in one if key.startswith(f"{name}.")]
    assert len(fields) >= 5
    for key in fields:
        assert np.linalg.norm(two[key] - one[key]) <= 1e-5 * np.linalg.norm(one[key]), key
    for a, b in zip(rows[name], two_rows[name], strict=True):
        for key in ("fvu", "l0", "loss", "auxk_loss", "dead", "revived"):
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), key
    if name in WITH_AUXK:
        assert rows[name][-1]["auxk_loss"] > 0


@pytest.mark.parametrize("name", batches())
def test_ranks_choose_the_largest_of_the_whole_batch_and_of_equal_values_the_first(two, name):
    values_BF = batches()[name].numpy()
    expected_BF = batch_topk(np.maximum(values_BF, 0), CHOSEN) & (values_BF > 0)
    assert expected_BF.sum() == min(CHOSEN * len(values_BF), (values_BF > 0).sum())
    by_rank = [np.load(two / f"chosen-{rank}.npz")[name] for rank in range(2)]
    for found_BF in np.concatenate(by_rank, axis=1):
        np.testing.assert_array_equal(found_BF, expected_BF)
