"""Every published format by its `hf://` address, from a local stand-in for the hub, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.interop.registry import NAMES, import_sae
from tests.peers import peers, without_ggscope

from .hub_files import COMMIT, places, write_cache
from .oracles import draw, same
from .test_peers import SCRIPT

PLACES = places()
READ = """
import json, sys
from pipeline.config import ConvertConfig
from pipeline.stages.published import import_published
for address in json.load(sys.stdin):
    path, found = import_published(address, ConvertConfig())
    w = found.weights
    print(json.dumps([str(path), found.format, w.hook, w.hook_out, w.host.get("name", ""), w.training["source"], float(w.W_dec_FD.sum())]))
"""


def offline(home, environment=os.environ):
    return {**environment} | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    write_cache(home, PLACES)
    return home


def local(home, place):
    return home / "hub" / f"models--{place.repo.replace('/', '--')}" / "snapshots" / COMMIT / place.inside


def test_every_format_is_found_at_its_address_on_the_hub(home):
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps([place.address for place in PLACES]), env=offline(home),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for place, line in zip(PLACES, done.stdout.splitlines(), strict=True):
        path, *found, total = json.loads(line)
        assert found == [place.format, place.hook, place.hook_out, place.model, f"{place.repo}/{place.inside}"]
        assert Path(path) == local(home, place)
        here = import_sae(Path(path), label=f"{place.repo}/{place.inside}")
        assert total == float(here.weights.W_dec_FD.sum())
    assert {place.format for place in PLACES} == set(NAMES)


@pytest.mark.long
def test_saelens_s_own_loaders_of_the_same_places_compute_the_same(home, tmp_path):
    x, known = draw()["x"], [place for place in PLACES if place.saelens]
    tasks = [
        {"repo": place.repo, "inside": place.inside, "loader": place.saelens, "overrides": place.overrides}
        for place in known
    ]
    np.savez(tmp_path / "rows.npz", x=x)
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    done = subprocess.run(
        [peers(), SCRIPT, "load", tmp_path], env=offline(home, without_ggscope()), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for i, place in enumerate(known):
        theirs = np.load(tmp_path / str(i) / "answers.npz")
        ours = import_sae(local(home, place), label=f"{place.repo}/{place.inside}").weights
        same(ours, x, theirs["acts"] / place.scale, theirs["x_hat"])
    assert len({place.saelens for place in known}) == 11
