"""The hook point that a training takes from a store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.config import Config, HooksConfig
from pipeline.stages.rows import the_hook
from sae.errors import ConfigError, HookError

NAMES = ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]


def chosen(*points, names=NAMES):
    return the_hook(SimpleNamespace(hooks=dict.fromkeys(names)), Config(hooks=HooksConfig(points=list(points))))


def test_a_point_is_found_by_any_of_its_names():
    assert chosen("blocks.1.hook_mlp_post") == "blocks.1.mlp.hook_post"
    assert chosen("blocks.1.mlp.hook_post") == "blocks.1.mlp.hook_post"
    assert chosen("blocks.1.hook_resid_post") == "blocks.1.hook_resid_post"
    assert chosen("blocks.3.hook_resid_post", names=NAMES[:1]) == NAMES[0]  # the only one needs no name


def test_what_names_no_single_point_of_the_store_is_refused():
    for points in ([], ["blocks.1.*"], ["blocks.2.hook_resid_post"], NAMES):
        with pytest.raises(ConfigError, match=r"choose one with hooks.points=\[blocks.1.mlp.hook_post\]"):
            chosen(*points)
    with pytest.raises(HookError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        chosen("blocks.1.hook_residpost")
