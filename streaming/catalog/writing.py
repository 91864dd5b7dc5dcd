"""Writing a catalog: what was found out about slides, in parts, and the parts merged with what was there before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from streaming import storage
from streaming.catalog import schema
from streaming.catalog.inspection import Inspected
from streaming.catalog.tissue import CELL_UM
from streaming.catalog.tissue_map import Cells, TissueMap, padded, write_tissue

if TYPE_CHECKING:
    from hashlib import _Hash as Digest  # pyright: ignore[reportPrivateUsage]


def part_of(slides: Sequence[Inspected]) -> pa.Table:
    """Slides as a part of a catalog: rows that hold their tissue."""
    rows = [{**asdict(slide.row), "tissue_fraction": slide.tissue.fraction.tobytes()} for slide in slides]
    return schema.marked(pa.Table.from_pylist(rows, schema=schema.PART_SCHEMA))


def write(out: str, slides: pa.Table, tissue: Iterable[Cells], options: storage.StorageOptions | None) -> None:
    """Writes rows sorted by address and their tissue grids, uint8 (rows, columns), as the catalog at `out`.

    A process that still reads the catalog that was there keeps its tissue file; the one before that goes.

    Raises:
        StorageError: it can't be written.
    """
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
    before = schema.fingerprint_at(out, options)
    storage.write_table(storage.join(out, schema.SLIDES), schema.marked(slides, fingerprint), options)
    for name in storage.list_names(out, options):
        if name.startswith("tissue-") and name not in map(schema.tissue_name, (fingerprint, before)):
            storage.remove(storage.join(out, name), options)


def _digest(slides: pa.Table) -> Digest:
    """A digest of all columns that decide which tile an index means: of the metadata, only patient and cohort do.

    `write` adds the tissue, so that it is gone through once.
    """
    digest = hashlib.sha256(f"{schema.VERSION} {CELL_UM}".encode())
    for name in ("slide", "version"):
        digest.update("\n".join(cast("list[str]", slides[name].to_pylist())).encode())
    for name in ("size", "mpp", "width", "height", "tissue_rows", "tissue_columns"):
        digest.update(slides[name].to_numpy().tobytes())
    for name in ("levels", "bounds"):
        digest.update(json.dumps(slides[name].to_pylist()).encode())
    metadata = [json.loads(entry) for entry in cast("list[str]", slides["metadata"].to_pylist())]
    digest.update(json.dumps([[entry.get(name) for entry in metadata] for name in ("patient", "cohort")]).encode())
    return digest


def _short(digest: Digest) -> str:
    return digest.hexdigest()[:16]


def merge(tables: Sequence[pa.Table], before: TissueMap | None) -> tuple[pa.Table, Iterator[Cells]]:
    """Parts and the catalog that was there (whose tissue is `before`) as rows and tissue grids for `write`.

    Of several rows of a slide, the one of the last table counts.
    """
    everything = pa.concat_tables([_as_part(table) for table in tables])
    numbered = everything.select(["slide"]).append_column("row", pa.array(range(everything.num_rows), pa.int64()))
    newest = numbered.group_by("slide").aggregate([("row", "max")]).sort_by("slide")["row_max"]
    fractions = everything["tissue_fraction"]
    # Tissue stays behind and is taken slide by slide: all of it may be gigabytes.
    rows = everything.drop_columns(["tissue_fraction"]).take(newest)

    def tissue() -> Iterator[Cells]:
        places = zip(*(rows[n].to_pylist() for n in ("tissue_rows", "tissue_columns", "tissue_offset")), strict=True)
        for at, (height, width, offset) in zip(newest.to_pylist(), places, strict=True):
            content = cast("bytes | None", fractions[cast(int, at)].as_py())
            if content is not None:
                yield np.frombuffer(content, np.uint8).reshape(height, width)
                continue
            assert before is not None, "a row without tissue comes from a catalog"
            yield before.cells[offset : offset + height * width].reshape(height, width)

    return rows, tissue()


def _as_part(table: pa.Table) -> pa.Table:
    if "tissue_fraction" not in table.column_names:
        table = table.append_column("tissue_fraction", pa.nulls(table.num_rows, pa.large_binary()))
    return table.replace_schema_metadata(None)
