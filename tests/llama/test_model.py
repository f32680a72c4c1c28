"""Tokenizer, chat template, unembedding, random copies, devices: against the file and against HF's libraries."""

from __future__ import annotations

import argparse
import inspect
import textwrap

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.llama.doctor import backends, versions
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.random_weights import write_random_copy
from pipeline.llama.session import Session, capture
from pipeline.llama.unembed import read_unembedding
from sae.errors import FormatError, LlamaError, ShapeError
from tests.llama.support import exact, relative, sequences, tiny
from tests.tiny_llama import BOS_ID, EOS_ID, random_weights, tokenizer, write_tiny_llama

TEXTS = [
    "",
    " ",
    "def f(x):\n    return x  # comment\n",
    "\t\tTabs\r\nand  spaces   \n\n\n",
    "naïve Ωμέγα 日本語 🙂 \u200d",
    "<|bos|> spelled out <|eos|>",
    "nul \0 inside",
    "don't we'll I'VE 3.14159 0xFF",
    inspect.getsource(textwrap),
    inspect.getsource(argparse)[:20000],
]


def hf_tokens(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_equal_those_of_the_tokenizers_library(text):
    model = tiny()[0]
    tokens = model.tokenize(text.encode())
    assert tokens.dtype == np.int32
    assert tokens.tolist() == hf_tokens(text)
    assert b"".join(model.piece(t) for t in tokens) == text.encode()


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_is_tokenised_like_the_tokenizers_library_and_comes_back(text):
    model = tiny()[0]
    tokens = model.tokenize(text)
    assert tokens.tolist() == hf_tokens(text)
    assert b"".join(model.piece(t) for t in tokens) == text.encode()


def test_special_tokens_are_parsed_only_when_asked_for():
    model = tiny()[0]
    assert model.tokenize(b"<|bos|>", parse_special=True).tolist() == [BOS_ID]
    assert len(model.tokenize(b"<|bos|>")) > 1
    assert [model.is_special(t) for t in (BOS_ID, EOS_ID, 2, 511)] == [True, True, False, False]
    assert (model.bos, model.eos, model.add_bos) == (BOS_ID, EOS_ID, True)
    assert model.is_end(EOS_ID)
    assert not model.is_end(100)
    assert model.piece(BOS_ID) == b"<|bos|>"
    with pytest.raises(ShapeError, match="vocabulary of 512"):
        model.piece(512)


def test_chat_uses_the_models_own_template():
    messages = [{"role": "user", "content": "hi"}]
    assert tiny()[0].chat(messages) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny()[0].chat(messages, add_assistant=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_model_says_what_it_is_and_needs_no_gpu(tmp_path):
    write_tiny_llama(tmp_path / "a.gguf", blocks=2)
    shares = []
    with Model(tmp_path / "a.gguf", n_gpu_layers=-1, use_mmap=False, progress=shares.append) as model:
        assert (model.n_embd, model.n_layer, model.n_vocab, model.n_ctx_train) == (64, 2, 512, 512)
        assert model.hook_points()["blocks.1.hook_resid_post"] == "l_out-1"
        session = Session(model, n_ctx=32)
    assert shares[-1] == 1.0
    with pytest.raises(LlamaError, match="closed"):
        session.decode([0], [0], [0])
    with pytest.raises(LlamaError, match=r"a\.gguf is closed"):
        model.tokenize(b"x")


def test_an_exception_of_the_progress_callback_ends_the_load(tmp_path):
    write_tiny_llama(tmp_path / "a.gguf", blocks=1)

    def progress(_share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tmp_path / "a.gguf", progress=progress)


def test_what_llama_cannot_load_comes_with_its_own_words_and_nothing_is_printed(tmp_path, capfd):
    path, strange = tmp_path / "a.gguf", tmp_path / "strange.gguf"
    write_tiny_llama(path, blocks=1)
    strange.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(LlamaError, match=r"cannot load .*strange\.gguf: .*attn_q") as caught:
        Model(strange)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_unembedding_of_the_last_residual_equals_the_logits(dtype, tied):
    model, weights = tiny(dtype, tied)
    unembedding = model.unembed()
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert np.array_equal(unembedding.W_VD, head)
    assert np.array_equal(unembedding.weight_D, weights["model.norm.weight"])
    assert (unembedding.kind, unembedding.tied, unembedding.softcap) == ("rms", tied, 0)
    with exact(model) as session:
        points = [HookPoint.parse(p) for p in ("blocks.3.hook_resid_post", "ln_final", "logits")]
        (values,) = capture(session, sequences()[:1], points)
    x = values["blocks.3.hook_resid_post"]
    assert relative(unembedding.norm(x), values["ln_final.hook_normalized"]) < 1e-6
    tolerance = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2}[dtype]  # llama.cpp rounds x like the weights
    assert relative(unembedding.logits(x), values["logits"]) < tolerance


def test_an_unknown_architecture_is_named_by_the_unembedding(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LlamaError, match=r"architecture 'mamba'.*llama"):
        read_unembedding(tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
def test_a_random_copy_keeps_everything_but_the_weights(tmp_path, dtype):
    source, copy, again, other = (tmp_path / f"{n}.gguf" for n in ("source", "copy", "again", "other"))
    write_tiny_llama(source, dtype=dtype)
    for path, seed in ((copy, 3), (again, 3), (other, 4)):
        write_random_copy(source, path, seed)
    assert copy.read_bytes() == again.read_bytes()
    a, b, c = (gguf.GGUFReader(p) for p in (source, copy, other))
    assert {k: f.contents() for k, f in a.fields.items()} == {k: f.contents() for k, f in b.fields.items()}
    for x, y, z in zip(a.tensors, b.tensors, c.tensors, strict=True):
        assert (x.name, x.tensor_type, x.shape.tolist()) == (y.name, y.tensor_type, y.shape.tolist())
        old, new, third = (gguf.quants.dequantize(t.data, t.tensor_type).ravel() for t in (x, y, z))
        if "norm" in x.name:
            assert np.all(new == 1)
        else:
            assert abs(np.corrcoef(old, new)[0, 1]) < 0.1
            assert abs(np.corrcoef(third, new)[0, 1]) < 0.1
            assert new.std() == pytest.approx(old.std(), rel=0.05)
            assert abs(new.mean()) < 0.1 * new.std()
    with Model(copy) as model, exact(model) as session:
        logits = session.decode([0, 5], [0, 0], [0, 1], logits="all")
        assert np.isfinite(logits).all()


def test_a_random_copy_of_a_type_it_cannot_write_is_refused(tmp_path):
    path = tmp_path / "q4.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    packed = gguf.quants.quantize(random_weights_matrix(), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"attn_q.weight has type Q4_0.*F32, F16, BF16, Q8_0"):
        write_random_copy(path, tmp_path / "copy.gguf", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["q4.gguf"]


def random_weights_matrix() -> np.ndarray:
    weights = random_weights(seed=0, blocks=1, d=64, heads=4, kv_heads=2, ff=96, vocab=300, tied=True)
    return weights["model.layers.0.self_attn.q_proj.weight"]


def test_the_cpu_is_listed_with_its_memory_and_the_versions_are_named():
    (cpu,) = [d for d in backends() if d["type"] == "cpu"]
    assert 0 < cpu["memory_free"] <= cpu["memory_total"]
    assert cpu["name"]
    assert versions()["llama-cpp-python"].startswith("0.3.")
