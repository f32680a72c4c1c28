"""Attention patterns against HF's own, and what `ggscope lens` keeps of them."""

from __future__ import annotations

import json
import shlex
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from pipeline.cli import main
from pipeline.lenses import attention as module
from pipeline.lenses.attention import attention, draw_attention
from sae.errors import ConfigError, HookError
from tests.interventions.tiny import BLOCKS, prompt, session, tiny, twin

HEADS = 4


def hf_attention(tokens):
    import torch

    with torch.no_grad():
        out = twin()(torch.tensor(tokens[None].astype(np.int64)), output_attentions=True)
    return [weights_HTT[0].numpy() for weights_HTT in out.attentions]


@pytest.mark.parametrize("n_batch", [256, 7])
def test_every_weight_is_hfs(n_batch):
    tokens = prompt()
    found = attention(session(n_batch=n_batch), tokens, [3, 0])
    assert list(found) == [3, 0]
    for block, weights_HTT in found.items():
        assert weights_HTT.shape == (HEADS, len(tokens), len(tokens))
        np.testing.assert_allclose(weights_HTT, hf_attention(tokens)[block], atol=1e-5)
        np.testing.assert_allclose(weights_HTT.sum(axis=2), 1, atol=1e-5)


def test_blocks_and_graphs_without_a_pattern_are_refused():
    with pytest.raises(ConfigError, match=rf"lens\.attention: the model has blocks 0\.\.{BLOCKS - 1}, got -1, 4"):
        attention(session(), prompt(), [1, -1, 4])
    with pytest.raises(HookError, match="hook_pattern"):
        attention(session(flash_attn="on", kv_type="f16"), prompt(), [1])


@pytest.mark.parametrize(("blocks", "heads", "count"), [([0], 1, 1), ([0, 2], 3, 12), ([0, 1], 12, 90)])
def test_the_picture_has_a_panel_for_each_head_and_a_size_that_can_be_drawn(
    monkeypatch, tmp_path, blocks, heads, count
):
    monkeypatch.setattr(module, "MOST_PIXELS", 900)
    weights_HTT = np.tril(np.ones((heads, count, count), np.float32))
    draw_attention(tmp_path / "a.png", dict.fromkeys(blocks, weights_HTT), ["x"] * count)
    assert max(imread(tmp_path / "a.png").shape[:2]) <= 900


@pytest.mark.parametrize("count", [40, 41])
def test_the_picture_has_each_heads_own_weights_and_labels_at_its_edges(monkeypatch, tmp_path, count):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_args, **_options: kept.append(self))
    patterns = {block: np.random.default_rng(block).random((heads, count, count)) for block, heads in ((3, 2), (1, 3))}
    draw_attention(tmp_path / "a.png", patterns, [f"t{n}" for n in range(count)])
    panels = [ax for ax in kept[0].axes if ax.images]
    assert [ax.get_title() for ax in panels] == [
        f"block {b}, head {h}" for b, h in ((3, 0), (3, 1), (1, 0), (1, 1), (1, 2))
    ]
    for ax, weights_TT in zip(panels, [*patterns[3], *patterns[1]], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), weights_TT)  # query down
    assert [ax.axison for ax in kept[0].axes[:6]] == [True] * 5 + [False]  # two lines of three
    first = [
        [getattr(ax, f"get_{axis}ticklabels")()[0].get_text() for ax in panels] for axis in ("y", "x")
    ]  # of each panel's labels
    if count == 40:
        assert first == [["t0", "", "", "t0", ""], ["", "", "t0", "t0", "t0"]]
    else:
        assert "t0" not in first[0] + first[1]


@pytest.fixture
def ggscope(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, code=0):
        assert main([*args, f"model.path={tiny()[0].path}", "model.n_threads=1"]) == code
        return capsys.readouterr()

    return call


def test_the_refusal_to_store_a_pattern_names_the_command_that_writes_it(ggscope, tmp_path):
    said = ggscope("extract", "hook.points=[blocks.1.attn.hook_pattern]", code=2).err.strip().splitlines()[-1]
    words = shlex.split(said.split("`")[1].replace("TEXT", "'import os'"))
    done = ggscope(*words[1:], "run_dir=kept", "model.kv_type=f32")
    assert "kept/attention.npz, kept/attention.png" in " ".join(done.out.split())
    tokens = np.concatenate([[tiny()[0].bos], tiny()[0].tokenize("import os")])
    with np.load(tmp_path / "kept" / "attention.npz") as arrays:
        assert list(arrays) == ["blocks.1.attn.hook_pattern"]
        np.testing.assert_allclose(arrays["blocks.1.attn.hook_pattern"], hf_attention(tokens)[1], atol=1e-4)
    outputs = json.loads((tmp_path / "kept" / "manifest.json").read_text())["outputs"]
    assert set(outputs) == {"lens", "attention", "attention_picture"}
    assert "as wide as the vocabulary" in ggscope("extract", "hook.points=[logits]", code=2).err


def test_a_lens_without_blocks_keeps_no_patterns(ggscope, tmp_path):
    ggscope("lens", "--prompt", "x", "run_dir=plain")
    assert not list((tmp_path / "plain").glob("attention*"))
