"""What a catalog is on disk: its files, their columns, and the version that both belong to.

A catalog is a folder with `slides.parquet` (one row a slide), `tissue-….bin` (the tissue of all slides, mapped by every
reader), `blocks/` (where the slides' compressed blocks lie, in packs: `index_packs`), `rejected.parquet` (slides that
could not be used, with the reason), `skipped.parquet` (files that are no slides, and what else was passed over) and,
while it is being built, `parts/`, whose rows hold their tissue themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import CatalogError

VERSION = 8
SLIDES, REJECTED, SKIPPED = "slides.parquet", "rejected.parquet", "skipped.parquet"
PARTS, BLOCKS = "parts", "blocks"

LEVEL_TYPE = pa.struct(
    [
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("downsample", pa.float64()),
        ("compression", pa.string()),
        # Of its compressed blocks, in the level's pixels; none where OpenSlide serves.
        ("block_width", pa.int32()),
        ("block_height", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("slide", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("vendor", pa.string()),
        # µm/px at level 0; what the slide's metadata says of it, if anything; and whose word counts (METADATA, …).
        ("mpp", pa.float64()),
        ("own_mpp", pa.float64()),
        ("mpp_from", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        # What of it was scanned, within which tiles are drawn: x, y, width and height in level-0 pixels.
        ("bounds", pa.list_(pa.int64(), 4)),
        ("levels", pa.list_(LEVEL_TYPE)),
        ("backend", pa.string()),
        # The pack in `blocks/` with its block index, where in it, and its size; none where OpenSlide serves.
        ("index", pa.string()),
        ("index_at", pa.int64()),
        ("index_nbytes", pa.int64()),
        ("tissue_rows", pa.int32()),
        ("tissue_columns", pa.int32()),
        # Where its tissue grid begins among the cells of the tissue file, and the sum of its cells; unset in a part.
        ("tissue_offset", pa.int64()),
        ("tissue_total", pa.int64()),
        ("tissue_threshold", pa.float64()),
        # The mask that told where tissue is, as JSON (`masks.Mask`); empty where our own rule did.
        ("mask", pa.string()),
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


SKIPPED_SCHEMA = pa.schema([("file", pa.string()), ("reason", pa.string())])
METADATA, TABLE, OPTION = "metadata", "table", "--slide-mpp"
"""where a slide's mpp may come from"""


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
    bounds: Sequence[int]
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
    index_at: int = 0
    mask: str = ""
    own_mpp: float | None = None
    mpp_from: str = METADATA

    @property
    def info(self) -> storage.ObjectInfo:
        """The version of the object that the row describes."""
        return storage.ObjectInfo(self.slide, self.size, self.version)


def tissue_name(fingerprint: str) -> str:
    """The file of a catalog's tissue; its name tells its content."""
    return f"tissue-{fingerprint}.bin"


def num_cells(slides: pa.Table) -> NDArray[np.int64]:
    """Cells of each slide's tissue grid, int64 (n,)."""
    return slides["tissue_rows"].to_numpy().astype(np.int64) * slides["tissue_columns"].to_numpy()


def marked(table: pa.Table, fingerprint: str = "") -> pa.Table:
    """A table that says that it is a catalog, or a part of one, of this version."""
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
            "build it anew with `tilestream catalog`, in another folder"
        )


def fingerprint_of(table: pa.Table) -> str:
    """The fingerprint that a catalog was written with; empty in a part."""
    return (table.schema.metadata or {}).get(b"tilestream.fingerprint", b"").decode()
