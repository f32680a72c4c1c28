"""Parquet: a record for each row, named `file:row` from 1 on. Only the columns in use are read.

Row groups come in a seeded order, their rows shuffled within blocks; at no time is more than a block held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sae.errors import ConfigError

from ..documents import Record, UnusableError
from ..files import CorpusFile, optional, reason
from .records import Keep, RecordForm, Records, StreamedRecords, broken, shuffled

BATCH_ROWS = 256
BY_PAGE = {"pre_buffer": False, "buffer_size": 1 << 20}  # or the whole column of a row group is read at once


def parquet_records(files: list[CorpusFile], form: RecordForm, *, keep: Keep, seed: int) -> Records:
    optional("pyarrow.parquet")
    units = [unit for file in files for unit in _units(file, form)]
    return shuffled(StreamedRecords(units, keep=keep, seed=seed), seed)


def _units(file: CorpusFile, form: RecordForm) -> Iterator[Callable[[], Iterator[Record]]]:
    """A reader for each row group. Raises ConfigError for a column no file of this kind can do without."""
    parquet, arrow = optional("pyarrow.parquet"), optional("pyarrow")
    try:
        with file.reading() as stream, parquet.ParquetFile(stream) as table:
            columns = table.schema_arrow.names
            rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except (UnusableError, arrow.ArrowException) as error:
        failure = str(error) if isinstance(error, UnusableError) else f"not Parquet ({reason(error)})"
        yield lambda: iter([broken(file.name, failure)])
        return
    missing = [field for field in form.fields if field not in columns]
    if missing:
        raise ConfigError(f"{file.name} has no column {missing[0]!r}; it has {', '.join(columns[:20])}")
    first = 1
    for group, n_rows in enumerate(rows):
        yield partial(_rows, file, group, first, form)
        first += n_rows


def _rows(file: CorpusFile, group: int, first: int, form: RecordForm) -> Iterator[Record]:
    parquet, arrow = optional("pyarrow.parquet"), optional("pyarrow")
    number = first
    try:
        with file.reading() as stream, parquet.ParquetFile(stream, **BY_PAGE) as table:
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=form.fields, use_threads=False):
                size_bytes = batch.nbytes // max(batch.num_rows, 1)
                for row in _values(batch):
                    name = f"{file.name}:{number}"
                    yield Record(name, partial(form.document, name, row), size_bytes)
                    number += 1
    except (UnusableError, arrow.ArrowException, UnicodeDecodeError) as error:
        failure = str(error) if isinstance(error, UnusableError) else f"unreadable ({reason(error)})"
        yield broken(f"{file.name}:{number}", f"{failure}; so is the rest of row group {group}")


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    for index in range(batch.num_rows):
        yield {name: batch.column(name)[index].as_py() for name in batch.schema.names}
