"""The catalog: one row a slide, all that a training run has to know before it reads a pixel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog import schema
from streaming.catalog.index_packs import IndexPacks
from streaming.catalog.schema import SlideRow
from streaming.catalog.tissue import TissueGrid
from streaming.catalog.tissue_map import TissueMap, file_nbytes, padded
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError
from streaming.slide import Slide, open_slide
from streaming.slide.block_index import read_index
from streaming.storage.staging import Staging

# What opening a slide takes of its row.
_OPENING = ("slide", "size", "version", "mpp", "index", "index_at", "index_nbytes")


class OfSlide(Protocol):
    """What names a slide by its address, as `TileSpec` does."""

    @property
    def slide(self) -> str:
        """The address."""
        ...


@dataclass(frozen=True)
class Levels:
    """The levels of a catalog's slides as tables (slides, most levels of a slide); 0 where a slide has fewer."""

    downsample: NDArray[np.float64]
    """level-0 pixels per pixel of the level"""
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    block_width: NDArray[np.int64]
    """of the level's compressed blocks, in its pixels, as width and height are; 0 where unknown"""
    block_height: NDArray[np.int64]


@dataclass(frozen=True)
class Catalog:
    """The slides that a run may draw from, sorted by address.

    fingerprint is a digest of all that decides which tile an index means.
    """

    uri: str
    table: pa.Table = field(repr=False)
    fingerprint: str
    tissue: TissueMap = field(repr=False, compare=False)
    indexes: IndexPacks = field(repr=False, compare=False)
    storage_options: storage.StorageOptions | None = field(default=None, repr=False, compare=False)
    """that it was loaded with, by which its slides are opened where nothing else is said"""
    staging: Staging | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(
        cls, uri: str, storage_options: storage.StorageOptions | None = None, staging: Staging | None = None
    ) -> Catalog:
        """Reads a catalog from its folder; tissue and block indexes are read when they are asked for.

        Of a remote catalog they come part by part, into a copy that the node's processes share.

        Raises:
            CatalogError: there is none, it is empty, or it is of another version.
            StorageError: the storage can't be reached.
        """
        path = storage.join(uri, schema.SLIDES)
        if not storage.exists(path, storage_options):
            state = "its build was interrupted; run it again" if _has_parts(uri, storage_options) else "build one"
            raise CatalogError(
                f"{uri}: no catalog here ({schema.SLIDES} is missing); {state}: `tilestream catalog SLIDES...`"
            )
        table = storage.read_table(path, storage_options)
        schema.check_version(table, uri)
        if table.num_rows == 0:
            raise CatalogError(f"{uri}: the catalog holds no slide; see {schema.REJECTED} there for the reasons")
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
        fingerprint = schema.fingerprint_of(table)
        nbytes = file_nbytes(int(padded(schema.num_cells(table)).sum()))
        # Its name tells its content, so the storage need not be asked for its version.
        info = storage.ObjectInfo(storage.join(uri, schema.tissue_name(fingerprint)), nbytes, fingerprint)
        tissue = TissueMap(info, storage_options, staging)
        # A column that is one array is looked up at once.
        packs = IndexPacks(uri, table, storage_options, staging)
        return cls(uri, table.combine_chunks(), fingerprint, tissue, packs, storage_options, staging)

    def __getstate__(self) -> dict[str, Any]:
        # Its fields alone: what was worked out on demand is large, and another thread may be adding to it just now.
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> SlideRow:
        return SlideRow(**self.table.slice(row, 1).to_pylist()[0])

    def tissue_grid(self, row: int) -> TissueGrid:
        """The tissue grid of a slide.

        Raises:
            CatalogError, StorageError: the tissue can't be read.
        """
        entry = self[row]
        assert entry.tissue_offset is not None, "what is in a catalog has its place in the tissue"
        shape = entry.tissue_rows, entry.tissue_columns
        begin, size = (np.array([n], np.int64) for n in (entry.tissue_offset, shape[0] * shape[1]))
        everything, _ = self.tissue.grids(begin, padded(size))
        cells = everything[entry.tissue_offset : entry.tissue_offset + shape[0] * shape[1]]
        return TissueGrid(fraction=cells.reshape(shape), threshold=entry.tissue_threshold)

    def row_of(self, slide: str) -> int:
        """The row of a slide's address.

        Raises:
            CatalogError: the catalog has no such slide.
        """
        row = pc.index(self.table["slide"], pa.scalar(storage.canonical(slide))).as_py()
        if row < 0:
            raise CatalogError(f"{slide}: not among the {len(self)} slides of {self.uri}; add it: `tilestream catalog`")
        return row

    def open_slide(
        self,
        slide: int | str | OfSlide,
        storage_options: storage.StorageOptions | None = None,
        staging: Staging | None = None,
        count: Counters = UNCOUNTED,
    ) -> Slide:
        """A slide as the catalog knows it: of the version and with the µm/px that are noted, by its block index.

        slide is a row, an address, or what has one as `TileSpec` does. Without storage options or staging, those serve
        that the catalog was loaded with. What opening takes is added to `count`.

        Raises:
            SlideError: it can't be opened, or is not the version that was catalogued.
            StorageError: it can't be reached.
            CatalogError: it is not in the catalog, or its block index is damaged.
        """
        if isinstance(slide, int | np.integer):
            row = int(slide)
        else:
            row = self.row_of(slide if isinstance(slide, str) else slide.slide)
        storage_options = self.storage_options if storage_options is None else storage_options
        staging = staging or self.staging or Staging()
        uri, size, version, mpp, pack, at, nbytes = (column[row].as_py() for column in self._opening)
        index = None if pack is None else read_index(self.indexes.index(pack, at, nbytes), count)
        info = storage.ObjectInfo(uri, size, version)
        opened = open_slide(uri, storage_options, index=index, expected=info, staging=staging, count=count)
        opened.mpp = mpp  # a table's word may count more than the metadata's
        return opened

    def for_readers(self) -> Catalog:
        """What `open_slide` needs of it: a quarter of its memory, which each reader has for itself."""
        return replace(self, table=self.table.select(_OPENING))

    def to_arrow(self) -> pa.Table:
        """One row a slide, the metadata spread into columns: `metadata_mpp` is what a table called `mpp`, and so on."""
        table = self.table.drop_columns(["metadata"])
        for name in self.metadata_columns:
            called = f"metadata_{name}" if name in table.column_names else name
            table = table.append_column(called, pa.array([entry.get(name) for entry in self._metadata], pa.string()))
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
        return self.metadata_or_none(name)

    def metadata_or_none(self, name: str) -> list[str | None]:
        """One metadata column; None for every slide where there is no such column."""
        return [entry.get(name) for entry in self._metadata]

    def identity(self, columns: Sequence[str]) -> str:
        """The fingerprint of a catalog whose draws are weighed by some columns: other values there are another one.

        Raises:
            CatalogError: there is no such column.
        """
        # The fingerprint has these already.
        more = sorted(set(columns) - {"patient", "cohort"})
        if not more:
            return self.fingerprint
        values = json.dumps([self.slides(), {column: self.metadata(column) for column in more}])
        return hashlib.blake2b(f"{self.fingerprint} {values}".encode(), digest_size=8).hexdigest()

    @cached_property
    def _opening(self) -> list[Any]:
        # Chunked, a value would cost five times as much to look up; lists of all would be 100 MB at 100,000 slides.
        return [self.table[name].combine_chunks() for name in _OPENING]

    @cached_property
    def _metadata(self) -> list[dict[str, str]]:
        return [json.loads(entry) for entry in self._strings("metadata")]

    def levels(self) -> Levels:
        """The levels of all slides, by row."""
        column = self.table["levels"].combine_chunks()
        num_levels = pc.list_value_length(column).to_numpy()
        flat = pc.list_flatten(column)
        exists = np.arange(int(num_levels.max(initial=0))) < num_levels[:, None]

        def table(name: str, dtype: type[Any]) -> NDArray[Any]:
            values = np.zeros(exists.shape, dtype=dtype)
            # Nulls come as NaN.
            values[exists] = np.nan_to_num(pc.struct_field(flat, name).to_numpy(zero_copy_only=False))
            return values

        return Levels(
            downsample=table("downsample", np.float64),
            width=table("width", np.int64),
            height=table("height", np.int64),
            block_width=table("block_width", np.int64),
            block_height=table("block_height", np.int64),
        )

    def bounds(self) -> NDArray[np.int64]:
        """What of each slide was scanned: x, y, width and height in level-0 pixels, int64 (n, 4)."""
        return pc.list_flatten(self.table["bounds"].combine_chunks()).to_numpy().reshape(-1, 4)

    def column(self, name: str) -> NDArray[Any]:
        """One numeric column as a NumPy array."""
        return self.table[name].to_numpy()

    def slides(self) -> list[str]:
        """The slides' addresses, in the order of the rows."""
        return self._strings("slide")

    def _strings(self, name: str) -> list[str]:
        return cast("list[str]", self.table[name].to_pylist())


def _has_parts(uri: str, options: storage.StorageOptions | None) -> bool:
    return bool(storage.list_names(storage.join(uri, schema.PARTS), options))
