"""The catalog: one row a slide, all a training run has to know before it reads a pixel.

A catalog is a folder with `slides.parquet`, `tissue-….bin` (the tissue of all slides, mapped by every reader),
`blocks/` (where each slide's compressed blocks lie, a file a slide), `rejected.parquet` (slides that could not be used,
with the reason) and, while it is being built, `parts/`, whose rows hold their tissue themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.tissue import CELL_UM, TissueGrid
from streaming.catalog.tissue_map import Cells, TissueMap, file_nbytes, padded, write_tissue
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError
from streaming.slide import Slide, open_slide
from streaming.slide.index_files import open_index, open_staged_index
from streaming.storage.staging import Staging

if TYPE_CHECKING:
    from hashlib import _Hash as Digest  # pyright: ignore[reportPrivateUsage]

VERSION = 3
SLIDES, REJECTED, PARTS, BLOCKS = "slides.parquet", "rejected.parquet", "parts", "blocks"

LEVEL_TYPE = pa.struct(
    [("width", pa.int64()), ("height", pa.int64()), ("downsample", pa.float64()), ("compression", pa.string())]
)
SCHEMA = pa.schema(
    [
        ("slide", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("vendor", pa.string()),
        ("mpp", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("levels", pa.list_(LEVEL_TYPE)),
        ("backend", pa.string()),
        # The block index's file in `blocks/` and its size; none where OpenSlide serves.
        ("index", pa.string()),
        ("index_nbytes", pa.int64()),
        ("tissue_rows", pa.int32()),
        ("tissue_columns", pa.int32()),
        # Where its grid begins among the cells of the tissue file, and the sum of the grid; unset in a part.
        ("tissue_offset", pa.int64()),
        ("tissue_total", pa.int64()),
        ("tissue_threshold", pa.float64()),
        ("tissue_mm2", pa.float64()),
        # Free columns of the user's CSV as a JSON object; Catalog spreads them into columns of their own.
        ("metadata", pa.string()),
    ]
)
# 2 GiB of tissue, which one array of `binary` could hold, are some 25,000 slides.
PART_SCHEMA = SCHEMA.append(pa.field("tissue_fraction", pa.large_binary()))
REJECTED_SCHEMA = pa.schema(
    [("slide", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """One slide of a catalog."""

    slide: str
    size: int
    version: str
    vendor: str
    mpp: float
    width: int
    height: int
    levels: list[dict[str, Any]]
    backend: str
    index: str | None
    index_nbytes: int
    tissue_rows: int
    tissue_columns: int
    tissue_threshold: float
    tissue_mm2: float
    tissue_offset: int | None = None
    tissue_total: int | None = None
    metadata: str = "{}"

    @property
    def info(self) -> storage.ObjectInfo:
        """The version of the object that the row describes."""
        return storage.ObjectInfo(self.slide, self.size, self.version)


@dataclass(frozen=True)
class Inspected:
    """What was found out about a slide, before it is in a catalog."""

    row: SlideRow
    grid: TissueGrid


def index_name(info: storage.ObjectInfo) -> str:
    """The file of a slide's block index: its name, and a digest of its address and version."""
    return f"{storage.name_of(info.uri)}-{info.digest[:16]}"


def describe(slide: Slide, info: storage.ObjectInfo, grid: TissueGrid) -> SlideRow:
    """The catalog's row for an open slide with a known mpp."""
    assert slide.mpp is not None, "a slide without mpp has no tissue grid"
    levels = [
        {"width": width, "height": height, "downsample": downsample, "compression": compression}
        for (width, height), downsample, compression in zip(
            slide.level_dimensions, slide.level_downsamples, slide.level_compressions(), strict=True
        )
    ]
    rows, columns = grid.fraction.shape
    return SlideRow(
        slide=info.uri,
        size=info.size,
        version=info.version,
        vendor=slide.vendor,
        mpp=slide.mpp,
        width=slide.level_dimensions[0][0],
        height=slide.level_dimensions[0][1],
        levels=levels,
        backend=slide.backend,
        index=index_name(info) if slide.packed_index else None,
        index_nbytes=len(slide.packed_index or b""),
        tissue_rows=rows,
        tissue_columns=columns,
        tissue_threshold=grid.threshold,
        tissue_mm2=grid.area_mm2,
    )


def part_of(slides: Sequence[Inspected]) -> pa.Table:
    """Slides as a part of a catalog: rows that hold their tissue."""
    rows = [{**asdict(slide.row), "tissue_fraction": slide.grid.fraction.tobytes()} for slide in slides]
    return _marked(pa.Table.from_pylist(rows, schema=PART_SCHEMA))


def write(out: str, slides: pa.Table, grids: Iterable[Cells], options: storage.StorageOptions | None) -> None:
    """Writes rows sorted by address and their tissue grids, uint8 (rows, columns), as the catalog at `out`.

    A process that still reads the catalog that was there keeps its tissue file; the one before that goes.

    Raises:
        StorageError: it can't be written.
    """
    cells = slides["tissue_rows"].to_numpy().astype(np.int64) * slides["tissue_columns"].to_numpy()
    ends = np.cumsum(padded(cells))
    totals: list[int] = []
    digest = _digest(slides)

    def noted() -> Iterator[Cells]:
        for grid in grids:
            digest.update(grid.data)
            totals.append(int(grid.sum(dtype=np.int64)))
            yield grid

    with (
        storage.written_file(lambda: storage.join(out, _tissue_name(_short(digest))), options) as path,
        open(path, "wb") as file,
    ):
        write_tissue(file, noted())
    for name, values in (("tissue_offset", ends - padded(cells)), ("tissue_total", totals)):
        slides = slides.set_column(SCHEMA.get_field_index(name), name, pa.array(values, pa.int64()))
    fingerprint = _short(digest)
    before = _fingerprint_at(out, options)
    storage.write_table(storage.join(out, SLIDES), _marked(slides, fingerprint), options)
    for name in storage.list_names(out, options):
        if name.startswith("tissue-") and name not in map(_tissue_name, (fingerprint, before)):
            storage.remove(storage.join(out, name), options)


def _digest(slides: pa.Table) -> Digest:
    """Begun with all but the tissue; of the metadata, only patient and cohort decide which tile an index means."""
    digest = hashlib.sha256(f"{VERSION} {CELL_UM}".encode())
    for name in ("slide", "version"):
        digest.update("\n".join(cast("list[str]", slides[name].to_pylist())).encode())
    for name in ("size", "mpp", "width", "height", "tissue_rows", "tissue_columns"):
        digest.update(slides[name].to_numpy().tobytes())
    metadata = [json.loads(entry) for entry in cast("list[str]", slides["metadata"].to_pylist())]
    digest.update(json.dumps([[entry.get(name) for entry in metadata] for name in ("patient", "cohort")]).encode())
    return digest


def _short(digest: Digest) -> str:
    return digest.hexdigest()[:16]


def _tissue_name(fingerprint: str) -> str:
    return f"tissue-{fingerprint}.bin"


def _marked(table: pa.Table, fingerprint: str = "") -> pa.Table:
    return table.replace_schema_metadata({"tilestream.catalog": str(VERSION), "tilestream.fingerprint": fingerprint})


def check_version(table: pa.Table, uri: str) -> None:
    """Refuses a table that is no catalog of this version.

    Raises:
        CatalogError: naming the version found and the one wanted.
    """
    found = (table.schema.metadata or {}).get(b"tilestream.catalog", b"none").decode()
    if found != str(VERSION):
        raise CatalogError(
            f"{uri}: catalog of version {found}, this tilestream reads version {VERSION}; "
            "build it anew with `tilestream catalog`"
        )


@dataclass(frozen=True)
class Catalog:
    """The slides that a run may draw from, sorted by address.

    fingerprint is a digest of all that decides which tile an index means.
    """

    uri: str
    table: pa.Table = field(repr=False)
    fingerprint: str
    tissue: TissueMap = field(repr=False, compare=False)

    @classmethod
    def load(
        cls, uri: str, storage_options: storage.StorageOptions | None = None, staging: Staging | None = None
    ) -> Catalog:
        """Reads a catalog from its folder; its tissue is read when it is asked for, a remote one's by a staged copy.

        Raises:
            CatalogError: there is none, it is empty, or it is of another version.
            StorageError: the storage can't be reached.
        """
        path = storage.join(uri, SLIDES)
        if not storage.exists(path, storage_options):
            state = "its build was interrupted; run it again" if _has_parts(uri, storage_options) else "build one"
            raise CatalogError(f"{uri}: no catalog here ({SLIDES} is missing); {state}: `tilestream catalog SLIDES...`")
        table = storage.read_table(path, storage_options)
        check_version(table, uri)
        if table.num_rows == 0:
            raise CatalogError(f"{uri}: the catalog holds no slide; see {REJECTED} there for the reasons")
        return cls.of_table(storage.canonical(uri), table, storage_options, staging)

    @classmethod
    def of_table(
        cls,
        uri: str,
        table: pa.Table,
        storage_options: storage.StorageOptions | None = None,
        staging: Staging | None = None,
    ) -> Catalog:
        """The catalog whose `slides.parquet` is already in memory."""
        fingerprint = _fingerprint_of(table)
        cells = table["tissue_rows"].to_numpy().astype(np.int64) * table["tissue_columns"].to_numpy()
        # Its name tells its content: no version to ask for.
        info = storage.ObjectInfo(
            storage.join(uri, _tissue_name(fingerprint)), file_nbytes(int(padded(cells).sum())), fingerprint
        )
        return cls(uri, table, fingerprint, TissueMap(info, storage_options, staging))

    def __getstate__(self) -> dict[str, Any]:
        # Its fields alone: what was worked out on demand is large, and another thread may be adding to it just now.
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> SlideRow:
        return row_of(self.table.slice(row, 1).to_pylist()[0])

    def grid(self, row: int) -> TissueGrid:
        """The tissue grid of a slide.

        Raises:
            CatalogError, StorageError: the tissue can't be read.
        """
        entry = self[row]
        assert entry.tissue_offset is not None, "what is in a catalog has its place in the tissue"
        shape = entry.tissue_rows, entry.tissue_columns
        cells = self.tissue.cells[entry.tissue_offset : entry.tissue_offset + shape[0] * shape[1]]
        return TissueGrid(fraction=cells.reshape(shape), threshold=entry.tissue_threshold)

    def open_slide(
        self,
        row: int,
        storage_options: storage.StorageOptions | None,
        staging: Staging,
        count: Counters = UNCOUNTED,
    ) -> Slide:
        """The slide of a row, by its block index if it has one; an index that lies remote is staged first.

        What that takes is added to `count`.

        Raises:
            SlideError: it can't be opened, or is not the version that was catalogued.
            StorageError: it can't be reached.
            CatalogError: its block index is damaged.
        """
        slide, size, version, mpp, name, index_nbytes = self._opening[row]
        index = None
        if name is not None:
            uri = storage.join(self.uri, BLOCKS, name)
            if storage.is_local(uri):
                index = open_index(uri)
            else:
                # Its name tells its content, so there is nothing to ask of the storage before.
                entry = storage.ObjectInfo(uri, index_nbytes, name)
                index = open_staged_index(entry, storage_options, staging, count)
        info = storage.ObjectInfo(slide, size, version)
        return open_slide(slide, storage_options, mpp=mpp, index=index, expected=info, staging=staging, count=count)

    def to_arrow(self) -> pa.Table:
        """One row a slide, the metadata spread into columns."""
        table = self.table.drop_columns(["metadata"])
        for name in self.metadata_columns:
            table = table.append_column(name, pa.array([entry.get(name) for entry in self._metadata], pa.string()))
        return table

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the columns that came from the user's CSV."""
        return sorted({name for entry in self._metadata for name in entry})

    def metadata(self, name: str) -> list[str | None]:
        """One metadata column.

        Raises:
            CatalogError: there is no such column.
        """
        if name not in self.metadata_columns:
            have = ", ".join(self.metadata_columns) or "none"
            raise CatalogError(f"{self.uri}: no metadata column {name!r}; it has: {have}; add it by --metadata CSV")
        return [entry.get(name) for entry in self._metadata]

    @cached_property
    def _opening(self) -> list[tuple[Any, ...]]:
        # A row of Arrow's costs a millisecond to look up, and a reader soon opens every slide.
        names = ("slide", "size", "version", "mpp", "index", "index_nbytes")
        return list(zip(*(self.table[name].to_pylist() for name in names), strict=True))

    @cached_property
    def _metadata(self) -> list[dict[str, str]]:
        return [json.loads(entry) for entry in self._strings("metadata")]

    def column(self, name: str) -> NDArray[Any]:
        """One numeric column as a NumPy array."""
        return self.table[name].to_numpy()

    def slides(self) -> list[str]:
        """The slides' addresses, in the order of the rows."""
        return self._strings("slide")

    def _strings(self, name: str) -> list[str]:
        return cast("list[str]", self.table[name].to_pylist())


def row_of(entry: Mapping[str, Any]) -> SlideRow:
    """A row from its Arrow form."""
    return SlideRow(**entry)


def _has_parts(uri: str, options: storage.StorageOptions | None) -> bool:
    return bool(storage.list_names(storage.join(uri, PARTS), options))


def _fingerprint_of(table: pa.Table) -> str:
    return (table.schema.metadata or {}).get(b"tilestream.fingerprint", b"").decode()


def _fingerprint_at(uri: str, options: storage.StorageOptions | None) -> str:
    path = storage.join(uri, SLIDES)
    return _fingerprint_of(storage.read_table(path, options)) if storage.exists(path, options) else ""


def merge(tables: Sequence[pa.Table], before: TissueMap | None) -> tuple[pa.Table, Iterator[Cells]]:
    """Parts and the catalog that was there (whose tissue is `before`) as rows and grids for `write`.

    Of several rows of a slide, the one of the last table counts.
    """
    everything = pa.concat_tables([_as_part(table) for table in tables])
    numbered = everything.select(["slide"]).append_column("row", pa.array(range(everything.num_rows), pa.int64()))
    newest = numbered.group_by("slide").aggregate([("row", "max")]).sort_by("slide")["row_max"]
    fractions = everything["tissue_fraction"]
    # Tissue is taken grid by grid: all of it may be gigabytes.
    rows = everything.drop_columns(["tissue_fraction"]).take(newest)

    def grids() -> Iterator[Cells]:
        places = zip(*(rows[n].to_pylist() for n in ("tissue_rows", "tissue_columns", "tissue_offset")), strict=True)
        for at, (height, width, offset) in zip(newest.to_pylist(), places, strict=True):
            content = cast("bytes | None", fractions[cast(int, at)].as_py())
            if content is not None:
                yield np.frombuffer(content, np.uint8).reshape(height, width)
                continue
            assert before is not None, "a row without tissue comes from a catalog"
            yield before.cells[offset : offset + height * width].reshape(height, width)

    return rows, grids()


def _as_part(table: pa.Table) -> pa.Table:
    if "tissue_fraction" not in table.column_names:
        table = table.append_column("tissue_fraction", pa.nulls(table.num_rows, pa.large_binary()))
    return table.replace_schema_metadata(None)
