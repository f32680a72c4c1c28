"""What the report calls its corpus."""

from __future__ import annotations

import pytest

from pipeline.config import CorpusConfig
from pipeline.stages.report import corpus_name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CorpusConfig(), "the Python standard library"),
        (CorpusConfig(kind="jsonl", paths=["texts/a.jsonl", "b.jsonl"]), "a.jsonl, b.jsonl"),
        (CorpusConfig(kind="datasets", dataset="owner/name"), "owner/name"),
        (CorpusConfig(kind="datasets", dataset="json", paths=["texts/a.json"]), "json, a.json"),
    ],
)
def test_a_corpus_is_named_by_what_it_was_read_from(config, name):
    assert corpus_name(config) == name
