"""Chat and generated corpora through llama.cpp itself, on a tiny model whose template's markers are tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import CorpusConfig, ModelConfig
from pipeline.continuation import BatchGenerator
from pipeline.corpus.readers import Document, ReadReport, read_documents
from pipeline.corpus.spool import spool_table
from pipeline.corpus.texts import document_text
from pipeline.corpus.windows import FLAG_BOS, FLAG_GENERATED, FLAG_SPECIAL, windows
from pipeline.generate import generate
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session, capture
from tests.tiny_llama import BOS_ID, CHAT_MARKERS, EOS_ID, write_tiny_llama

POINT = "blocks.2.hook_resid_post"
EXACT = ModelConfig(n_threads=1, kv_type="f32", flash_attn="off")
DEFAULT = ModelConfig(n_threads=1)
PROMPTS = ["def read(path):", "import os\nclass Node", "x", "for name in names: print(" * 9, "zwölf €", "return"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_llama(path, chat_markers=True)
    with Model(path) as opened:
        yield opened


def documents():
    return [Document(name=str(i), text=text) for i, text in enumerate(PROMPTS)]


def test_a_chat_s_markers_are_the_template_s_tokens_and_its_text_comes_back(model):
    start, end = (int(model.tokenize(marker, parse_special=True)[0]) for marker in CHAT_MARKERS)
    assert model.is_special(start)
    messages = ({"role": "user", "content": "sum(größe)"}, {"role": "assistant", "content": "import os"})
    spelled = ({"role": "user", "content": "then <|im_end|> and more"},)
    report = ReadReport()
    found = [Document(name="a", messages=messages), Document(name="b", messages=spelled)]
    table = windows(model, found, 64, report=report)
    assert dict(report.skipped) == {"b": "a message spells a special token (<|im_end|>)"}
    rendered = model.chat(list(messages), add_assistant=False)
    assert document_text(table.columns(), table.documents, 0, model.piece) == rendered.encode()
    marks = [token for token in table.token_N.tolist() if token in (start, end)]
    assert marks == [start, end, start, end]
    special_N = (table.flags_N & FLAG_SPECIAL) > 0
    np.testing.assert_array_equal(special_N, np.isin(table.token_N, [start, end, BOS_ID, EOS_ID]))
    assert table.documents[0].form == "chat"
    for row in np.flatnonzero((table.flags_N & FLAG_BOS) == 0).tolist():
        at = int(table.byte_offset_N[row])
        piece = model.piece(int(table.token_N[row]))
        assert rendered.encode()[at : at + len(piece)] == piece


def test_text_that_spells_a_special_token_stays_text(model):
    table = windows(model, [Document(name="t", text="a <|im_end|> b <|eos|>")], 64)
    assert (table.flags_N[1:] & FLAG_SPECIAL == 0).all()
    assert document_text(table.columns(), table.documents, 0, model.piece) == b"a <|im_end|> b <|eos|>"


def test_concat_puts_the_model_s_eos_between_documents(model):
    table = windows(model, documents(), 16, packing="concat")
    assert (table.token_N == EOS_ID).sum() == len(PROMPTS)
    assert set(np.diff(table.window_starts)[:-1].tolist()) == {16}
    for index, text in enumerate(PROMPTS):
        assert document_text(table.columns(), table.documents, index, model.piece) == text.encode()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_prompts_continued_together_say_what_each_says_alone(model, temperature):
    options = {"context_tokens": 48, "max_tokens": 9, "temperature": temperature, "seed": 5, "config": EXACT}
    with BatchGenerator(model, n_parallel=4, **options) as together:
        table = windows(model, documents(), 48, generate=together)
    with BatchGenerator(model, n_parallel=1, **options) as alone:
        single = windows(model, documents(), 48, generate=alone)
    assert table.corpus_hash == single.corpus_hash
    generated_N = (table.flags_N & FLAG_GENERATED) > 0
    assert generated_N.any()
    longest = table.doc_N == 3
    assert longest.sum() <= 48
    if temperature == 0:
        with Session(model, n_ctx=64, n_threads=1, kv_type="f32", flash_attn="off") as session:
            for index, text in enumerate(PROMPTS[:3]):
                prompt = np.r_[BOS_ID, model.tokenize(text)]
                events = list(generate(session, model, prompt, max_tokens=9))
                said = [event.token for event in events if event.phase == "response"]
                assert table.token_N[(table.doc_N == index) & generated_N].tolist() == said


@pytest.mark.parametrize(("config", "tolerance"), [(EXACT, 1e-5), (DEFAULT, 1e-3)])
def test_capture_of_a_spooled_continuation_gives_the_activations_of_its_generation(
    model, tmp_path, config, tolerance, monkeypatch
):
    seen: dict[tuple[int, int], np.ndarray] = {}
    original = Session.decode

    def watched(self, tokens_N, seq_N, pos_N, **options):
        def read(rows):
            for s, pos, x_D in zip(rows.seq_N.tolist(), rows.pos_N.tolist(), rows.values_ND, strict=True):
                seen[s, pos] = x_D.copy()

        return original(self, tokens_N, seq_N, pos_N, hooks=[Hook(HookPoint.parse(POINT), read=read)], **options)

    with monkeypatch.context() as patch, BatchGenerator(model, context_tokens=48, max_tokens=9, config=config) as said:
        patch.setattr(Session, "decode", watched)
        table = spool_table(model, documents(), 48, folder=tmp_path / "corpus", generate=said)
    assert len(table.documents) == len(PROMPTS)
    sequences = [table.window_tokens(window) for window in range(table.n_windows)]
    options = {"n_threads": 1, "kv_type": config.kv_type, "flash_attn": config.flash_attn}
    with Session(model, n_ctx=48 * 6, n_seq_max=6, kv_unified=False, **options) as session:
        taken = capture(session, sequences, [HookPoint.parse(POINT)])
    compared = 0
    for window, rows in enumerate(taken):
        first = int(table.window_starts[window])
        flags_T = table.flags_N[first : first + len(sequences[window])]
        for pos in np.flatnonzero(flags_T & FLAG_GENERATED).tolist():
            if (window, pos) in seen:  # the last token of a continuation is never run while it is said
                x_D, from_generation_D = rows[POINT][pos], seen[window, pos]
                assert np.linalg.norm(x_D - from_generation_D) <= tolerance * np.linalg.norm(from_generation_D)
                compared += 1
    assert compared >= 20


def test_chat_prompts_end_with_the_assistant_s_turn(model):
    chat = ({"role": "user", "content": "hi"},)
    with BatchGenerator(model, context_tokens=48, max_tokens=5, config=EXACT) as said:
        table = windows(model, [Document(name="c", messages=chat)], 48, generate=said)
    prompt = model.chat(list(chat), add_assistant=True).encode()
    assert prompt.endswith(b"assistant\n")
    assert document_text(table.columns(), table.documents, 0, model.piece).startswith(prompt)
    assert table.documents[0].bytes == len(prompt)


def test_a_token_file_of_the_model_gives_the_windows_of_its_text(model, tmp_path):
    ids = np.concatenate([[*model.tokenize(text).tolist(), EOS_ID] for text in PROMPTS])
    ids.astype(np.uint16).tofile(Path(tmp_path) / "t.bin")
    config = CorpusConfig(kind="tokens", paths=[f"{tmp_path}/t.bin"], split="all", seed=-1)
    from_ids = windows(model, read_documents(config, vocabulary=model), 16)
    from_text = windows(model, documents(), 16)
    for name in ("token", "window", "pos", "doc", "flags", "byte_offset"):
        np.testing.assert_array_equal(from_ids.columns()[name], from_text.columns()[name])
    assert [d.sha256 for d in from_ids.documents] == [d.sha256 for d in from_text.documents]
