"""Tables of slides as a source: a manifest of the Genomic Data Commons (GDC), or any CSV or Parquet with addresses."""

from __future__ import annotations

import posixpath
import re

from streaming import storage
from streaming.catalog import tables
from streaming.catalog.named import Named
from streaming.catalog.tables import OF_CLAM, Row, read_rows
from streaming.errors import ConfigError
from streaming.slide import SLIDE_SUFFIXES

SUFFIXES = (*tables.SUFFIXES, ".txt")
_ADDRESS = ("slide", "uri", "url", "address", "path", "file", "series_aws_url")
# Of all columns only these are kept: what else a table tells may name a patient.
KEPT = ("patient", "collection", "cohort", "site", "organ", "stain", "description", "license", "doi", "mpp")
_GDC_BUCKET = "s3://tcga-2-open"
# As patient and tissue source site of TCGA-3C-AALI-01Z-00-DX1.….svs
_BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})-")


def read_listing(
    uri: str, options: storage.StorageOptions | None = None, skipped: dict[str, str] | None = None
) -> list[Named]:
    """The slides of a table: of a column of addresses, else of GDC's columns `id` and `filename`.

    An address that ends in a slash, or in `/*`, is the folder of a series. A relative one counts from the table. Of a
    manifest, files that are no slides by their suffix are not taken, but added to `skipped` by address.

    Raises:
        ConfigError: it is no such table, or names no slide.
        StorageError: it can't be read.
    """
    rows = read_rows(uri, options, {"case_id": OF_CLAM["case_id"]})
    names = list(rows[0])
    address = next((name for name in _ADDRESS if name in names), None)
    if address is not None:
        return [_of_row(uri, row, address) for row in rows]
    if not {"id", "filename"} <= set(names):
        raise ConfigError(
            f"{uri}: no column of addresses ({', '.join(_ADDRESS)}), nor `id` and `filename` as a manifest of the GDC; "
            f"its columns: {', '.join(names)}"
        )
    found = [_of_gdc(uri, row) for row in rows]
    suffixes = [posixpath.splitext(named.uri)[1].lower() for named in found]
    slides = [named for named, suffix in zip(found, suffixes, strict=True) if suffix in SLIDE_SUFFIXES]
    if not slides:
        raise ConfigError(f"{uri}: none of its {len(found)} files is a slide ({', '.join(SLIDE_SUFFIXES)})")
    if skipped is not None:
        kinds = zip(found, suffixes, strict=True)
        skipped.update((named.uri, kind or "without suffix") for named, kind in kinds if kind not in SLIDE_SUFFIXES)
    return slides


def _of_gdc(uri: str, row: Row) -> Named:
    if not (row["id"] and row["filename"]):
        raise ConfigError(f"{uri}: row {row.number} has no id or no filename; download the manifest anew")
    if odd := [name for name in (row["id"], row["filename"]) if "/" in name or name in (".", "..")]:
        # With a mirror in a folder it would lead out of that.
        raise ConfigError(f"{uri}: row {row.number} has {odd[0]!r}, a path and no name; download the manifest anew")
    barcode = _BARCODE.match(row["filename"])
    told = {"patient": barcode[1], "site": barcode[2], "cohort": "tcga"} if barcode else {}
    size = row.get("size", "")
    return Named(
        uri=f"{_GDC_BUCKET}/{row['id']}/{row['filename']}",
        nbytes=int(size) if size.isdecimal() else 0,
        metadata=told,
    )


def _of_row(uri: str, row: Row, address: str) -> Named:
    if not row[address]:
        raise ConfigError(f"{uri}: row {row.number} has no {address!r}; fill it in or leave the row out")
    place = row[address]
    if storage.is_local(place) and not place.startswith(("/", "~", "file:", "local:")):
        place = storage.beside(storage.canonical(uri), place)
    metadata = {name: row[name] for name in KEPT if row.get(name)}
    return Named(
        uri=storage.canonical(place.removesuffix("*")), is_series=place.endswith(("/", "/*")), metadata=metadata
    )
