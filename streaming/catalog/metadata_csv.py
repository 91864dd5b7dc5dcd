"""What a CSV tells of slides: free columns, among them those that streaming knows: `patient`, `cohort` and `mpp`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import PurePosixPath
from typing import cast

import pyarrow as pa

from streaming import storage
from streaming.errors import ConfigError

_KEY_COLUMNS = ("slide", "uri", "path", "filename", "file", "slide_id", "name")


Metadata = dict[str, dict[str, str]]
"""{a slide's key: {column: value}}"""


def read_metadata(uri: str, options: storage.StorageOptions | None) -> Metadata:
    """A CSV of free columns.

    The key is the first of the columns slide, uri, path, filename, file, slide_id, name (else the first of all): a
    slide's address, file name, or file name without suffix.

    Raises:
        ConfigError: the file is no CSV, or tells two things of one slide.
        StorageError: it can't be read.
    """
    try:
        reader = csv.DictReader(io.StringIO(storage.read_bytes(uri, options).decode("utf-8-sig")))
        names = list(reader.fieldnames or [])
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{uri}: not a CSV in UTF-8 ({error}); save it as one") from error
    if len(names) < 2:
        raise ConfigError(f"{uri}: a CSV with a header of a slide column and at least one more is needed, not {names}")
    lower = {name.strip().lower(): name for name in names}
    key = next((lower[name] for name in _KEY_COLUMNS if name in lower), names[0])
    metadata: Metadata = {}
    for row in rows:
        values = {n.strip().lower(): (row[n] or "").strip() for n in names if n != key and (row[n] or "").strip()}
        slide = (row[key] or "").strip()
        if metadata.setdefault(slide, values) != values:
            raise ConfigError(f"{uri}: two different rows for slide {slide!r}; keep one")
    return metadata


def _lookup(metadata: Metadata, uri: str) -> dict[str, str] | None:
    name = storage.name_of(uri)
    return next((metadata[key] for key in (uri, name, PurePosixPath(name).stem) if key in metadata), None)


def stand_in_mpp(metadata: Metadata, uri: str, default: float | None) -> float | None:
    """The µm/px that serve a slide whose own metadata has none: the CSV's column `mpp`, else the default.

    Raises:
        ConfigError: the CSV's is no number above 0.
    """
    text = (_lookup(metadata, uri) or {}).get("mpp")
    if text is None:
        return default
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not mpp > 0:
        raise ConfigError(f"{uri}: mpp {text!r} in the CSV; it is µm per pixel, a number above 0")
    return mpp


def with_metadata(table: pa.Table, metadata: Metadata) -> tuple[pa.Table, int]:
    """The table with the CSV's columns joined, and how many slides the CSV does not know; those keep what they had."""
    found = [_lookup(metadata, cast(str, slide.as_py())) for slide in table["slide"]]
    joined = [
        before if values is None else json.dumps(values, sort_keys=True)
        for before, values in zip(table["metadata"].to_pylist(), found, strict=True)
    ]
    at = table.schema.get_field_index("metadata")
    table = table.set_column(at, "metadata", pa.array(joined, pa.string()))
    return table, sum(values is None for values in found)
