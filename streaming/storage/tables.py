"""Tables in Parquet: read whole or in part, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streaming.errors import StorageError
from streaming.storage.addresses import shown
from streaming.storage.clients import StorageOptions
from streaming.storage.objects import read_bytes, read_current, reading, replace, write_bytes

# Of a table that is read in part, decoded at once.
_BATCH_ROWS = 2**14


@dataclass(frozen=True)
class TableFile:
    """A Parquet file that was fetched, and of which some is decoded."""

    uri: str
    file: pq.ParquetFile

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return self.file.schema_arrow.names

    def rows(self, columns: Sequence[str], keep: pc.Expression | None = None) -> pa.Table:
        """Some columns of the rows for which a condition holds; no more of it is in memory at once than is kept.

        Raises:
            StorageError: it is damaged.
        """
        with _told(self.uri):
            names = list(columns)
            parts = [self.file.schema_arrow.empty_table().select(names)]
            for batch in self.file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                part = pa.Table.from_batches([batch]).select(names)
                parts.append(part if keep is None else part.filter(keep))
            return pa.concat_tables(parts)


def open_table(uri: str, storage_options: StorageOptions | None = None) -> TableFile:
    """A Parquet file of which some is to be read.

    Raises:
        StorageError: it does not exist, can't be read, or is no Parquet.
    """
    content = read_bytes(uri, storage_options)
    with _told(uri):
        return TableFile(uri, pq.ParquetFile(pa.BufferReader(content)))


@contextmanager
def reading_table(uri: str, storage_options: StorageOptions | None = None) -> Generator[pq.ParquetFile]:
    """A Parquet file of any size, fetched piece by piece as it is read.

    Raises:
        StorageError: it does not exist, can't be read, or is no Parquet.
    """
    with reading(uri, storage_options) as content, _told(uri), pq.ParquetFile(content) as file:
        yield file


def read_table(uri: str, storage_options: StorageOptions | None = None) -> pa.Table:
    """A Parquet file as an Arrow table.

    Raises:
        StorageError: it does not exist, can't be read, or is no Parquet.
    """
    return table_of(uri, read_bytes(uri, storage_options))


def table_of(uri: str, content: bytes) -> pa.Table:
    """The content of a Parquet file, read from `uri`, as an Arrow table.

    Raises:
        StorageError: it is no Parquet.
    """
    with _told(uri), pq.ParquetFile(pa.BufferReader(content)) as file:
        # In this thread alone: Arrow's own let go of the bytes at some later time, and where Python has ended
        # meanwhile, the process aborts: "terminate called without an active exception" (apache/arrow#34314).
        return file.read(use_threads=False)


def write_table(uri: str, table: pa.Table, storage_options: StorageOptions | None = None) -> None:
    """Writes an Arrow table as Parquet, whole or not at all.

    Raises:
        StorageError: it can't be written.
    """
    write_bytes(uri, parquet_of(table), storage_options)


def parquet_of(table: pa.Table) -> bytes:
    """An Arrow table as the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def update_rows(
    uri: str,
    rows: pa.Table,
    key: str,
    stays: Callable[[str], bool],
    storage_options: StorageOptions | None = None,
    damaged: Callable[[StorageError], None] | None = None,
) -> None:
    """Puts rows into a Parquet file, in the order of a text column; anew, if another process has written it meanwhile.

    A row takes the place of that with its key; of all others those stay whose key `stays`. With `damaged`, which is
    told, a file that is no Parquet is replaced as if there were none.

    Raises:
        StorageError: it can't be read or written.
    """
    new = {*cast("list[str]", rows[key].to_pylist())}
    while True:
        current, merged = read_current(uri, storage_options), rows
        try:
            if current.content is not None:
                before = table_of(uri, current.content)
                keep = [name not in new and stays(name) for name in cast("list[str]", before[key].to_pylist())]
                merged = pa.concat_tables([before.filter(pa.array(keep, pa.bool_())), rows])
        except StorageError as error:
            if damaged is None:
                raise
            damaged(error)
        if replace(uri, current, parquet_of(merged.sort_by(key)), storage_options):
            return


@contextmanager
def _told(uri: str) -> Generator[None]:
    """What Arrow raises over a damaged file, as our own error; of damaged pages that is an OSError."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(f"{shown(uri)}: not a whole Parquet file ({error}); write it again") from error
