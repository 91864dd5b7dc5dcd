"""Tables as people have them: CSV of any separator and encoding, or Parquet, as rows of text by names of columns."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import PurePosixPath
from typing import Any

from streaming import storage
from streaming.errors import ConfigError

Row = dict[str, str]

SUFFIXES = (".csv", ".tsv", ".parquet")
_SEPARATORS = ",;\t|"
_RENAMED = {"case_id": "patient", "slide_id": "slide"}  # of CLAM's tables
_MISSING = ("nan", "NaN", "<NA>", "NaT", "NA", "N/A")  # as pandas and R write it
_WHOLE = re.compile(r"-?\d+\.0")


def read_rows(uri: str, options: storage.StorageOptions | None = None) -> list[Row]:
    """The rows of a table; what is missing is empty.

    Names of columns are in small letters, with `_` for spaces, CLAM's `case_id` and `slide_id` as ours. Values stay
    text (`0012` is a name), but numbers that are whole in all of a column lose their `.0`, which they got where one
    was missing.

    Raises:
        ConfigError: it is no table, or has no rows.
        StorageError: it can't be read.
    """
    if PurePosixPath(uri).suffix.lower() == ".parquet":
        found: list[dict[Any, Any]] = storage.read_table(uri, options).to_pylist()
    else:
        found = _of_text(uri, _text(storage.read_bytes(uri, options)))
    if not found:
        raise ConfigError(f"{uri}: has no rows; a dataset is a table of paths and labels")
    # A short line of a CSV lacks its last values, a long one has values without a name.
    rows = [{str(k): _value(v) for k, v in row.items() if k is not None} for row in found]
    names = {name: re.sub(r"\s+", "_", name.strip().lower()) for name in rows[0]}
    for name, plain in list(names.items()):
        if plain in _RENAMED and _RENAMED[plain] not in names.values():
            names[name] = _RENAMED[plain]
    whole = {name for name in names if _is_whole([row[name] for row in rows])}
    return [{plain: row[name].removesuffix(".0" * (name in whole)) for name, plain in names.items()} for row in rows]


def _value(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text in _MISSING else text


def _is_whole(values: list[str]) -> bool:
    return any(values) and all(_WHOLE.fullmatch(value) for value in values if value)


def _text(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _of_text(uri: str, text: str) -> list[dict[Any, Any]]:
    text = text.lstrip("\r\n")
    header = text.partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    csv.field_size_limit(sys.maxsize)  # a mask or an annotation may stand in a field
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise ConfigError(f"{uri}: no table ({error}); save it as CSV") from error
