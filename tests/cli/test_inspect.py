"""`ggscope inspect`: the card against HF's config and the file, the graph against what llama.cpp computes."""

from __future__ import annotations

import hashlib
import json

import gguf
import numpy as np
import pytest

from pipeline.llama.hooks import BLOCK_SITES, MODEL_SITES, HookPoint
from pipeline.llama.identity import vocab_sha256
from pipeline.llama.session import capture
from tests.cli.conftest import ggscope, last_line
from tests.llama.architectures import EXPERTS
from tests.llama.hf_twins import loaded
from tests.llama.support import exact, tiny
from tests.tiny_llama import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID, write_tiny_encoder, write_tiny_llama


def inspected(path, cwd, *settings):
    done = ggscope("inspect", str(path), "format=json", "model.n_threads=1", *settings, cwd=cwd)
    ends = [line.split()[:2] for line in done.stderr.strip().splitlines()[-3:]]
    assert ends == [["inspect", "input"], ["inspect", "result"], ["inspect", "output"]]
    assert not list(cwd.iterdir())  # it keeps no run
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["qwen3moe", "gemma3", "gptneox"])
def test_the_card_has_the_numbers_of_hf_s_config_and_of_the_file(name, tmp_path):
    model, twin, _ = loaded(name)
    hf, card = twin.config, inspected(model.path, tmp_path)["model"]
    sizes = card["sizes"]
    assert (sizes["blocks"], sizes["width"]) == (hf.num_hidden_layers, hf.hidden_size)
    assert sizes["heads"] == hf.num_attention_heads
    assert sizes["kv_heads"] == getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    assert sizes["head_width"] == getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads)
    assert sizes["feed_forward"] == hf.intermediate_size
    assert sizes["context_tokens"] == hf.max_position_embeddings
    assert sizes["sliding_window"] == getattr(hf, "sliding_window", None)
    assert sizes["rope_freq_base"] == hf.rope_parameters.get("full_attention", hf.rope_parameters)["rope_theta"]
    assert sizes["rope_dimensions"] == (4 if name == "gptneox" else hf.head_dim)
    experts = (EXPERTS, hf.num_experts_per_tok, hf.moe_intermediate_size) if name == "qwen3moe" else (None, None, None)
    assert (sizes["experts"], sizes["experts_used"], sizes["expert_feed_forward"]) == experts
    assert card["weights"]["parameters"] == sum(p.numel() for p in twin.parameters())
    assert card["file"]["sha256"] == hashlib.sha256(model.path.read_bytes()).hexdigest()
    assert card["file"]["bytes"] == model.path.stat().st_size


def test_the_card_has_quantisation_vocabulary_and_chat_template(tmp_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_llama(path, dtype="Q8_0")
    card = inspected(path, tmp_path)["model"]
    reader = gguf.GGUFReader(path)
    matrices = sum(len(tensor.shape) == 2 for tensor in reader.tensors)
    assert card["weights"]["file_type"] == "Q8_0"
    assert card["weights"]["tensors"] == {"Q8_0": matrices, "F32": len(reader.tensors) - matrices}
    words = card["vocabulary"]
    assert (words["tokens"], words["type"], words["add_bos"]) == (512, "gpt2", True)
    assert words["bos"] == {"id": BOS_ID, "text": BOS}
    assert words["eos"] == {"id": EOS_ID, "text": EOS}
    assert words["sha256"] == vocab_sha256(reader.get_field("tokenizer.ggml.tokens").contents())
    assert card["chat_template"] == {"usable": True, "text": CHAT_TEMPLATE}


@pytest.mark.parametrize("flash_attn", ["auto", "off"])
def test_every_hook_point_is_the_tensor_it_is_said_to_be(flash_attn, tmp_path):
    model = tiny()[0]
    found = inspected(model.path, tmp_path, f"model.flash_attn={flash_attn}")
    sites = set(BLOCK_SITES.values()) - {"mlp.hook_router_scores", "mlp.hook_expert_weights"}
    expected = {f"blocks.{b}.{site}" for b in range(4) for site in sites} | set(MODEL_SITES.values())
    points = {point["point"]: point for point in found["hook_points"]}
    assert set(points) == expected
    hidden = {name for name, point in points.items() if point["flash_attn_off"]}
    assert hidden == ({f"blocks.{b}.attn.hook_pattern" for b in range(4)} if flash_attn == "auto" else set())
    assert found["graph"] == {"tokens": 1, "flash_attention": flash_attn == "auto", "buffers": ["CPU"]}
    assert [t["index"] for t in found["tensors"]] == list(range(len(found["tensors"])))
    assert {p for tensor in found["tensors"] for p in tensor["hook_points"]} == expected - hidden
    # the point and the raw name read the same rows, where RoPE's rows need no new order
    plain = [p for name, p in points.items() if p["width"] and not name.endswith(("_q", "_k"))]
    chosen = [HookPoint.parse(text) for p in plain for text in (p["point"], p["raw"])]
    with exact(model, flash_attn=flash_attn) as session:
        (rows,) = capture(session, [np.arange(2, 9)], chosen)
    for point in plain:
        assert np.array_equal(rows[point["point"]], rows[point["raw"]])
        assert rows[point["point"]].shape[1] == point["width"]


def test_tensors_come_in_the_order_they_are_computed_each_after_its_inputs(tmp_path):
    tensors = inspected(loaded("qwen3moe")[0].path, tmp_path)["tensors"]
    known = set()
    for tensor in tensors:
        assert {name for name in tensor["inputs"] if name.startswith("ggml:")} <= known
        known.add(tensor["raw"])
    assert len(known) == len(tensors)
    router = next(tensor for tensor in tensors if "blocks.0.mlp.hook_router_scores" in tensor["hook_points"])
    assert router["inputs"][0] == "blk.0.ffn_gate_inp.weight"
    assert (router["ne"], router["type"]) == ([EXPERTS, 1, 1, 1], "f32")


def test_the_text_fits_a_terminal_of_a_hundred_columns_and_lists_every_tensor_when_asked(tmp_path):
    text = ggscope("inspect", "model.n_threads=1", cwd=tmp_path).stdout
    lines = [line.rstrip() for line in text.splitlines()]
    card = [line for line in lines if not line.startswith(("file", "inspect "))]
    assert max(map(len, card)) <= 100
    assert any(line.split()[:4] == ["blocks.0..5.hook_resid_post", "l_out-0..5", "ADD", "256"] for line in lines)
    assert any(line.split()[:4] == ["blocks.1..5.hook_resid_pre", "l_out-0..4", "ADD", "256"] for line in lines)
    assert [line.split()[1] for line in lines[-3:]] == ["input", "result", "output"]
    more = ggscope("inspect", "model.n_threads=1", "inspect.tensors=true", cwd=tmp_path).stdout.splitlines()
    assert any(line.split()[1:5] == ["l_out-5", "ADD", "f32", "256"] for line in more)
    assert max(len(line.rstrip()) for line in more if not line.startswith(("file", "inspect "))) <= 100


def test_a_structure_that_is_not_understood_still_lists_its_tensors(tmp_path, tmp_path_factory):
    llama, weights = tiny()
    path = tmp_path_factory.mktemp("model") / "encoder.gguf"
    write_tiny_encoder(path, llama.path, weights)
    found = inspected(path, tmp_path)
    assert found["hook_points"] == []
    assert "ggml:ffn_inp-3" in {tensor["raw"] for tensor in found["tensors"]}
    text = ggscope("inspect", str(path), "model.n_threads=1", cwd=tmp_path).stdout
    assert "no hook points by name" in text
    assert "ffn_inp-0..3" in text


def test_brackets_and_colons_of_a_template_are_printed_as_they_are(tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder / "plain.gguf")
    template = "[INST] :warning: {{ messages }}"
    data = (folder / "plain.gguf").read_bytes()
    old = CHAT_TEMPLATE.encode()
    assert data.count(old) == 1
    (folder / "odd.gguf").write_bytes(data.replace(old, template.ljust(len(old)).encode()))
    assert inspected(folder / "odd.gguf", tmp_path)["model"]["chat_template"]["text"].rstrip() == template
    assert template in ggscope("inspect", str(folder / "odd.gguf"), "model.n_threads=1", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model file"),
        (b"", "is empty"),
        (b"PK\x03\x04", "is not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "truncated or damaged"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    done = ggscope("inspect", str(path), cwd=tmp_path, code=2)
    assert message in last_line(done)
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_settings_that_do_not_exist_are_refused(tmp_path):
    assert "expected text, json" in last_line(ggscope("inspect", "format=xml", cwd=tmp_path, code=2))
    assert "takes one path" in last_line(ggscope("inspect", "a.gguf", "b.gguf", cwd=tmp_path, code=2))
