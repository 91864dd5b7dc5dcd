"""Slides of the Imaging Data Commons (IDC): its index tells which series of DICOM slides there are, and what they show.

`idc_index.parquet` has a row a series. Its companions, where they lie beside it, are used as well: `sm_index.parquet`
(organ; its columns may be asked for), `sm_instance_index.parquet` (a row a file: which are levels, so that no folder is
listed and no label looked at) and `collections_index.parquet` (organ of a collection).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from streaming import storage
from streaming.catalog.named import Named
from streaming.errors import ConfigError

SCHEME = "idc:"
_SERIES, _OF_SLIDES, _OF_FILES = "idc_index.parquet", "sm_index.parquet", "sm_instance_index.parquet"
_OF_COLLECTIONS = "collections_index.parquet"
_KEY = "SeriesInstanceUID"
_NEEDED = (
    *("collection_id", "PatientID", "SeriesInstanceUID", "Modality"),
    *("instanceCount", "series_size_MB", "series_aws_url"),
)
_NUMBERS = ("instanceCount", "series_size_MB")
_ORGAN_OF_SLIDE, _ORGAN = "primaryAnatomicStructure_CodeMeaning", ("collection_id", "tumor_locations")
# What is told of a series, where the index has it.
_TOLD = ("SeriesDescription", "license_short_name", "source_DOI", _ORGAN_OF_SLIDE)
# Of SQL, what is in quotes or a comment; in a group of its own if in double quotes.
_LEXEMES = re.compile(
    r"""'(?:[^']|'')*'|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|("(?:[^"]|"")*")""", re.DOTALL
)
# A TCGA barcode begins with the project, then the tissue source site.
_BARCODE = re.compile(r"TCGA-([A-Z0-9]{2})-")


@dataclass(frozen=True, kw_only=True)
class IdcOptions:
    """Which slides of the Imaging Data Commons."""

    where: str | None = None
    """of `idc:` sources, the series for which this SQL on the index's columns (SQLite's, LIKE heeds case) holds"""
    idc_index: str | None = None
    """idc_index.parquet or a folder with it and its companions; none: that of the package idc-index-data"""


def find_series(
    patterns: Sequence[str], asked: IdcOptions, options: storage.StorageOptions | None = None
) -> list[Named]:
    """The series of slides in the collections that patterns (`tcga_*`) name, by the index; no object is asked for.

    Raises:
        ConfigError: no index, no such collection, SQL that makes no sense, or no series left.
        StorageError: the index can't be read.
    """
    index = _Index.at(asked.idc_index, options)
    table, slides = index.table(_SERIES), index.companion(_OF_SLIDES)
    missing = [name for name in _NEEDED if name not in table.columns]
    if missing:
        raise ConfigError(f"{table.uri}: no index of IDC: it has no column {', '.join(missing)}")
    _check_types(table)
    further = [] if slides is None else _not_in(table.columns, slides.columns)
    condition = None if asked.where is None else _Condition.of(asked.where, [*table.columns, *further])
    wanted = {*_NEEDED, *_TOLD, *(condition.columns if condition else ())}
    series = table.rows([name for name in table.columns if name in wanted], pc.field("Modality") == "SM")
    series = _without_nonsense(series)
    collections = _collections(series, patterns, table.uri)
    series = _of_those(series, "collection_id", set[str]().union(*collections.values()))
    if slides is not None:
        series = _beside(series, slides.rows([_KEY, *(name for name in further if name in wanted)]))
    if condition is not None:
        series = condition.chosen(series)
        _check_left(collections, set(series["collection_id"].to_pylist()), condition)
    for name in _NEEDED:
        if name != "PatientID" and series[name].null_count:
            raise ConfigError(
                f"{table.uri}: {series[name].null_count:,} of the series asked for have no {name}; "
                f'leave them out by --where "{name} IS NOT NULL", or take another index'
            )
    organs, files = index.companion(_OF_COLLECTIONS), index.companion(_OF_FILES)
    found = list(_named(series, {} if organs is None else _organs(organs.rows(_ORGAN))))
    return found if files is None else _with_levels(found, series[_KEY], files)


@dataclass(frozen=True)
class _Index:
    """A folder with the index's tables."""

    folder: str
    options: storage.StorageOptions | None

    @classmethod
    def at(cls, uri: str | None, options: storage.StorageOptions | None) -> _Index:
        """The index that the user names, else that of the installed package.

        Raises:
            ConfigError: there is none.
        """
        if uri is None:
            try:
                installed: Any = importlib.import_module("idc_index_data")
            except ImportError:
                raise ConfigError(
                    "idc: the index of the Imaging Data Commons is not here; pip install 'idc-index-data', "
                    "or name its idc_index.parquet by --idc-index"
                ) from None
            uri = str(installed.IDC_INDEX_PARQUET_FILEPATH)
        folder = uri.removesuffix(f"/{_SERIES}") if uri != _SERIES else "."
        if folder.endswith(".parquet"):
            raise ConfigError(f"--idc-index {uri}: its name must be {_SERIES}; companions are looked for beside it")
        index = cls(folder, options)
        if not storage.exists(index.uri(_SERIES), options):
            raise ConfigError(f"--idc-index {uri}: there is no {_SERIES}; name that file, or a folder with it")
        return index

    def uri(self, name: str) -> str:
        return storage.join(self.folder, name)

    def table(self, name: str) -> storage.TableFile:
        return storage.open_table(self.uri(name), self.options)

    def companion(self, name: str) -> storage.TableFile | None:
        return self.table(name) if storage.exists(self.uri(name), self.options) else None


def _check_types(table: storage.TableFile) -> None:
    is_text, is_number = (pa.types.is_string, pa.types.is_large_string), (pa.types.is_integer, pa.types.is_floating)
    for name in _NEEDED:
        kind = table.file.schema_arrow.field(name).type
        if not any(fits(kind) for fits in (is_number if name in _NUMBERS else is_text)):
            what = "numbers" if name in _NUMBERS else "text"
            raise ConfigError(f"{table.uri}: no index of IDC: its column {name} is of {kind}, not of {what}")


def _without_nonsense(series: pa.Table) -> pa.Table:
    """The series, of which counts and sizes that are none are missing."""
    for name in _NUMBERS:
        values = series[name]
        kept = pc.if_else(pc.and_(pc.is_finite(values), pc.greater_equal(values, pa.scalar(0))), values, None)
        series = series.set_column(series.column_names.index(name), name, kept)
    return series


def _collections(series: pa.Table, patterns: Sequence[str], uri: str) -> dict[str, set[str]]:
    """The collections that each pattern names."""
    known = cast("list[str]", pc.unique(series["collection_id"].drop_null()).to_pylist())
    if not known:
        raise ConfigError(f"{uri}: no collection with slides (Modality SM) is there; take another index")
    wanted: dict[str, set[str]] = {}
    for pattern in patterns:
        wanted[pattern] = {name for name in known if fnmatchcase(name, pattern.lower())}
        if not wanted[pattern]:
            near = difflib.get_close_matches(pattern.lower(), known, n=1, cutoff=0.0)
            raise ConfigError(f"idc:{pattern}: no collection of slides in {uri} is named so; the nearest is {near[0]}")
    return wanted


def _check_left(collections: Mapping[str, set[str]], left: set[Any], condition: _Condition) -> None:
    """Refuses a pattern of which a condition leaves nothing, which nobody would notice among the others."""
    for pattern, names in collections.items():
        if not names & left:
            raise ConfigError(
                f"{SCHEME}{pattern}: no series left by --where {condition.told}; = and LIKE heed case; change the "
                "condition, or leave the collection out"
            )


def _of_those(table: pa.Table, column: str, values: Iterable[Any]) -> pa.Table:
    """The rows whose column has one of some values."""
    return table.filter(pc.is_in(table[column], pa.array(sorted(values)).cast(table[column].type)))


def _not_in(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of others that are no names, whatever their case: SQL does not heed it."""
    known = {name.lower() for name in names}
    return [name for name in others if name.lower() not in known]


def _beside(series: pa.Table, slides: pa.Table) -> pa.Table:
    """The series with the columns of another table of series beside theirs (`pa.Table.join` knows no lists)."""
    uids = slides[_KEY].cast(series[_KEY].type)
    found = slides.take(pc.index_in(series[_KEY], uids))
    for name in found.column_names[1:]:
        series = series.append_column(name, found[name])
    return series


@dataclass(frozen=True)
class _Condition:
    """SQL on columns of series, for Python's own database: Arrow reads no SQL."""

    where: str
    known: Sequence[str]
    columns: frozenset[str]
    """those that it reads"""

    @classmethod
    def of(cls, where: str, known: Sequence[str]) -> _Condition:
        """A condition on some of the known columns.

        Raises:
            ConfigError: it makes no sense, or names others.
        """
        read = set[str]()

        def note(action: int, _: str | None, column: str | None, *__: str | None) -> int:
            if action == sqlite3.SQLITE_READ and column is not None:
                read.add(column)
            return sqlite3.SQLITE_OK

        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            _create(database, known)
            database.set_authorizer(note)
            cls(where, known, frozenset())._select(database)
        return cls(where, known, frozenset(read & set(known)))

    @property
    def told(self) -> str:
        """It on one line."""
        return " ".join(self.where.split())

    def chosen(self, series: pa.Table) -> pa.Table:
        """The rows for which it holds.

        Raises:
            ConfigError: it fails on one of them.
        """
        names = sorted({_KEY, *self.columns})
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            _create(database, names)
            columns = [[_value(value) for value in series[name].to_pylist()] for name in names]
            database.executemany(
                f"INSERT INTO series VALUES ({', '.join('?' * len(names))})", zip(*columns, strict=True)
            )
            return series.take(pa.array(self._select(database), pa.int64()))

    def _select(self, database: sqlite3.Connection) -> list[int]:
        # What stands in double quotes and is no column, SQLite takes as text: a name that is misspelt would be equal to
        # nothing, without a word. In backticks it is a column or an error.
        where = _LEXEMES.sub(lambda found: _in_backticks(found[1]) if found[1] else found[0], self.where)
        try:
            rows = database.execute(f"SELECT rowid - 1 FROM series WHERE ({where}\n) ORDER BY rowid").fetchall()
        except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
            raise ConfigError(
                f"--where {self.told}: {error} (text stands in 'single quotes'); columns: {', '.join(self.known)}"
            ) from error
        return [row for (row,) in rows]


def _create(database: sqlite3.Connection, names: Sequence[str]) -> None:
    database.execute("PRAGMA case_sensitive_like = ON")
    database.execute(f"CREATE TABLE series ({', '.join(_quoted(name) for name in names)})")


def _in_backticks(quoted: str) -> str:
    return "`" + quoted[1:-1].replace('""', '"').replace("`", "``") + "`"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _value(value: Any) -> Any:
    """A cell as SQLite has it: of lists, their entries in one text, and the text of all that it has not."""
    if isinstance(value, list):
        return ", ".join(map(str, cast("list[Any]", value)))
    return value if value is None or isinstance(value, (str, int, float, bytes)) else str(value)


def _named(series: pa.Table, organs: Mapping[str, str]) -> Iterator[Named]:
    for row in series.to_pylist():
        collection, patient = str(row["collection_id"]), str(row["PatientID"] or "")
        barcode = _BARCODE.match(patient)
        told = {
            "patient": patient,
            "collection": collection,
            "cohort": collection.split("_")[0],
            "site": barcode[1] if barcode else None,
            "organ": row.get(_ORGAN_OF_SLIDE) or organs.get(collection),
            "description": row.get("SeriesDescription"),
            "license": row.get("license_short_name"),
            "doi": row.get("source_DOI"),
        }
        yield Named(
            uri=row["series_aws_url"].removesuffix("*").rstrip("/"),
            nbytes=round(row["series_size_MB"] * 1e6),
            num_files=int(row["instanceCount"]),
            is_series=True,
            metadata={name: str(value) for name, value in told.items() if value},
        )


def _organs(collections: pa.Table) -> Mapping[str, str]:
    """The organ of each collection that tells just one."""
    names = (collections[name].to_pylist() for name in _ORGAN)
    return {
        str(collection): str(place)
        for collection, place in zip(*names, strict=True)
        if place and place != "Various" and "," not in str(place)
    }


def _with_levels(found: list[Named], uids: pa.ChunkedArray[Any], files: storage.TableFile) -> list[Named]:
    """The same series with the files of their levels, where the table of files tells them."""
    names = (_KEY, "ImageType", "crdc_instance_uuid", "instance_size")
    asked = _of_those(files.rows(names), _KEY, set(uids.to_pylist()))
    levels: dict[Any, list[tuple[str, int]]] = {}
    for uid, kind, uuid, size in zip(*(asked[name].to_pylist() for name in names), strict=True):
        if "VOLUME" in (kind or ()):
            levels.setdefault(uid, []).append((uuid, size))
    return [
        replace(
            series,
            # A key is of one content for ever, so its size tells its version.
            levels=tuple(
                storage.ObjectInfo(f"{series.uri}/{uuid}.dcm", size, "") for uuid, size in sorted(levels.get(uid, []))
            ),
        )
        for series, uid in zip(found, uids.to_pylist(), strict=True)
    ]
