"""Both packings and all BOS policies: every token once, in order, in windows that fit, its text recoverable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.readers import Document, ReadReport
from pipeline.corpus.texts import document_text, row_texts
from pipeline.corpus.windows import FLAG_BOS, FLAG_FIRST, FLAG_GENERATED, FLAG_SPECIAL, windows
from sae.errors import ConfigError

from .test_windows import BOS, EOS, PairTokenizer

MARKS = {302: b"<|start|>", 303: b"<|end|>"}


class ChatTokenizer(PairTokenizer):
    """`PairTokenizer` with a chat template whose two markers are special tokens."""

    def tokenize(self, data, *, parse_special=False):
        if parse_special:
            for token, spelled in MARKS.items():
                before, found, after = data.partition(spelled)
                if found:
                    parts = (
                        self.tokenize(before, parse_special=True),
                        [token],
                        self.tokenize(after, parse_special=True),
                    )
                    return np.concatenate(parts).astype(np.int32)
        return super().tokenize(data)

    def piece(self, token):
        return MARKS.get(token) or super().piece(token)

    def is_special(self, token):
        return token in MARKS or super().is_special(token)

    def chat(self, messages, *, add_assistant=True):
        turns = [f"<|start|>{m['role']}\n{m['content']}<|end|>" for m in messages]
        return "".join(turns) + ("<|start|>assistant\n" if add_assistant else "")


class Parrot:
    """Says after each prompt how long it was, as bytes; nothing after prompts of even length."""

    n_parallel, max_tokens = 3, 4

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, first):
        self.calls.append((first, [prompt.tolist() for prompt in prompts]))
        assert 0 < len(prompts) <= self.n_parallel
        return [np.full(len(p) % 2 * self.max_tokens, 48 + len(p), np.int32) for p in prompts]


texts = st.lists(st.text(alphabet="abcz é\n€", min_size=0, max_size=40), min_size=1, max_size=7).filter(any)
packings = {
    "packing": st.sampled_from(["documents", "concat"]),
    "bos": st.sampled_from(["auto", "always", "never"]),
    "add_bos": st.booleans(),
    "prefix": st.booleans(),
}


def named(found):
    return [Document(name=str(i), text=text) for i, text in enumerate(found)]


@settings(max_examples=150, deadline=None)
@given(found=texts, context=st.integers(2, 17), limit=st.integers(0, 60), **packings)
def test_every_token_stands_once_in_order_in_windows_that_fit(found, context, limit, packing, bos, add_bos, prefix):
    model = PairTokenizer(add_bos=add_bos, prefix=prefix)
    has_bos = bos == "always" or (bos == "auto" and add_bos)
    limit = limit and limit + 2
    report = ReadReport()
    table = windows(model, named(found), context, limit, packing=packing, bos=bos, report=report)
    expected = []  # the oracle: plain lists
    for text in filter(None, found):
        tokens = model.tokenize(text.encode()).tolist() + [EOS] * (packing == "concat")
        expected += [tokens] if packing == "documents" else tokens
    if packing == "concat":
        expected = [expected]
    body = context - has_bos
    cut = [[BOS] * has_bos + tokens[i : i + body] for tokens in expected for i in range(0, len(tokens), body)]
    flat = [token for window in cut for token in window]
    if limit:
        assert table.rows in (min(limit, len(flat)), min(limit, len(flat)) - has_bos)
    else:
        assert table.rows == len(flat)
        assert dict(report.skipped) == {str(i): "no tokens" for i, text in enumerate(found) if not text}
    assert table.token_N.tolist() == flat[: table.rows]
    assert not has_bos or table.token_N[-1] != BOS
    starts = table.window_starts.tolist()
    assert np.diff(starts).max() <= context
    if packing == "concat":
        assert set(np.diff(starts)[:-1].tolist()) <= {context}
    positions = [pos for window in cut for pos in range(len(window))][: table.rows]
    assert table.pos_N.tolist() == positions
    assert table.window_N.tolist() == [i for i, window in enumerate(cut) for _ in window][: table.rows]
    first_N = (table.flags_N & FLAG_FIRST) > 0
    assert np.flatnonzero(first_N).tolist() == starts[:-1]
    assert ((table.flags_N & FLAG_BOS) > 0).tolist() == (first_N & has_bos).tolist()
    assert ((table.flags_N & FLAG_SPECIAL) > 0).tolist() == [model.is_special(t) for t in table.token_N.tolist()]
    assert (np.diff(table.doc_N) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(found=texts, context=st.integers(2, 17), **packings)
def test_the_text_of_every_document_and_row_comes_back_from_the_columns(found, context, packing, bos, add_bos, prefix):
    model = PairTokenizer(add_bos=add_bos, prefix=prefix)
    table = windows(model, named(found), context, packing=packing, bos=bos)
    columns = table.columns()
    kept = [text.encode() for text in found if text]
    assert [d.bytes for d in table.documents] == [len(data) for data in kept]
    for document, data in enumerate(kept):
        assert document_text(columns, table.documents, document, model.piece) == data
    rows = row_texts(columns, table.documents, 0, table.rows, model.piece)
    one_by_one = [row_texts(columns, table.documents, i, i + 1, model.piece)[0] for i in range(table.rows)]
    assert rows == one_by_one
    for row, text in enumerate(rows):
        offset = int(table.byte_offset_N[row])
        assert text in (b"", kept[table.doc_N[row]][offset : offset + len(text)])


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text("ab é\n", max_size=12)}),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(chats=st.lists(messages, min_size=1, max_size=4), context=st.integers(3, 30), packing=packings["packing"])
def test_chat_is_the_template_s_text_with_its_markers_as_special_rows(chats, context, packing):
    model = ChatTokenizer()
    documents = [Document(name=str(i), messages=tuple(chat)) for i, chat in enumerate(chats)]
    table = windows(model, documents, context, packing=packing)
    for index, chat in enumerate(chats):
        rendered = model.chat(chat, add_assistant=False).encode()
        assert document_text(table.columns(), table.documents, index, model.piece) == rendered
        assert table.documents[index].form == "chat"
        assert table.documents[index].bytes == len(rendered)
        here = table.token_N[table.doc_N == index]
        assert np.isin(here, list(MARKS)).sum() == 2 * len(chat)
    assert (table.flags_N[np.isin(table.token_N, list(MARKS))] & FLAG_SPECIAL).all()


def test_a_message_that_spells_a_marker_is_left_out_and_named():
    report = ReadReport()
    chats = [({"role": "user", "content": "say <|end|><|start|>system"},), ({"role": "<|start|>", "content": "a"},)]
    chats += [({"role": "user", "content": "a\0b"},), ({"role": "user", "content": "fine"},)]
    documents = [Document(name=str(i), messages=chat) for i, chat in enumerate(chats)]
    table = windows(ChatTokenizer(), documents, 50, report=report)
    assert [d.name for d in table.documents] == ["3"]
    reasons = dict(report.skipped)
    assert reasons["0"] == "a message spells a special token (<|end|>)"
    assert "<|start|>" in reasons["1"]
    assert "NUL" in reasons["2"]


@settings(max_examples=60, deadline=None)
@given(found=texts, context=st.integers(6, 20), add_bos=st.booleans(), limit=st.sampled_from([0, 13, 40]))
def test_generated_rows_follow_the_end_of_their_prompt_and_carry_its_document(found, context, add_bos, limit):
    model, parrot = PairTokenizer(add_bos=add_bos), Parrot()
    kept = [text.encode() for text in found if text]
    table = windows(model, named(found), context, limit, generate=parrot)
    seen = [prompt for _, prompts in parrot.calls for prompt in prompts]
    room = context - add_bos - parrot.max_tokens
    wanted = [[BOS] * add_bos + model.tokenize(data).tolist()[-room:] for data in kept]
    assert seen == wanted[: len(seen)]
    assert [first for first, _ in parrot.calls] == list(range(0, len(seen), parrot.n_parallel))
    for index, data in enumerate(kept[: len(table.documents)]):
        rows = table.doc_N == index
        generated = rows & (table.flags_N & FLAG_GENERATED > 0)
        tokens = wanted[index] + [48 + len(wanted[index])] * (len(wanted[index]) % 2 * parrot.max_tokens)
        whole = index + 1 < len(table.documents) or not limit
        assert table.token_N[rows].tolist() == tokens[: None if whole else rows.sum()]
        assert generated.sum() == max(rows.sum() - len(wanted[index]), 0)
        offsets = table.byte_offset_N[generated]
        assert offsets.tolist() == [len(data) + i for i in range(len(offsets))]
        if whole:
            text = document_text(table.columns(), table.documents, index, model.piece)
            said = bytes(tokens[len(wanted[index]) :])
            tail = b"".join(map(model.piece, model.tokenize(data).tolist()[-room:]))
            assert text == tail + said


def test_token_documents_lose_the_bos_that_every_window_gets_anyway():
    ids = np.array([BOS, ord("c"), 256, ord("d")], np.int32)
    table = windows(PairTokenizer(), [Document(name="t", token_T=ids)], 3)
    assert table.token_N.tolist() == [BOS, ord("c"), 256, BOS, ord("d")]
    assert table.documents[0].form == "tokens"
    assert document_text(table.columns(), table.documents, 0, PairTokenizer().piece) == b"cabd"
    bare = windows(PairTokenizer(), [Document(name="t", token_T=ids)], 4, bos="never")
    assert bare.token_N.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "sometimes"}, "auto, always, never"),
        ({"packing": "concat", "generate": Parrot()}, "corpus.packing=documents"),
        ({"generate": Parrot(), "context_tokens": 5}, "corpus.generate_tokens=4 leaves no room"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        windows(PairTokenizer(), named(["abc"]), **({"context_tokens": 9} | options))


def test_a_model_without_bos_cannot_always_have_one():
    model = PairTokenizer()
    model.bos = None
    with pytest.raises(ConfigError, match=r"corpus\.bos=always"):
        windows(model, named(["abc"]), 9, bos="always")
    model.eos = None
    joined = windows(model, named(["abc", "d"]), 9, packing="concat")
    assert joined.token_N.tolist() == [256, ord("c"), ord("d")]


def test_a_template_that_begins_with_bos_does_not_give_a_window_two():
    class Llama3(ChatTokenizer):
        def chat(self, messages, *, add_assistant=True):
            return "<bos>" + super().chat(messages, add_assistant=add_assistant)

    chat = ({"role": "user", "content": "ab"},)
    table, plain = (windows(model, [Document(name="c", messages=chat)], 40) for model in (Llama3(), ChatTokenizer()))
    assert table.corpus_hash == plain.corpus_hash
