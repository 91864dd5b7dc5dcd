"""The catalog: one row a slide, all a training run has to know before it reads a pixel.

A catalog is a folder with `slides.parquet`, `blocks/` (where each slide's compressed blocks lie, a file a slide),
`rejected.parquet` (slides that could not be used, with the reason) and, while it is being built, `parts/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import CatalogError
from streaming.slide import Slide, Staging, open_slide
from streaming.slide.block_index import open_index
from streaming.tissue import CELL_UM, TissueGrid

VERSION = 2
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
        ("tissue_fraction", pa.binary()),
        ("tissue_threshold", pa.float64()),
        ("tissue_mm2", pa.float64()),
        # Free columns of the user's CSV as a JSON object; Catalog spreads them into columns of their own.
        ("metadata", pa.string()),
    ]
)
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
    tissue_fraction: bytes
    tissue_threshold: float
    tissue_mm2: float
    metadata: str = "{}"

    @property
    def info(self) -> storage.ObjectInfo:
        """The version of the object that the row describes."""
        return storage.ObjectInfo(self.slide, self.size, self.version)

    @property
    def grid(self) -> TissueGrid:
        """The tissue grid."""
        fraction = np.frombuffer(self.tissue_fraction, dtype=np.uint8).reshape(self.tissue_rows, self.tissue_columns)
        return TissueGrid(fraction=fraction, threshold=self.tissue_threshold)


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
        tissue_fraction=grid.fraction.tobytes(),
        tissue_threshold=grid.threshold,
        tissue_mm2=grid.area_mm2,
    )


def table_of(rows: Sequence[SlideRow]) -> pa.Table:
    """Rows as an Arrow table of the catalog's schema, with the version in its metadata."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    return table.replace_schema_metadata({"tilestream.catalog": str(VERSION)})


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
    """The slides that a run may draw from, sorted by address."""

    uri: str
    table: pa.Table = field(repr=False)

    @classmethod
    def load(cls, uri: str, storage_options: storage.StorageOptions | None = None) -> Catalog:
        """Reads a catalog from its folder.

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
        return cls(storage.canonical(uri), table.sort_by("slide"))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> SlideRow:
        return row_of(self.table.slice(row, 1).to_pylist()[0])

    def open_slide(self, row: int, storage_options: storage.StorageOptions | None, staging: Staging) -> Slide:
        """The slide of a row, by its block index if it has one; an index that lies remote is staged first.

        Raises:
            SlideError: it can't be opened, or is not the version that was catalogued.
            StorageError: it can't be reached.
            CatalogError: its block index is damaged.
        """
        entry = self[row]
        index = None
        if entry.index is not None:
            uri = storage.join(self.uri, BLOCKS, entry.index)
            if not storage.is_local(uri):
                # Its name tells its content, so there is nothing to ask of the storage before.
                uri = staging.fetch(storage.ObjectInfo(uri, entry.index_nbytes, entry.index), storage_options)
            index = open_index(uri)
        return open_slide(
            entry.slide, storage_options, mpp=entry.mpp, index=index, expected=entry.info, staging=staging
        )

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
    def _metadata(self) -> list[dict[str, str]]:
        return [json.loads(entry) for entry in self._strings("metadata")]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides which tile an index means; metadata that does not (a stain's name) is left out."""
        digest = hashlib.sha256(f"{VERSION} {CELL_UM}".encode())
        for name in ("slide", "version"):
            digest.update("\n".join(self._strings(name)).encode())
        for name in ("size", "mpp", "width", "height", "tissue_rows", "tissue_columns"):
            digest.update(self.column(name).tobytes())
        for fraction in self.table["tissue_fraction"]:
            digest.update(cast(bytes, fraction.as_py()))
        return digest.hexdigest()[:16]

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


def newest_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """One row a slide, the one of the last table that has it."""
    table = pa.concat_tables(tables)
    numbered = table.append_column("_order", pa.array(range(table.num_rows), pa.int64()))
    newest = numbered.group_by("slide").aggregate([("_order", "max")])["_order_max"]
    return table.take(newest).sort_by("slide")
