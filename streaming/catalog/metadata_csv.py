"""What a CSV tells of slides: free columns, among them those that streaming knows: `patient`, `cohort` and `mpp`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import cast

import pyarrow as pa

from streaming import storage
from streaming.errors import ConfigError

_KEY_COLUMNS = ("slide", "uri", "path", "filename", "file", "slide_id", "name")


Metadata = Mapping[str, Mapping[str, str]]
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
    metadata: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {n.strip().lower(): (row[n] or "").strip() for n in names if n != key and (row[n] or "").strip()}
        slide = (row[key] or "").strip()
        if metadata.setdefault(slide, values) != values:
            raise ConfigError(f"{uri}: two different rows for slide {slide!r}; keep one")
    return metadata


def lookup(metadata: Metadata, uri: str) -> Mapping[str, str] | None:
    """What a CSV tells of a slide."""
    name = storage.name_of(uri)
    return next((metadata[key] for key in (uri, name, PurePosixPath(name).stem) if key in metadata), None)


def stand_in_mpp(values: Mapping[str, str], uri: str, default: float | None) -> float | None:
    """The µm/px that serve a slide whose own metadata has none: a table's column `mpp`, else the default.

    Raises:
        ConfigError: the table's is no number above 0.
    """
    text = values.get("mpp")
    if text is None:
        return default
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not mpp > 0:
        raise ConfigError(f"{uri}: mpp {text!r} in the table; it is µm per pixel, a number above 0")
    return mpp


def with_metadata(table: pa.Table, told: Callable[[str], Mapping[str, str]]) -> pa.Table:
    """The table with the columns that are told of each slide, by its address; columns of which nothing is told stay."""
    joined = [
        json.dumps(json.loads(before) | dict(told(slide)), sort_keys=True)
        for before, slide in zip(
            cast("list[str]", table["metadata"].to_pylist()), cast("list[str]", table["slide"].to_pylist()), strict=True
        )
    ]
    at = table.schema.get_field_index("metadata")
    return table.set_column(at, "metadata", pa.array(joined, pa.string()))
