"""Windows: every row knows its document, window, position and byte, and no text is lost or invented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.readers import Document, ReadReport
from pipeline.corpus.windows import FLAG_BOS, FLAG_FIRST, FLAG_SPECIAL, windows
from sae.errors import ConfigError

BOS, EOS = 300, 301


class PairTokenizer:
    """Bytes, and the pair 'ab' as one token (256); 'z' counts as special. `prefix` acts like SentencePiece."""

    def __init__(self, *, add_bos=True, prefix=False):
        self.bos, self.eos, self.add_bos, self.prefix = BOS, EOS, add_bos, prefix

    def tokenize(self, data, *, parse_special=False):
        assert not parse_special
        data = (b" " if self.prefix and data else b"") + data
        pairs = data.replace(b"ab", b"\xff")
        return np.array([256 if byte == 0xFF else byte for byte in pairs], np.int32)

    def piece(self, token):
        return {BOS: b"<bos>", EOS: b"<eos>", 256: b"ab"}.get(token) or bytes([token])

    def is_special(self, token):
        return token in (ord("z"), BOS, EOS)


texts = st.lists(st.text(alphabet="abcz é\n", min_size=1, max_size=40), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts=texts, context=st.integers(2, 17), add_bos=st.booleans(), prefix=st.booleans())
def test_rows_give_every_document_back_and_say_where_they_are(texts, context, add_bos, prefix):
    model = PairTokenizer(add_bos=add_bos, prefix=prefix)
    documents = [Document(name=f"{i}", text=text) for i, text in enumerate(texts)]
    table = windows(model, documents, context)
    for index, text in enumerate(texts):
        data = text.encode()
        here = (table.doc_N == index) & (table.flags_N & FLAG_BOS == 0)
        joined = b"".join(model.piece(t) for t in table.token_N[here].tolist())
        assert joined == (b" " if prefix else b"") + data
        starts = table.byte_offset_N[here].tolist()
        pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
        expected = [model.piece(t) for t in table.token_N[here].tolist()]
        assert [p.lstrip() for p in pieces] == [p.lstrip() for p in expected]
        assert b"".join(pieces) == data
        assert table.documents[index].exact_offsets
    check_windows(table, model, context)


def check_windows(table, model, context):
    assert table.window_starts[0] == 0
    assert table.window_starts[-1] == table.rows
    for window in range(table.n_windows):
        rows = slice(table.window_starts[window], table.window_starts[window + 1])
        length = rows.stop - rows.start
        assert 1 + model.add_bos <= length <= context
        assert table.pos_N[rows].tolist() == list(range(length))
        assert set(table.window_N[rows].tolist()) == {window}
        assert len(set(table.doc_N[rows].tolist())) == 1
        first = table.flags_N[rows][0]
        assert first & FLAG_FIRST
        assert bool(first & FLAG_BOS) == model.add_bos
        assert not (table.flags_N[rows][1:] & (FLAG_FIRST | FLAG_BOS)).any()
        special = [t == BOS or model.is_special(t) for t in table.token_N[rows].tolist()]
        assert ((table.flags_N[rows] & FLAG_SPECIAL) > 0).tolist() == special
        if model.add_bos:
            assert table.token_N[rows][0] == BOS
            assert table.byte_offset_N[rows][0] == table.byte_offset_N[rows][1]


@settings(max_examples=50, deadline=None)
@given(texts=texts, context=st.integers(2, 9), limit=st.integers(2, 60), add_bos=st.booleans())
def test_a_limit_keeps_the_first_rows_of_the_unlimited_table(texts, context, limit, add_bos):
    model = PairTokenizer(add_bos=add_bos)
    documents = [Document(name=f"{i}", text=text) for i, text in enumerate(texts)]
    full = windows(model, documents, context)
    cut = windows(model, iter(documents), context, limit)
    assert cut.rows <= limit
    assert cut.rows >= min(limit, full.rows) - 1  # a window of BOS alone is dropped
    for name, column in cut.columns().items():
        np.testing.assert_array_equal(column, full.columns()[name][: cut.rows])
    check_windows(cut, model, context)


def test_only_the_documents_a_limit_reaches_are_read():
    def documents():
        yield Document(name="one", text="c" * 50)
        raise AssertionError("read too far")

    table = windows(PairTokenizer(), documents(), 10, 20)
    assert table.rows == 20
    assert [d.name for d in table.documents] == ["one"]


def test_a_tokenizer_that_changes_the_text_still_gives_offsets_near_the_truth():
    class Upper(PairTokenizer):
        def tokenize(self, data, *, parse_special=False):
            return super().tokenize(data.replace(b"\n", b""))

    table = windows(Upper(add_bos=False), [Document(name="n", text="cc\ndd\n\nee")], 50)
    assert not table.documents[0].exact_offsets
    assert table.byte_offset_N.tolist() == [0, 1, 3, 4, 7, 8]


def test_the_hash_follows_names_texts_and_window_length():
    def digest(name="n", text="abc", context=4):
        return windows(PairTokenizer(), [Document(name=name, text=text)], context).corpus_hash

    assert digest() == digest()
    assert len({digest(), digest(name="m"), digest(text="abd"), digest(context=5)}) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"context_tokens": 1}, "at least 2"),
        ({"context_tokens": 4, "packing": "dense"}, "documents"),
        ({"context_tokens": 4, "max_tokens": 1}, "empty corpus"),
    ],
)
def test_settings_that_cannot_give_a_row_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        windows(PairTokenizer(), [Document(name="n", text="c")], **call)


def test_a_document_without_tokens_is_named_in_the_report():
    class Deaf(PairTokenizer):
        def tokenize(self, data, *, parse_special=False):
            return super().tokenize(data.replace(b"c", b""))

    report = ReadReport()
    table = windows(Deaf(), [Document(name="mute", text="ccc"), Document(name="loud", text="d")], 4, report=report)
    assert report.skipped == [("mute", "no tokens")]
    assert [d.name for d in table.documents] == ["loud"]
