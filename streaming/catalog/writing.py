"""Writing a catalog: what was found out about slides, in parts, and the parts merged with what was there before."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import pyarrow as pa

from streaming import storage
from streaming.catalog import schema
from streaming.catalog.inspection import Inspected
from streaming.catalog.tissue import CELL_UM
from streaming.catalog.tissue_map import Cells, TissueMap, padded, write_tissue

if TYPE_CHECKING:
    from hashlib import _Hash as Digest  # pyright: ignore[reportPrivateUsage]


# Mapped pages of the catalog that was there are let go of so often.
_LET_GO_NBYTES = 2**26
_ROWS_AT_ONCE = 1000


def part_of(slides: Sequence[Inspected], told: Sequence[Mapping[str, str]] = ()) -> pa.Table:
    """Slides as a part of a catalog: rows that hold their tissue, and the metadata that is told of each."""
    rows = [{**asdict(slide.row), "tissue_fraction": slide.tissue.fraction.tobytes()} for slide in slides]
    for row, metadata in zip(rows, told, strict=False):
        row["metadata"] = json.dumps(dict(metadata), sort_keys=True)
    return schema.marked(pa.Table.from_pylist(rows, schema=schema.PART_SCHEMA))


def write(
    out: str,
    slides: pa.Table,
    tissue: Iterable[Cells],
    options: storage.StorageOptions | None,
    current: storage.Current | None = None,
) -> bool:
    """Writes rows sorted by address and their tissue grids, uint8 (rows, columns), as the catalog at `out`.

    With `current`, the `slides.parquet` that the rows were made with, nothing is written where another process has
    replaced that meanwhile, and False is returned. A process that still reads the catalog that was there keeps its
    tissue file; the one before that goes.

    Raises:
        StorageError: it can't be written.
    """
    uri = storage.join(out, schema.SLIDES)
    current = current or storage.read_current(uri, options)
    sizes = padded(schema.num_cells(slides))
    totals: list[int] = []
    digest = _digest(slides)

    def noted() -> Iterator[Cells]:
        for cells in tissue:
            digest.update(cells.data)
            totals.append(int(cells.sum(dtype=np.int64)))
            yield cells

    # The tissue file is named after its content, which is known when the last cells are written: hence the lambda.
    with (
        storage.written_file(lambda: storage.join(out, schema.tissue_name(_short(digest))), options) as path,
        open(path, "wb") as file,
    ):
        write_tissue(file, noted())
    for name, values in (("tissue_offset", np.cumsum(sizes) - sizes), ("tissue_total", totals)):
        slides = slides.set_column(schema.SCHEMA.get_field_index(name), name, pa.array(values, pa.int64()))
    fingerprint = _short(digest)
    # What is listed only afterwards may belong to a process that is about to write its own `slides.parquet`.
    files = {name for name in storage.list_names(out, options) if name.startswith("tissue-")}
    content = storage.parquet_of(schema.marked(slides, fingerprint))
    is_written = storage.replace(uri, current, content, options)
    if not is_written:
        current, files = storage.read_current(uri, options), {schema.tissue_name(fingerprint)}
    before = "" if current.content is None else schema.fingerprint_of(storage.table_of(uri, current.content))
    kept = {schema.tissue_name(before)} | ({schema.tissue_name(fingerprint)} if is_written else set())
    for name in files - kept:
        storage.remove(storage.join(out, name), options)
    return is_written


def _digest(slides: pa.Table) -> Digest:
    """A digest of all columns that decide which tile an index means: of the metadata, only patient and cohort do.

    `write` adds the tissue, so that it is gone through once.
    """
    digest = hashlib.sha256(f"{schema.VERSION} {CELL_UM}".encode())
    for name in ("slide", "version"):
        digest.update("\n".join(cast("list[str]", slides[name].to_pylist())).encode())
    for name in ("size", "mpp", "width", "height", "tissue_rows", "tissue_columns"):
        digest.update(slides[name].to_numpy().tobytes())
    for start in range(0, slides.num_rows, _ROWS_AT_ONCE):
        some = slides.slice(start, _ROWS_AT_ONCE)
        metadata = [json.loads(entry) for entry in cast("list[str]", some["metadata"].to_pylist())]
        told = [[entry.get(name) for name in ("patient", "cohort")] for entry in metadata]
        digest.update(json.dumps([some["levels"].to_pylist(), some["bounds"].to_pylist(), told]).encode())
    return digest


def _short(digest: Digest) -> str:
    return digest.hexdigest()[:16]


def merge(tables: Iterable[pa.Table], before: TissueMap | None) -> tuple[pa.Table, Iterator[Cells]]:
    """Parts and the catalog that was there (whose tissue is `before`) as rows and tissue grids for `write`.

    Of several rows of a slide, the one of the last table counts, with the metadata of all. Each table is asked for when
    the one before is done with: all tissue may be gigabytes, and waits in a file.
    """
    stock = _Stock(before)
    everything = pa.concat_tables([stock.taken(table.replace_schema_metadata(None)) for table in tables])
    numbered = everything.select(["slide"]).append_column("row", pa.array(range(everything.num_rows), pa.int64()))
    newest = numbered.group_by("slide").aggregate([("row", "max")]).sort_by("slide")["row_max"]
    told: dict[str, str] = {}
    columns = (cast("list[str]", everything[name].to_pylist()) for name in ("slide", "metadata"))
    for slide, metadata in zip(*columns, strict=True):
        if told.setdefault(slide, metadata) != metadata:
            told[slide] = json.dumps(json.loads(told[slide]) | json.loads(metadata), sort_keys=True)
    rows = everything.drop_columns([_PLACE]).take(newest)
    merged = pa.array([told[slide] for slide in cast("list[str]", rows["slide"].to_pylist())], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("metadata"), "metadata", merged)

    def tissue() -> Iterator[Cells]:
        shapes = zip(*(rows[name].to_pylist() for name in ("tissue_rows", "tissue_columns")), strict=True)
        for place, (height, width) in zip(everything[_PLACE].take(newest).to_pylist(), shapes, strict=True):
            yield stock.cells(cast(int, place), height * width).reshape(height, width)

    return rows, tissue()


_PLACE = "place"  # of a slide's tissue in the stock


class _Stock:
    """Tissue grids that lie one after another: those of the catalog that was there, then those of parts, in a file."""

    def __init__(self, before: TissueMap | None) -> None:
        self._before = before
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 — as long as this is
        self._cells = before.cells if before else np.zeros(0, np.uint8)
        self._begins = len(self._cells)
        self._seen = 0

    def __del__(self) -> None:
        self._file.close()

    def taken(self, table: pa.Table) -> pa.Table:
        """A table's rows with the places of their tissue, which a part brings along."""
        if "tissue_fraction" not in table.column_names:
            return table.append_column(_PLACE, table["tissue_offset"])
        places = list[int]()
        for content in table["tissue_fraction"]:
            places.append(self._begins + self._file.seek(0, os.SEEK_END))
            self._file.write(content.as_buffer())
        self._file.flush()
        return table.drop_columns(["tissue_fraction"]).append_column(_PLACE, pa.array(places, pa.int64()))

    def cells(self, place: int, size: int) -> Cells:
        """The cells of a grid, uint8 (size,)."""
        if place >= self._begins:
            return np.frombuffer(os.pread(self._file.fileno(), size, place - self._begins), np.uint8)
        assert self._before is not None, "what lies there came from a catalog"
        found = self._cells[place : place + size].copy()
        self._seen += size
        if self._seen > _LET_GO_NBYTES:
            self._before.release()
            self._seen = 0
        return found
