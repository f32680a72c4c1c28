"""Hook point names, and where they lie in the graphs of other architectures."""

from __future__ import annotations

import pytest

from pipeline.llama.hooks import BLOCK_SITES, MODEL_SITES, HookPoint, describe
from sae.errors import HookError


def test_every_name_reads_back_as_written():
    names = [f"blocks.12.{name}" for name in BLOCK_SITES.values()] + list(MODEL_SITES.values()) + ["ggml:l_out-3#1"]
    assert [str(HookPoint.parse(name)) for name in names] == names
    assert HookPoint.parse("blocks.12.hook_resid_post") == HookPoint("resid_post", 12)
    assert HookPoint.parse("blocks.0.hook_z") == HookPoint("z", 0)
    assert HookPoint.parse("ln_final") == HookPoint("ln_final")


@pytest.mark.parametrize(
    "text",
    ["", "blocks.3", "blocks.-1.hook_z", "blocks.03.hook_z", "blocks.x.hook_z", "l_out-3", "ggml:", "blocks.1.hook"],
)
def test_what_is_no_hook_point_is_refused_with_the_names_that_are(text):
    with pytest.raises(HookError, match=r"is no hook point.*blocks\.N\.hook_resid_post.*ggml:TENSOR_NAME"):
        HookPoint.parse(text)


def test_a_near_miss_is_named_with_its_block():
    with pytest.raises(HookError, match=r"did you mean 'blocks\.3\.hook_resid_post'"):
        HookPoint.parse("blocks.3.hook_residpost")


def test_a_long_list_of_points_is_described_in_one_line():
    points = [HookPoint("resid_pre", b) for b in range(32)] + [
        HookPoint("q", 1),
        HookPoint("q", 3),
        HookPoint("logits"),
    ]
    assert describe(points) == "blocks.0..31.hook_resid_pre, blocks.{1,3}.attn.hook_q, logits"
