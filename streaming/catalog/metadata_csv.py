"""What a table tells of slides: free columns, among them those that streaming knows: `patient`, `cohort` and `mpp`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import cast

import pyarrow as pa

from streaming import storage
from streaming.catalog.tables import OF_CLAM, read_rows
from streaming.errors import ConfigError
from streaming.slide.resolution import MPP_RANGE, is_plausible_mpp, number

_KEY_COLUMNS = ("slide", "uri", "path", "filename", "file", "name")


Metadata = Mapping[str, Mapping[str, str]]
"""{a slide's key: {column: value}}"""


def read_metadata(uri: str, options: storage.StorageOptions | None) -> Metadata:
    """A table of free columns, as `read_rows` reads it.

    The key is the first of the columns slide (slide_id), uri, path, filename, file, name (else the first of all): a
    slide's address, file name, or file name without suffix.

    Raises:
        ConfigError: the file is no table, or tells two things of one slide, or something of none.
        StorageError: it can't be read.
    """
    rows = read_rows(uri, options, OF_CLAM)
    names = list(rows[0])
    if len(names) < 2:
        raise ConfigError(f"{uri}: a table with a column of slides and at least one more is needed, not {names}")
    key = next((name for name in _KEY_COLUMNS if name in names), names[0])
    metadata: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {name: value for name, value in row.items() if name and name != key and value}
        if values and not row[key]:
            raise ConfigError(f"{uri}: row {row.number} has no {key}; fill it in, or leave the row out")
        if metadata.setdefault(row[key], values) != values:
            raise ConfigError(f"{uri}: two different rows for slide {row[key]!r}; keep one")
    return metadata


def lookup(metadata: Metadata, uri: str) -> Mapping[str, str] | None:
    """What a table tells of a slide."""
    name = storage.name_of(uri)
    return next((metadata[key] for key in (uri, name, PurePosixPath(name).stem) if key in metadata), None)


def mpp_of(values: Mapping[str, str], uri: str) -> float | None:
    """The µm/px that a table's column `mpp` gives a slide; a comma may stand for the point.

    Raises:
        ConfigError: it is no number, or no microscope's.
    """
    text = values.get("mpp")
    if text is None:
        return None
    mpp = number(text)
    if mpp is None or not is_plausible_mpp(mpp):
        raise ConfigError(f"{uri}: mpp {text!r} in the table; it is µm per pixel, {MPP_RANGE}")
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
