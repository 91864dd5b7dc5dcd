"""What stays of a build: parts of what was found out, the catalog that they become, and what else was seen."""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa

from streaming import storage
from streaming.catalog import Catalog, schema
from streaming.catalog.inspection import Rejected
from streaming.catalog.metadata_csv import with_metadata
from streaming.catalog.selection import folder_of
from streaming.catalog.writing import merge, write
from streaming.errors import MissingError, StorageError
from streaming.storage.staging import Staging


@dataclass(frozen=True)
class Known:
    """What earlier runs found out of a slide."""

    version: str
    mpp: float
    own_mpp: float | None
    mpp_from: str
    mask: str


def known_slides(out: str, options: storage.StorageOptions | None) -> dict[str, Known]:
    """What earlier runs found out, by slides and, for series, by folders."""
    known: dict[str, Known] = {}
    _, current = _catalog(out, options)
    for table in (current, *(table for _, table in _parts(out, options))):
        columns = (table[name].to_pylist() for name in ("version", "mpp", "own_mpp", "mpp_from", "mask"))
        for slide, *values in zip(cast("list[str]", table["slide"].to_pylist()), *columns, strict=True):
            known[slide] = known[folder_of(slide)] = Known(*cast(Any, values))
    return known


def _catalog(out: str, options: storage.StorageOptions | None) -> tuple[storage.Current, pa.Table]:
    """The `slides.parquet` that is there, and its table."""
    uri = storage.join(out, schema.SLIDES)
    current = storage.read_current(uri, options)
    if current.content is None:
        return current, schema.SCHEMA.empty_table()
    table = storage.table_of(uri, current.content)
    schema.check_version(table, uri)
    return current, table


def _parts(out: str, options: storage.StorageOptions | None) -> Iterator[tuple[str, pa.Table]]:
    """What this and other builds have saved, and what was saved when one was interrupted."""
    for name in storage.list_names(storage.join(out, schema.PARTS), options):
        part = storage.join(out, schema.PARTS, name)
        if name.endswith(".parquet"):
            with contextlib.suppress(MissingError):  # another build has just put it in the catalog
                table = storage.read_table(part, options)
                schema.check_version(table, part)
                yield part, table


def commit(
    out: str,
    told: Callable[[str], Mapping[str, str]],
    options: storage.StorageOptions | None,
    staging: Staging,
) -> pa.Table:
    """Puts what is saved in the catalog, and gives its table; nothing is written where there is no slide.

    Raises:
        CatalogError: there is a catalog of another version.
        StorageError: it can't be read or written.
    """
    while True:
        current, before = _catalog(out, options)
        parts = list[str]()

        def tables(before: pa.Table = before, parts: list[str] = parts) -> Iterator[pa.Table]:
            yield before
            for part, table in _parts(out, options):
                parts.append(part)
                yield table

        tissue = Catalog.of_table(storage.canonical(out), before, options, staging).tissue if before.num_rows else None
        table, cells = merge(tables(), tissue)
        table = with_metadata(table, told)
        if table.num_rows == 0:
            return table
        if write(out, table, cells, options, current):
            for part in parts:
                storage.remove(part, options)
            return table
        sys.stderr.write(f"catalog: another build has written {out} meanwhile; merging with it\n")


def save_part(out: str, part: pa.Table, options: storage.StorageOptions | None) -> None:
    """Saves what was found out, so that it is known if the build is interrupted."""
    name = f"{int(time.time() * 1000)}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_table(storage.join(out, schema.PARTS, name), part, options)


def write_beside(
    out: str,
    rejected: Sequence[Rejected],
    skipped: Mapping[str, str],
    seen: Container[str],
    options: storage.StorageOptions | None,
) -> None:
    """Replaces the records of what was seen in this run; what other runs rejected and skipped stays.

    They are notes for people: a damaged one is told of and begun anew.
    """

    def lost(error: StorageError) -> None:
        sys.stderr.write(f"catalog: {error}: what earlier runs noted there is lost\n")

    def was_not_seen(uri: str) -> bool:
        return uri not in seen and folder_of(uri) not in seen

    bad = pa.Table.from_pylist([asdict(entry) for entry in rejected], schema=schema.REJECTED_SCHEMA)
    passed = pa.table({"file": list(skipped), "reason": list(skipped.values())}, schema=schema.SKIPPED_SCHEMA)
    for name, now, key in ((schema.REJECTED, bad, "slide"), (schema.SKIPPED, passed, "file")):
        storage.update_rows(storage.join(out, name), now, key, was_not_seen, options, lost)
