"""Tables as people have them: CSV of any separator and encoding, or Parquet, as rows of text by names of columns."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from streaming import storage
from streaming.errors import ConfigError

SUFFIXES = (".csv", ".tsv", ".parquet")
OF_CLAM = {"case_id": "patient", "slide_id": "slide"}
"""what CLAM's tables call our columns"""
_SEPARATORS = ",;\t|"
_MISSING = ("nan", "NaN", "<NA>", "NaT", "NA", "N/A")  # as pandas and R write it
_TOLD = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # for Excel alone
_WHOLE = re.compile(r"-?\d+\.0")


class Row(dict[str, str]):
    """The values of a row by the names of their columns."""

    def __init__(self, values: Mapping[str, str], number: int) -> None:
        super().__init__(values)
        self.number = number
        """of its table, counted from 1, with rows of nothing"""


def read_rows(
    uri: str, options: storage.StorageOptions | None = None, renamed: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of a table, but those of nothing; what is missing is empty.

    Names of columns are in small letters, with `_` for spaces, and as `renamed` has them unless there is such a column.
    Values stay text (`0012` is a name), but numbers that are whole in all of a column lose their `.0`, which they got
    where one was missing. A text in no Unicode is taken for Windows's cp1252, which is told.

    Raises:
        ConfigError: it is no table, or has no rows.
        StorageError: it can't be read.
    """
    if PurePosixPath(uri).suffix.lower() == ".parquet":
        found: list[dict[Any, Any]] = storage.read_table(uri, options).to_pylist()
    else:
        found = _of_text(uri, _text(uri, storage.read_bytes(uri, options)))
    for number, row in enumerate(found, start=1):
        if any(row.get(None) or ()):  # a short line of a CSV lacks its last values, a long one has some without a name
            raise ConfigError(
                f"{uri}: row {number} has more cells than the header; put what holds a comma in double quotes"
            )
    rows = [
        Row({str(k): _value(v) for k, v in row.items() if k is not None}, number)
        for number, row in enumerate(found, start=1)
    ]
    rows = [row for row in rows if any(row.values())]  # spreadsheets save lines of `,,,`
    if not rows:
        raise ConfigError(f"{uri}: has no rows; a table has a line with the names of its columns, and lines of values")
    names = {name: re.sub(r"\s+", "_", name.strip().lower()) for name in rows[0]}
    _check_names(uri, list(names.values()))
    for name, plain in list(names.items()):
        ours = (renamed or {}).get(plain)
        if ours and ours not in names.values():
            names[name] = ours
    whole = {name for name in names if _is_whole([row[name] for row in rows])}
    return [
        Row({plain: row[name].removesuffix(".0" * (name in whole)) for name, plain in names.items()}, row.number)
        for row in rows
    ]


def _check_names(uri: str, names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(filter(None, names)).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{uri}: two columns are called {twice!r}; rename or remove one")


def _value(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text in _MISSING else text


def _is_whole(values: list[str]) -> bool:
    return any(values) and all(_WHOLE.fullmatch(value) for value in values if value)


def _text(uri: str, content: bytes) -> str:
    is_utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors="replace")
    if "\0" in text:  # a workbook of Excel, what is packed, UTF-16 without its mark, UTF-32
        raise ConfigError(f"{uri}: no table of text; save it as CSV in UTF-8, or as Parquet")
    if is_utf_16:
        return text
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        sys.stderr.write(f"{uri}: not in UTF-8; read as cp1252 of Windows: look at names with accents\n")
        return content.decode("cp1252", errors="replace")


def _of_text(uri: str, text: str) -> list[dict[Any, Any]]:
    text = text.lstrip("\r\n")
    told = _TOLD.match(text)
    text = text[told.end() :] if told else text
    header = text.partition("\n")[0]
    separator = told[1] if told else max(_SEPARATORS, key=header.count)
    csv.field_size_limit(sys.maxsize)  # a mask or an annotation may stand in a field
    try:
        # Strictly, or a quote that nobody closes would take all further rows along.
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        _check_names(uri, reader.fieldnames or ())
        return list(reader)
    except csv.Error as error:
        raise ConfigError(f"{uri}: no table ({error}); save it as CSV") from error
