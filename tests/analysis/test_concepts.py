"""Properties of Python source, byte by byte, on a source small enough to read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis.concepts import PROPERTIES, agreements, mark_source, row_properties
from pipeline.analysis.firings import Firings

SOURCE = '''"""Módule doc."""
import os, sys
from re import compile as c  # ünïcode note

@decorated(1)
class A(Base):
    """Class doc."""
    def f(self, x: int = 3) -> None:
        if x > 2 and not y:
            raise ValueError("bad" + repr(x)[0])
        for i in range(10):
            d = {"k": [i, (i, 2)]}
        with open("p") as fh:
            assert fh, "no"
        try:
            return lambda z: z
        except OSError as e:
            pass
'''.encode()


def marked(name):
    marks = mark_source(SOURCE)
    assert marks is not None
    return b"".join(SOURCE[i : i + 1] if on else b"\0" for i, on in enumerate(marks[PROPERTIES.index(name)]))


def runs(name):
    return [part.decode() for part in marked(name).split(b"\0") if part]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inside a docstring", ['"""Módule doc."""', '"""Class doc."""']),
        ("inside a string that is no docstring", ['"bad"', '"k"', '"p"', '"no"']),
        ("inside a comment", ["# ünïcode note"]),
        ("in an import statement", ["import os, sys", "from re import compile as c"]),
        ("in a decorator", ["@decorated(1)"]),
        ("in a raise statement", ['raise ValueError("bad" + repr(x)[0])']),
        ("inside a call's arguments", ["(1)", '("bad" + repr(x)[0])', "(10)", '("p")']),
        ("inside a subscript", ["0"]),
        ("in a dict display", ['{"k": [i, (i, 2)]}']),
        ("in a list, tuple or set display", ["[i, (i, 2)]"]),
        ("in an if or while condition", ["x > 2 and not y"]),
        ("in a comparison", ["x > 2"]),
        ("in a for header", ["for i in range(10)"]),
        ("in an assert statement", ['assert fh, "no"']),
        ("in a number", ["1", "3", "2", "0", "10", "2"]),
        ("on an assignment's left side", ["d"]),
        ("in a lambda or comprehension", ["lambda z: z"]),
        ("in a return statement", ["return lambda z: z"]),
    ],
)
def test_a_property_marks_exactly_its_bytes(name, expected):
    assert runs(name) == expected


def test_headers_end_where_the_body_begins():
    assert runs("in a def's signature")[0].startswith("def f(self, x: int = 3) -> None:")
    assert runs("in a class header")[0].startswith("class A(Base):")
    assert "ValueError" not in marked("in a def's signature").decode(errors="replace")


def test_a_source_that_does_not_parse_has_no_properties():
    assert mark_source(b"def (:") is None
    assert mark_source(b"x = '\\d'\n") is not None  # an invalid escape warns nobody


def test_rows_take_the_property_of_their_tokens_last_byte_and_agreements_name_the_latent():
    data = b'"""' + b"doc " * 5 + b'"""\n' + b"y = 1\n" * 10
    table = SimpleNamespace(
        byte_offset_N=np.arange(len(data)),
        doc_N=np.zeros(len(data), int),
        documents=[SimpleNamespace(name="a.py", bytes=len(data), exact_offsets=True)],
    )
    rows = np.arange(len(data))
    properties, known = row_properties(table, rows, np.ones(len(data), int), {"a.py": data})
    assert known.all()
    assert properties[PROPERTIES.index("inside a docstring")].sum() == 26
    fires = np.r_[np.arange(20), 40]  # latent 0: 20 of 21 firings in the docstring; latent 1: anywhere
    everywhere = np.arange(0, len(data), 2)
    firings = Firings(
        row_E=np.r_[fires, everywhere, np.arange(50, 60)],
        latent_E=np.r_[np.zeros(21, int), np.ones(len(everywhere), int), np.zeros(10, int)],
        value_E=np.r_[np.full(21 + len(everywhere), 3.0), np.ones(10)].astype(np.float32),  # ten weak ones elsewhere
        table_row_N=rows,
        token_N=rows,
        num_latents=3,
    )
    found = agreements(firings, properties, known)
    assert set(found) == {0}
    assert found[0].name == "inside a docstring"
    assert found[0].share == pytest.approx(20 / 21)
    assert found[0].base == pytest.approx(26 / len(data))
    assert agreements(firings, properties, known, strong=0) == {}  # with the weak firings: 20 of 31
    assert agreements(firings, properties, known, min_firings=22) == {}
    assert agreements(firings, properties, np.zeros(len(data), bool)) == {}


def test_documents_whose_text_is_not_the_captured_one_are_unknown():
    table = SimpleNamespace(
        byte_offset_N=np.arange(3),
        doc_N=np.zeros(3, int),
        documents=[SimpleNamespace(name="a.py", bytes=99, exact_offsets=True)],
    )
    _, known = row_properties(table, np.arange(3), np.ones(3, int), {"a.py": b"x=1"})
    assert not known.any()


def test_of_several_properties_the_rarer_names_the_latent_and_only_known_rows_count():
    properties_CN = np.zeros((len(PROPERTIES), 400), bool)
    common, rare = PROPERTIES.index("inside a call's arguments"), PROPERTIES.index("in a number")
    properties_CN[common, :120] = properties_CN[rare, :30] = True
    properties_CN[rare, 300:] = True  # of documents that do not parse nothing is known
    known_N = np.arange(400) < 300
    firings = Firings(
        row_E=np.r_[np.arange(29), 60], latent_E=np.zeros(30, int), value_E=np.ones(30, np.float32),
        table_row_N=np.arange(400), token_N=np.arange(400), num_latents=1,
    )  # fmt: skip
    found = agreements(firings, properties_CN, known_N)[0]  # all in calls, 29 of 30 in numbers too
    assert found.name == "in a number"
    assert (found.share, found.base) == (pytest.approx(29 / 30), pytest.approx(30 / 300))
