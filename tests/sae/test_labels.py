"""Labels of latents: what a side file may hold, and what is refused."""

from __future__ import annotations

import json

import pytest

from sae.errors import ConfigError, FormatError
from sae.labels import checked_labels, read_labels


def side_file(tmp_path, value):
    path = tmp_path / "labels.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_both_forms_of_a_side_file_are_read_in_the_order_of_the_latents(tmp_path):
    labels = {"7": "يک\u200cنام", "3": "end of a sentence (prose)"}
    wanted = {3: "end of a sentence (prose)", 7: "يک\u200cنام"}
    whole = {"format": "ggscope-labels", "version": 1, "sae_id": "ab", "labels": labels}
    for value in (labels, whole, whole | {"sae_id": ""}):
        found = read_labels(side_file(tmp_path, value), num_latents=8, sae_ids={"ab"})
        assert list(found.items()) == list(wanted.items())
    assert read_labels(side_file(tmp_path, whole), num_latents=8, sae_ids={"cd", "ab"}) == wanted
    assert read_labels(side_file(tmp_path, labels), num_latents=8) == wanted
    with pytest.raises(FormatError, match="the labels are of SAE 'ab', this one has no id"):
        read_labels(side_file(tmp_path, whole), num_latents=8)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([["3", "x"]], "expected an object of labels"),
        ({"8": "x"}, r"latent 8: this SAE has latents 0\.\.7"),
        ({"-1": "x"}, "must be a number, got '-1'"),
        ({"²": "x"}, "must be a number"),
        ({"9" * 5000: "x"}, "must be a number"),
        ('{"03": "y"}', "must be a number, got '03'"),
        ('{"3": "x", "3": "y"}', "latent 3 has two labels"),
        ({"3": 1}, "expected a text of 1 to 1024 bytes"),
        ({"3": "  "}, "expected a text"),
        ({"3": "x" * 1025}, "expected a text"),
        ({"3": "a\nb"}, "characters that are not shown"),
        ({"3": "\x1b[31mred"}, "characters that are not shown"),
        ({"3": "\u202eevil"}, "characters that are not shown"),
        ('{"3": "\\ud800"}', "characters that are not shown"),
        ({"format": "ggscope-labels", "version": 2, "labels": {}}, "version 1"),
        ({"format": "other", "version": 1, "labels": {}}, "expected format ggscope-labels"),
        ({"format": "ggscope-labels", "version": 1, "labels": []}, "expected an object 'labels'"),
        ({"format": "ggscope-labels", "version": 1, "sae_id": "cd", "labels": {}}, "are of SAE 'cd', this one is ab"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_file(tmp_path, value, said):
    path = side_file(tmp_path, value)
    with pytest.raises(FormatError, match=said) as caught:
        read_labels(path, num_latents=8, sae_ids={"ab"})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_and_a_huge_file_are_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_labels(tmp_path / "none.json", num_latents=8)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(FormatError, match="too many for labels"):
        read_labels(tmp_path / "huge.json", num_latents=8)


def test_labels_given_in_code_are_held_to_the_same():
    assert checked_labels({2: "b", 1: "a"}.items(), 3) == {1: "a", 2: "b"}
    for wrong in ({3: "x"}, {1.0: "x"}, {True: "x"}):
        with pytest.raises(ConfigError):
            checked_labels(wrong.items(), 3)
