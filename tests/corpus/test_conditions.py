"""Conditions on records: what they keep, and what is said where they cannot be answered."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.conditions import parse_conditions, require
from pipeline.corpus.documents import NotMatchedError, UnusableError
from sae.errors import ConfigError

RECORD = {"lang": "en", "score": 0.5, "n": 3, "ok": True, "gone": None, "year": "1984", "meta": {"id": "test_7"}}


def holds(*conditions):
    try:
        require(parse_conditions(conditions), RECORD)
    except NotMatchedError:
        return False
    return True


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("lang==en", True),
        ("lang == en", True),
        ("lang!=en", False),
        ("score>=0.5", True),
        ("score>0.5", False),
        ("score<=0.50", True),
        ("n<3.5", True),
        ("n==3", True),
        ("n==3.0", True),
        ("ok==true", True),
        ("ok!=false", True),
        ("gone==null", True),
        ("gone==none", False),
        ("year==1984", True),  # the field holds a string: so the value is one
        ("year<1985", True),
        ("meta.id~^test_[0-9]$", True),
        ("meta.id~x", False),
        ("lang==", False),
    ],
)
def test_a_condition_holds_or_does_not(condition, expected):
    assert holds(condition) is expected


def test_all_conditions_must_hold():
    assert holds("lang==en", "score>=0.5")
    assert not holds("lang==en", "score>0.5")


@given(
    value=st.integers(-99, 99) | st.floats(-99, 99),
    limit=st.integers(-99, 99),
    sign=st.sampled_from(["<", "<=", ">", ">="]),
)
def test_numbers_are_ordered_as_numbers(value, limit, sign):
    answer = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[sign](value, limit)
    (condition,) = parse_conditions([f"x{sign}{limit}"])
    assert condition.holds({"x": value}) is answer


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("missing==1", "no field 'missing' \\(corpus.filter\\)"),
        ("meta.no==1", "no field 'meta.no'"),
        ("lang.deep==1", "no field 'lang.deep'"),
        ("gone>1", "'gone' is null"),
        ("meta>1", "'meta' is a dict"),
        ("n~3", "a int, which has no text"),
    ],
)
def test_a_record_that_cannot_answer_is_unusable_for_a_named_reason(condition, message):
    with pytest.raises(UnusableError, match=message):
        holds(condition)


@pytest.mark.parametrize(
    "text", ["", "lang", "==en", "lang=en", "lang=>3", "x~[", "score>", "__import__('os')", "a b==1"]
)
def test_what_is_no_condition_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"corpus\.filter") as caught:
        parse_conditions([text])
    assert "\n" not in str(caught.value)
