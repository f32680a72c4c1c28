"""The embedded model: llama.cpp tokenises like its trainer, and it compresses held-out code better than xz."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from models.pylm import data
from models.pylm.measure import NGram, model_bits
from models.pylm.train import TOKENIZER
from pipeline.config import ModelConfig
from pipeline.corpus.stdlib import is_held_out, stdlib_files, stdlib_root
from pipeline.llama.model import Model
from pipeline.llama.session import Session
from pipeline.stages.inputs import model_path


@pytest.fixture(scope="module")
def model():
    with Model(model_path(ModelConfig())) as model:
        yield model


def test_llama_cpp_tokenises_every_stdlib_file_like_the_trainer(model):
    tokenizer = data.load_tokenizer(TOKENIZER)
    files = 0
    for name, text in data.documents(held_out=False) + data.documents(held_out=True):
        (expected,) = data.encode(tokenizer, [text])
        assert np.array_equal(model.tokenize(text.encode()), expected), name
        files += 1
    assert files > 400


def test_special_tokens_spelled_out_in_a_text_stay_text(model):
    ids = model.tokenize(b"x = '<|bos|>' + '<|eos|>'")
    assert not {data.BOS_ID, data.EOS_ID} & set(ids.tolist())
    assert b"".join(model.piece(int(i)) for i in ids) == b"x = '<|bos|>' + '<|eos|>'"


def test_the_file_is_small_and_of_the_shape_its_readme_says(model):
    assert (model.id.architecture, model.n_embd, model.n_layer, model.n_vocab) == ("llama", 256, 6, 4096)
    assert (model.bos, model.eos, model.add_bos) == (data.BOS_ID, data.EOS_ID, True)
    assert model_path(ModelConfig()).stat().st_size <= 12_000_000


def test_held_out_code_costs_at_least_a_tenth_less_than_xz(model):
    """On a few whole held-out files; `python -m models.pylm.measure` does all of them."""
    texts = [text for _, text in data.documents(held_out=True) if 2_000 < len(text) < 12_000][:8]
    assert len(texts) == 8
    session = Session(model, n_ctx=model.n_ctx_train, n_ubatch=model.n_ctx_train)
    bits = sum(model_bits(model, session, model.tokenize(text.encode()), model.n_ctx_train) for text in texts)
    session.close()
    xz_bits = sum(8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) for text in texts)
    assert bits <= 0.9 * xz_bits


def test_the_held_out_rule_takes_about_a_tenth_by_name_alone():
    names = [f"package/module_{i}.py" for i in range(20_000)]
    share = sum(map(is_held_out, names)) / len(names)
    assert abs(share - 0.1) < 0.01
    files = stdlib_files()
    assert [n for n, _ in files] == sorted(n for n, _ in files)
    assert all(not set(p.relative_to(stdlib_root()).parts) & {"test", "site-packages"} for _, p in files)


def test_the_ngram_baseline_is_a_probability_distribution():
    ngram = NGram([np.array([2, 3, 2, 3, 4]), np.array([3, 3])], vocab=6)
    for context in ([], [2], [2, 3], [5, 5]):
        bits = [ngram.bits(np.array([*context, t])) - ngram.bits(np.array(context, int)) for t in range(6)]
        assert np.isclose(sum(2.0**-b for b in bits), 1.0)
