"""Hugging Face `datasets`, streamed. A record is named `dataset/split:shard:row`, both from 0 on.

The shards come in a seeded order, the records shuffled within blocks; the library's own shuffle buffer is
not used, since it is lost when an iteration is continued. `state()` holds the library's `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from sae.errors import ConfigError

from ..documents import Record
from ..files import optional, reason
from .records import Keep, RecordForm, Records, shuffled


def datasets_records(
    dataset: str, config: str, split: str, paths: list[str], form: RecordForm, *, keep: Keep, seed: int
) -> Records:
    """Raises ConfigError where the dataset cannot be opened or lacks a column."""
    if not dataset:
        raise ConfigError(
            "missing required setting: corpus.dataset; give it as corpus.dataset=owner/name, or json, parquet, ... with corpus.paths"
        )
    library = optional("datasets")
    library.config.TORCH_AVAILABLE = False  # or it imports torch, which must not share a process with llama.cpp
    try:
        found = library.load_dataset(dataset, config or None, split=split, streaming=True, data_files=paths or None)
        columns = found.column_names or []
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise ConfigError(f"corpus.dataset={dataset} cannot be opened ({reason(error)[:300]})") from None
    missing = [field for field in form.fields if columns and field not in columns]
    if missing:
        raise ConfigError(f"{dataset} has no column {missing[0]!r}; it has {', '.join(columns[:20])}")
    label = f"{dataset}/{config}/{split}" if config else f"{dataset}/{split}"
    if columns:
        found = found.select_columns(form.fields)
    return shuffled(_Stream(found, label, form, keep=keep, seed=seed), seed)


class _Stream(Records):
    """The shards of an iterable dataset one after another."""

    def __init__(self, dataset: Any, label: str, form: RecordForm, *, keep: Keep, seed: int) -> None:
        self.dataset, self.label, self.form, self.keep = dataset, label, form, keep
        count = dataset.num_shards
        self.order = np.random.default_rng(seed).permutation(count).tolist() if seed >= 0 else list(range(count))
        self.shard = self.row = 0
        self.inner: Any = None  # the shard being read
        self.inner_state: Any = None  # where to go on in it

    def __iter__(self) -> Iterator[Record]:
        while self.shard < len(self.order):
            for name, row in self._rows(self.order[self.shard]):
                if self.keep(name):
                    yield Record(name, partial(self.form.document, name, row), _size_bytes(row))
            self.shard, self.row, self.inner, self.inner_state = self.shard + 1, 0, None, None

    def _rows(self, shard: int) -> Iterator[tuple[str, dict[str, Any]]]:
        library = optional("datasets")
        self.inner = self.dataset.shard(num_shards=len(self.order), index=shard)
        if self.inner_state is not None:
            self.inner.load_state_dict(self.inner_state)
        try:
            for row in self.inner:
                self.row += 1
                yield f"{self.label}:{shard}:{self.row - 1}", row
        except (OSError, ValueError, library.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"{self.label} cannot be read after record {self.row} of shard {shard} ({reason(error)[:300]}); "
                f"files with broken records can be read with corpus=jsonl or corpus=parquet"
            ) from None

    def state(self) -> Any:
        inner = self.inner.state_dict() if self.inner is not None else self.inner_state
        return {"shard": self.shard, "row": self.row, "of": len(self.order), "inner": inner}

    def restore(self, state: Any) -> bool:
        self.shard, self.row, self.inner_state = state["shard"], state["row"], state["inner"]
        return state["of"] == len(self.order)


def _size_bytes(row: Any) -> int:
    """Roughly what the strings of a record hold."""
    if isinstance(row, str):
        return len(row)
    if isinstance(row, dict):
        return sum(map(_size_bytes, row.values()))
    return sum(map(_size_bytes, row)) if isinstance(row, list) else 8
