"""Hook point names, and where they lie in the graphs of other architectures."""

from __future__ import annotations

import re

import pytest

from pipeline.llama.hooks import BLOCK_SITES, MODEL_SITES, HookPoint, describe, expand, is_pattern
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


def test_a_pattern_is_told_from_a_name():
    patterns = [
        "blocks.*.hook_z",
        "blocks.2..5.hook_z",
        "blocks.{1,4}.hook_z",
        "blocks.3.*",
        "blocks.*.*",
        "ggml:l_out-*",
    ]
    assert all(map(is_pattern, patterns))
    names = [
        "blocks.12.hook_z",
        "blocks.1.attn.hook_z",
        "ggml:l_out-3",
        "logits",
        "ln_final",
        "",
        "blocks.x.hook_z",
        "*",
    ]
    assert not any(map(is_pattern, names))


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


KNOWN = [HookPoint("resid_pre", 0)]
for _b in range(4):
    KNOWN += [HookPoint("q", _b), HookPoint("pattern", _b), HookPoint("z", _b), HookPoint("resid_post", _b)]
KNOWN += [HookPoint("ln_final"), HookPoint("logits")]
RAW = ["embd", "l_out-0", "l_out-1", "Qcur-1", "Qcur-1", "l_out-10", "node_7"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["blocks.*.hook_resid_post"], [f"blocks.{b}.hook_resid_post" for b in range(4)]),
        (["blocks.1..2.hook_resid_post"], ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]),
        (["blocks.2..2.hook_z"], ["blocks.2.attn.hook_z"]),
        (["blocks.{3,1}.attn.hook_z"], ["blocks.1.attn.hook_z", "blocks.3.attn.hook_z"]),
        (["blocks.3.*"], ["blocks.3.attn.hook_q", "blocks.3.attn.hook_z", "blocks.3.hook_resid_post"]),
        (["blocks.0..1.attn.*"], [f"blocks.{b}.attn.hook_{s}" for b in (0, 1) for s in "qz"]),
        (["blocks.*.hook_resid_pre", "blocks.*.*_pre"], ["blocks.0.hook_resid_pre"]),
        (["ggml:l_out-*"], ["ggml:l_out-0", "ggml:l_out-1", "ggml:l_out-10"]),
        (["ggml:Q*-1", "logits"], ["ggml:Qcur-1", "logits"]),
        (["blocks.2.hook_z", "blocks.1..2.hook_z"], ["blocks.2.attn.hook_z", "blocks.1.attn.hook_z"]),
        (["blocks.9.hook_z", "ggml:none"], ["blocks.9.attn.hook_z", "ggml:none"]),  # read, not looked up
        ([], []),
    ],
)
def test_patterns_become_points_in_the_order_of_computation_without_doubles(texts, expected):
    assert [str(point) for point in expand(texts, KNOWN, RAW)] == expected


def test_what_a_long_list_is_described_as_reads_back_as_that_list():
    points = [p for p in KNOWN if p.site != "pattern" and p != HookPoint("z", 2)]
    texts = re.split(r", (?![^{]*\})", describe(points))
    assert "blocks.{0,1,3}.attn.hook_z" in texts
    assert set(expand(texts, KNOWN)) == set(points)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.*.hook_mlp_out", r"'blocks\.\*\.hook_mlp_out' matches no hook point; this model has blocks\.0\.hook_"),
        ("blocks.2..9.hook_z", r"block 4 has no such point; this model has .*blocks\.0\.\.3\.attn\.hook_z"),
        ("blocks.{0,7}.hook_z", "block 7 has no such point"),
        ("blocks.3..1.hook_z", "matches no hook point"),
        ("blocks.*.hook_zz", r"is no hook point; did you mean"),
        ("blocks.1.mlp.*", "block 1 has no such point"),
        ("ggml:k_out-*", r"'ggml:k_out-\*' matches no tensor; this model's graph has Qcur-1, embd, l_out-\{0,1,10\}"),
        ("blocks.1..hook_z", "is no hook point"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_exists(text, message):
    with pytest.raises(HookError, match=message) as raised:
        expand([text], KNOWN, RAW)
    assert "\n" not in str(raised.value)


def test_a_pattern_on_a_model_without_named_points_sends_to_the_raw_ones():
    with pytest.raises(HookError, match=r"only raw tensors \(ggml:NAME"):
        expand(["blocks.*.hook_z"], [], RAW)
