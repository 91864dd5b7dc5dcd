"""Slides of the Imaging Data Commons (IDC): its index tells which series of DICOM slides there are, and what they show.

`idc_index.parquet` has a row a series. Its companions, where they lie beside it, are used as well: `sm_index.parquet`
(organ; its columns may be asked for), `sm_instance_index.parquet` (a row a file: which are levels, so that no folder is
listed and no label looked at) and `collections_index.parquet` (organ of a collection).
"""

from __future__ import annotations

import difflib
import importlib
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
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
_NEEDED = (
    *("collection_id", "PatientID", "SeriesInstanceUID", "Modality"),
    *("instanceCount", "series_size_MB", "series_aws_url"),
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
    series = index.read(_SERIES, filters=[("Modality", "=", "SM")])
    missing = [name for name in _NEEDED if name not in series.column_names]
    if missing:
        raise ConfigError(f"{index.uri(_SERIES)}: no index of IDC: it has no column {', '.join(missing)}")
    series = _of_collections(series, patterns, index.uri(_SERIES))
    slides = index.companion(_OF_SLIDES)
    if slides is not None:
        series = _beside(series, slides)
    if asked.where:
        series = _chosen(series, asked.where)
    if not series.num_rows:
        raise ConfigError(f"{' '.join(SCHEME + p for p in patterns)}: no series left by --where {asked.where}")
    for name in _NEEDED:
        if name != "PatientID" and series[name].null_count:
            raise ConfigError(
                f"{index.uri(_SERIES)}: {series[name].null_count:,} of the series asked for have no {name}; "
                f'leave them out by --where "{name} IS NOT NULL", or take another index'
            )
    found = list(_named(series, index.companion(_OF_COLLECTIONS)))
    files = index.companion(_OF_FILES)
    return found if files is None else _with_levels(found, series["SeriesInstanceUID"].to_pylist(), files)


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

    def read(self, name: str, filters: list[Any] | None = None) -> pa.Table:
        return storage.read_table(self.uri(name), self.options, filters)

    def companion(self, name: str) -> pa.Table | None:
        return self.read(name) if storage.exists(self.uri(name), self.options) else None


def _of_collections(series: pa.Table, patterns: Sequence[str], uri: str) -> pa.Table:
    known = cast("list[str]", pc.unique(series["collection_id"].drop_null()).to_pylist())
    if not known:
        raise ConfigError(f"{uri}: no collection with slides (Modality SM) is there; take another index")
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in known if fnmatchcase(name, pattern.lower())}
        if not found:
            near = difflib.get_close_matches(pattern.lower(), known, n=1, cutoff=0.0)
            raise ConfigError(f"idc:{pattern}: no collection of slides in {uri} is named so; the nearest is {near[0]}")
        wanted |= found
    return series.filter(pc.is_in(series["collection_id"], pa.array(sorted(wanted)).cast(series["collection_id"].type)))


def _beside(series: pa.Table, slides: pa.Table) -> pa.Table:
    """The series with the columns of another table of series beside theirs (`pa.Table.join` knows no lists)."""
    uids = slides["SeriesInstanceUID"].cast(series["SeriesInstanceUID"].type)
    found = slides.take(pc.index_in(series["SeriesInstanceUID"], uids))
    for name in found.column_names:
        if name not in series.column_names:
            series = series.append_column(name, found[name])
    return series


def _chosen(series: pa.Table, where: str) -> pa.Table:
    """The rows for which SQL holds, by Python's own database: Arrow reads no SQL."""
    names = series.column_names
    with sqlite3.connect(":memory:") as database:
        database.execute("PRAGMA case_sensitive_like = ON")
        database.execute(f"CREATE TABLE series ({', '.join(_quoted(name) for name in names)})")
        columns = [[_value(value) for value in series[name].to_pylist()] for name in names]
        database.executemany(f"INSERT INTO series VALUES ({', '.join('?' * len(names))})", zip(*columns, strict=True))
        try:
            rows = database.execute(f"SELECT rowid - 1 FROM series WHERE ({where}\n) ORDER BY rowid").fetchall()
        except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
            raise ConfigError(f"--where {where}: {error}; columns: {', '.join(names)}") from error
    return series.take(pa.array([row for (row,) in rows], pa.int64()))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _value(value: Any) -> Any:
    """A cell as SQLite has it: of lists, their entries in one text."""
    return ", ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else value


def _named(series: pa.Table, collections: pa.Table | None) -> Iterator[Named]:
    organs = {} if collections is None else _organs(collections)
    for row in series.to_pylist():
        collection, patient = row["collection_id"], row["PatientID"] or ""
        barcode = _BARCODE.match(patient)
        told = {
            "patient": patient,
            "collection": collection,
            "cohort": collection.split("_")[0],
            "site": barcode[1] if barcode else None,
            "organ": row.get("primaryAnatomicStructure_CodeMeaning") or organs.get(collection),
            "description": row.get("SeriesDescription"),
            "license": row.get("license_short_name"),
            "doi": row.get("source_DOI"),
        }
        yield Named(
            uri=row["series_aws_url"].removesuffix("*").rstrip("/"),
            nbytes=round(row["series_size_MB"] * 1e6),
            num_files=row["instanceCount"],
            is_series=True,
            metadata={name: str(value) for name, value in told.items() if value},
        )


def _organs(collections: pa.Table) -> Mapping[str, str]:
    """The organ of each collection that tells just one."""
    names = (collections[name].to_pylist() for name in ("collection_id", "tumor_locations"))
    return {
        str(collection): str(place)
        for collection, place in zip(*names, strict=True)
        if place and place != "Various" and "," not in str(place)
    }


def _with_levels(found: list[Named], uids: Sequence[Any], files: pa.Table) -> list[Named]:
    """The same series with the files of their levels, where the table of files tells them."""
    files = files.filter(pc.is_in(files["SeriesInstanceUID"], pa.array(uids).cast(files["SeriesInstanceUID"].type)))
    names = ("SeriesInstanceUID", "ImageType", "crdc_instance_uuid", "instance_size")
    levels: dict[str, list[tuple[str, int]]] = {}
    for uid, kind, uuid, size in zip(*(files[name].to_pylist() for name in names), strict=True):
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
        for series, uid in zip(found, uids, strict=True)
    ]
