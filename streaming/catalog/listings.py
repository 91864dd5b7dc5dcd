"""Tables of slides as a source: a manifest of the Genomic Data Commons (GDC), or any CSV or Parquet with addresses."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from streaming import storage
from streaming.catalog.named import Named
from streaming.errors import ConfigError
from streaming.slide import SLIDE_SUFFIXES

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
_ADDRESS = ("slide", "uri", "url", "address", "path", "file", "series_aws_url")
# Of all columns only these are kept: what else a table tells may name a patient.
KEPT = ("patient", "collection", "cohort", "site", "organ", "stain", "description", "license", "doi", "mpp")
_REST = "\0"  # where cells beyond the last column are put
_GDC_BUCKET = "s3://tcga-2-open"
# As patient and tissue source site of TCGA-3C-AALI-01Z-00-DX1.….svs
_BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})-")


def read_listing(
    uri: str, options: storage.StorageOptions | None = None, passed_over: Counter[str] | None = None
) -> list[Named]:
    """The slides of a table: of a column of addresses, else of GDC's columns `id` and `filename`.

    An address that ends in a slash, or in `/*`, is the folder of a series. A relative one counts from the table. Of a
    manifest, files that are no slides by their suffix are not taken, but counted in `passed_over`.

    Raises:
        ConfigError: it is no such table, or names no slide.
        StorageError: it can't be read.
    """
    rows = _rows(uri, options)
    if not rows:
        raise ConfigError(f"{uri}: a table without a row; name the slides there, one a row")
    names = list(rows[0][1])
    address = next((name for name in _ADDRESS if name in names), None)
    if address is not None:
        return [_of_row(uri, number, row, address) for number, row in rows]
    if not {"id", "filename"} <= set(names):
        raise ConfigError(
            f"{uri}: no column of addresses ({', '.join(_ADDRESS)}), nor `id` and `filename` as a manifest of the GDC; "
            f"its columns: {', '.join(names)}"
        )
    found = [_of_gdc(uri, number, row) for number, row in rows]
    suffixes = [posixpath.splitext(named.uri)[1].lower() for named in found]
    slides = [named for named, suffix in zip(found, suffixes, strict=True) if suffix in SLIDE_SUFFIXES]
    if not slides:
        raise ConfigError(f"{uri}: none of its {len(found)} files is a slide ({', '.join(SLIDE_SUFFIXES)})")
    if passed_over is not None:
        passed_over.update(suffix or "without suffix" for suffix in suffixes if suffix not in SLIDE_SUFFIXES)
    return slides


def _rows(uri: str, options: storage.StorageOptions | None) -> list[tuple[int, dict[str, str]]]:
    """The rows with their numbers by lower-case column, without those that are empty.

    Raises:
        ConfigError: it is no table, or a row has more cells than columns.
        StorageError: it can't be read.
    """
    rows: Sequence[dict[Any, Any]]
    if uri.lower().endswith(".parquet"):
        rows = storage.read_table(uri, options).to_pylist()
    else:
        try:
            text = storage.read_bytes(uri, options).decode("utf-8-sig")
            tabs = "\t" in text.partition("\n")[0]
            rows = list(csv.DictReader(io.StringIO(text), restkey=_REST, delimiter="\t" if tabs else ","))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{uri}: no table in UTF-8 ({error}); save it as CSV, TSV or Parquet") from error
    cells = ({str(name).strip().lower(): _text(value) for name, value in row.items() if name != _REST} for row in rows)
    found = [(number, row) for number, row in enumerate(cells, start=1) if any(row.values())]
    if longer := [number for number, row in enumerate(rows, start=1) if any(row.get(_REST) or ())]:
        raise ConfigError(
            f"{uri}: row {longer[0]} has more cells than the header; put what holds a comma in double quotes"
        )
    return found


def _text(value: Any) -> str:
    """A cell; empty where nothing is told, which pandas writes as a number that is not itself."""
    return "" if value is None or value != value else str(value).strip()


def _of_gdc(uri: str, number: int, row: dict[str, str]) -> Named:
    if not (row["id"] and row["filename"]):
        raise ConfigError(f"{uri}: row {number} has no id or no filename; download the manifest anew")
    barcode = _BARCODE.match(row["filename"])
    told = {"patient": barcode[1], "site": barcode[2], "cohort": "tcga"} if barcode else {}
    size = row.get("size", "")
    return Named(
        uri=f"{_GDC_BUCKET}/{row['id']}/{row['filename']}",
        nbytes=int(size) if size.isdecimal() else 0,
        metadata=told,
    )


def _of_row(uri: str, number: int, row: dict[str, str], address: str) -> Named:
    if not row[address]:
        raise ConfigError(f"{uri}: row {number} has no {address!r}; fill it in or leave the row out")
    place = row[address]
    if storage.is_local(place) and not place.startswith(("/", "~", "file:", "local:")):
        place = storage.join(storage.canonical(uri).rpartition("/")[0], place)
    metadata = {name: row[name] for name in KEPT if row.get(name)}
    return Named(
        uri=storage.canonical(place.removesuffix("*")), is_series=place.endswith(("/", "/*")), metadata=metadata
    )
