"""The hook point that a training takes from a store."""

from __future__ import annotations

import json

import pytest

from pipeline.config import Config, HookConfig, TrainerConfig
from pipeline.run import RunContext
from pipeline.stages.rows import read_calibration, the_hook, warn_passes
from pipeline.store.reader import ActivationStore
from sae.errors import ConfigError, FormatError, HookError
from tests.store.helpers import fill, known_rows, make_meta

NAMES = ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of one hook point and one of two."""
    found = []
    for names in (NAMES[:1], NAMES):
        path, widths = tmp_path_factory.mktemp("rows") / "store", dict.fromkeys(names, 4)
        fill(path, make_meta(32, widths), *known_rows(32, widths))
        found.append(ActivationStore(path))
    return found


def chosen(store, *points):
    return the_hook(store, Config(hook=HookConfig(points=list(points))))


@pytest.mark.parametrize(("tokens", "rows", "said"), [(1000, 100, ""), (1500, 100, "1,500 tokens are 15 passes")])
def test_many_passes_over_few_rows_are_said(tmp_path, capsys, tokens, rows, said):
    context = RunContext(command="train", folder=tmp_path, config=Config(trainer=TrainerConfig(tokens=tokens)))
    warn_passes(context, rows)
    found = " ".join(capsys.readouterr().err.split())
    assert (said in found) if said else (found == "")


def test_a_point_is_found_by_any_of_its_names(stores):
    one, two = stores
    assert chosen(two, "blocks.1.hook_mlp_post") == "blocks.1.mlp.hook_post"
    assert chosen(two, "blocks.1.mlp.hook_post") == "blocks.1.mlp.hook_post"
    assert chosen(two, "blocks.1.hook_resid_post") == "blocks.1.hook_resid_post"
    assert chosen(one) == chosen(one, NAMES[0]) == chosen(one, "blocks.*.hook_resid_post") == NAMES[0]
    with pytest.raises(ConfigError, match=r"holds blocks\.1\.mlp\.hook_post, not blocks\.3\.hook_resid_post: train on"):
        chosen(one, "blocks.3.hook_resid_post")


CALIBRATION = {
    "hook": {"name": NAMES[0], "width": 2, "dtype": "float16", "outlier_threshold": 9.0},
    "pilot": {"rows": 4, "mean": [0.5, 1.0], "variance": 2.0},
    "corpus_hash": "a", "config_hash": "b", "model_sha256": "c",
}  # fmt: skip


def test_the_calibration_of_a_stream_is_read_as_it_was_written(tmp_path):
    (tmp_path / "stream.json").write_text(json.dumps(CALIBRATION))
    assert read_calibration(tmp_path / "stream.json") == CALIBRATION


@pytest.mark.parametrize(
    "text",
    ["3", "[1]", "{}", '{"pilot"', "\xff", *(json.dumps(CALIBRATION | {key: 3}) for key in ("hook", "pilot"))],
)
def test_a_damaged_calibration_of_a_stream_is_one_line(text, tmp_path):
    (tmp_path / "stream.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"stream\.json is damaged .*; start a new run"):
        read_calibration(tmp_path / "stream.json")


def test_what_names_no_single_point_of_the_store_is_refused(stores):
    for points in ([], ["blocks.1.*"], ["blocks.2.hook_resid_post"], NAMES):
        with pytest.raises(ConfigError, match=r"train on one with hook\.points=\[blocks\.1\."):
            chosen(stores[1], *points)
    with pytest.raises(HookError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        chosen(stores[1], "blocks.1.hook_residpost")
