"""A user's list of tiles, in Parquet, made into what is drawn from at once (`streaming.plan.tile_list`).

It is read twice: once to count, once to put each row where it belongs. Rows wait in a temporary file, part after part
of the result, so memory holds one part; only the rows of one slide at one mpp must lie in memory together. Rows that
are the same in another order give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.known import keys
from streaming.errors import ConfigError, MissingError, PlanError, StorageError
from streaming.plan.alias import alias_table
from streaming.plan.counter_random import Indices
from streaming.plan.tile_list import PLACE, WEIGHED, Groups, LeftOut, TileList, write_end
from streaming.progress import ProgressLine
from streaming.slide.geometry import is_fine_enough

_VERSION = 1
_READ_ROWS = 2**17
# Of the result, made at once: some 70 bytes a row are in memory.
_PART_ROWS = 2**21
_NEEDED = ("slide", "x", "y", "mpp")
_MOST_MPP = 2**20


def packed_list(
    uri: str, catalog: Catalog, size: int, mpp_tolerance: float, max_upsampling: float, part_rows: int = _PART_ROWS
) -> TileList:
    """A list of tiles as it is drawn from, for tiles of `size` px: opened, or made of the user's file beside that.

    uri is a Parquet file, or a folder of such, with the columns slide (address, file name, or that without suffix), x,
    y (level-0 pixels of the corner), mpp, and if wanted weight or cluster.

    Raises:
        ConfigError: it lacks columns, or has values that make no sense.
        PlanError: none of its tiles can be drawn.
        StorageError: it can't be read, or nothing can be written beside it.
    """
    uri, options = storage.canonical(uri), catalog.storage_options
    files = _files(uri, options)
    told = [*(file.digest for file in files), catalog.fingerprint, size, mpp_tolerance, max_upsampling, _VERSION]
    packed = f"{uri}.tiles-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"
    if not storage.exists(packed, options):
        _Packing(uri, files, catalog, size, mpp_tolerance, max_upsampling, part_rows).write(packed)
    return TileList.load(uri, packed, options, catalog.staging)


def _files(uri: str, options: storage.StorageOptions | None) -> list[storage.ObjectInfo]:
    found, is_file = storage.expand(uri, options)
    files = found if is_file else [info for info in found if info.uri.endswith(".parquet")]
    if not files:
        raise MissingError(f"{uri}: no .parquet file in this folder; name a list of tiles, or a folder of its parts")
    return files


@dataclass(frozen=True)
class _Rows:
    """Usable rows as columns (n,)."""

    key: Indices
    """of the group: the slide's row of the catalog, and the number of the mpp"""
    x: NDArray[np.int32]
    y: NDArray[np.int32]
    extra: NDArray[Any] | None
    """weights float64, or numbers of clusters int64"""


class _Packing:
    def __init__(
        self,
        uri: str,
        files: Sequence[storage.ObjectInfo],
        catalog: Catalog,
        size: int,
        mpp_tolerance: float,
        max_upsampling: float,
        part_rows: int,
    ) -> None:
        self._uri, self._files, self._options = uri, files, catalog.storage_options
        self._size, self._tolerance, self._max_upsampling = size, mpp_tolerance, max_upsampling
        self._part_rows = part_rows
        self._slide_mpp, self._width, self._height = (catalog.column(name) for name in ("mpp", "width", "height"))
        self._known = _known_names(catalog)
        self._row_of: dict[str, int] = {}
        self._mpp: dict[float, int] = {}
        self._cluster: dict[Any, int] = {}
        self._extra, self._num_rows = self._look()
        self._dtype = np.dtype([("group", "<i4"), *PLACE.descr, *([("weight", "<f8")] if self._extra else [])])

    def _look(self) -> tuple[str | None, int]:
        """Whether there are weights or clusters, and how many rows; all columns are there."""
        kinds, num_rows = set[tuple[str, ...]](), 0
        for info in self._files:
            with storage.reading_table(info.uri, self._options) as table:
                names = set(table.schema_arrow.names)
                num_rows += table.metadata.num_rows
            if lacking := [name for name in _NEEDED if name not in names]:
                raise ConfigError(
                    f"{info.uri}: a list of tiles has the columns {', '.join(_NEEDED)}, and if wanted weight or "
                    f"cluster; {', '.join(lacking)} is missing"
                )
            kinds.add(tuple(sorted(names & {"weight", "cluster"})))
        if len(kinds) > 1:
            raise ConfigError(f"{self._uri}: its files have other weights or clusters; give all the same columns")
        (extra,) = kinds
        if len(extra) > 1:
            raise ConfigError(f"{self._uri}: has weight and cluster; keep one of these columns")
        return next(iter(extra), None), num_rows

    def write(self, packed: str) -> None:
        """Makes the packed list."""
        with ProgressLine("tile list", "rows", total=2 * self._num_rows) as progress:
            self._progress, self._done = progress, 0
            keys, counts, of_cluster, left_out = self._counted()
            if not len(keys):
                raise PlanError(f"{self._uri}: {' '.join(['no tile of it can be drawn:', *left_out.lines()])}")
            values = np.array(list(self._mpp))
            order = np.lexsort((values[keys % _MOST_MPP], keys // _MOST_MPP))
            slide, mpp = keys[order] // _MOST_MPP, values[keys[order] % _MOST_MPP]
            group_of_key = np.argsort(order)  # keys are sorted
            groups = Groups(slide, mpp, np.zeros(len(keys)), counts[order])
            with tempfile.TemporaryFile() as waiting:
                self._scatter(cast(BinaryIO, waiting), keys, group_of_key, groups, of_cluster)
                try:
                    storage.write_stream(
                        packed,
                        lambda file: self._gather(cast(BinaryIO, waiting), file, groups, left_out),
                        self._options,
                    )
                except StorageError as error:
                    raise type(error)(
                        f"{error}; a list is made ready beside itself: copy it to where you may write"
                    ) from error

    def _counted(self) -> tuple[Indices, Indices, Indices, LeftOut]:
        """Keys of all groups, sorted, and their rows; the rows of each cluster; and what is left out."""
        counts, of_cluster = _Counts(), np.zeros(0, np.int64)
        tally: dict[str, int] = dict.fromkeys(("of_missing", "outside", "too_coarse", "weightless"), 0)
        for rows in self._usable(tally):
            counts.add(rows.key)
            if self._extra == "cluster":
                found = np.bincount(cast(Indices, rows.extra), minlength=len(of_cluster)).astype(np.int64)
                found[: len(of_cluster)] += of_cluster
                of_cluster = found
        missing = [name for name, row in self._row_of.items() if row < 0]
        return *counts.total(), of_cluster, LeftOut(len(missing), min(missing, default=""), **tally)

    def _scatter(
        self, waiting: BinaryIO, keys: Indices, group_of_key: Indices, groups: Groups, of_cluster: Indices
    ) -> None:
        """Writes all rows into the part of the result that they belong to, in any order."""
        first = np.concatenate([[0], np.cumsum(groups.num_rows)[:-1]])
        part_of = first // self._part_rows
        # Where the next row of each part goes.
        at = np.zeros(int(part_of[-1]) + 1, np.int64)
        at[part_of[::-1]] = first[::-1]
        for rows in self._usable(None):
            group = group_of_key[np.searchsorted(keys, rows.key)]
            records = np.empty(len(group), self._dtype)
            records["group"], records["x"], records["y"] = group, rows.x, rows.y
            if rows.extra is not None:
                records["weight"] = 1 / of_cluster[rows.extra] if self._extra == "cluster" else rows.extra
            part = part_of[group]
            records, part = records[order := np.argsort(part, kind="stable")], part[order]
            for number, some in _runs(part):
                os.pwrite(waiting.fileno(), records[some].tobytes(), int(at[number]) * self._dtype.itemsize)
                at[number] += some.stop - some.start

    def _gather(self, waiting: BinaryIO, file: BinaryIO, groups: Groups, left_out: LeftOut) -> None:
        """Writes the result, part after part."""
        ends = np.cumsum(groups.num_rows)
        part_of = (ends - groups.num_rows) // self._part_rows
        digest, begin, nbytes = hashlib.blake2b(digest_size=16), 0, 0
        for _, some in _runs(part_of):
            end = int(ends[some.stop - 1])
            size = self._dtype.itemsize
            records = np.frombuffer(os.pread(waiting.fileno(), (end - begin) * size, begin * size), self._dtype)
            content = self._part(records, groups)
            digest.update(content)
            file.write(content)
            begin, nbytes = end, nbytes + len(content)
        for column in (groups.slide, groups.mpp, groups.weight, groups.num_rows):
            digest.update(column.tobytes())
        write_end(file, nbytes, groups, digest.hexdigest(), left_out, is_weighted=self._extra is not None)

    def _part(self, records: NDArray[Any], groups: Groups) -> bytes:
        """Rows of whole groups as they are written; the groups' weights are filled in."""
        names = [name for name in ("weight", "x", "y", "group") if name in self._dtype.names]  # pyright: ignore[reportOperatorIssue]
        records = records[np.lexsort([records[name] for name in names])]
        made = np.empty(len(records), WEIGHED if self._extra else PLACE)
        made["x"], made["y"] = records["x"], records["y"]
        for group, some in _runs(records["group"]):
            if not self._extra:
                groups.weight[group] = some.stop - some.start
                continue
            weights = records["weight"][some]
            groups.weight[group] = np.cumsum(weights)[-1]
            keep, other = alias_table(weights)
            made["keep"][some] = np.minimum(np.rint(keep * 2.0**32), 2**32 - 1).astype(np.uint32)
            made["other"][some] = other
        return made.tobytes()

    def _usable(self, tally: dict[str, int] | None) -> Iterator[_Rows]:
        """All rows that can be drawn, some at a time; to `tally` is added how many can't, by reason."""
        names = [*_NEEDED, *([self._extra] if self._extra else [])]
        for info in self._files:
            with storage.reading_table(info.uri, self._options) as table:
                for batch in table.iter_batches(_READ_ROWS, columns=names, use_threads=False):
                    self._done += len(batch)
                    self._progress.update(self._done)
                    yield self._of_batch(info.uri, batch, {} if tally is None else tally)

    def _of_batch(self, uri: str, batch: pa.RecordBatch, tally: dict[str, int]) -> _Rows:
        slide = self._encoded(uri, batch, "slide", self._slide_row)
        x, y, mpp = (self._numbers(uri, batch, name) for name in ("x", "y", "mpp"))
        if not ((mpp > 0) & np.isfinite(mpp)).all():
            raise ConfigError(f"{uri}: an mpp is {mpp[~((mpp > 0) & np.isfinite(mpp))][0]:g}; it is µm/px, above 0")
        known, on = slide >= 0, np.maximum(slide, 0)
        half = self._size * mpp / self._slide_mpp[on] / 2
        inside = (x + half >= 0) & (x + half < self._width[on]) & (y + half >= 0) & (y + half < self._height[on])
        fine = is_fine_enough(self._slide_mpp[on], mpp, self._max_upsampling, self._tolerance)
        extra, has_weight = None, np.ones(len(slide), np.bool_)
        if self._extra == "cluster":
            extra = self._encoded(
                uri, batch, "cluster", lambda name: self._cluster.setdefault(name, len(self._cluster))
            )
        elif self._extra == "weight":
            extra = self._numbers(uri, batch, "weight")
            if not ((extra >= 0) & np.isfinite(extra)).all():
                raise ConfigError(
                    f"{uri}: a weight is {extra[~((extra >= 0) & np.isfinite(extra))][0]:g}; it is 0 or more"
                )
            has_weight = extra > 0
        left = np.ones(len(slide), np.bool_)
        for reason, good in (
            ("of_missing", known),
            ("weightless", has_weight),
            ("outside", inside),
            ("too_coarse", fine),
        ):
            tally[reason] = tally.get(reason, 0) + int((left & ~good).sum())
            left &= good
        values, number = np.unique(mpp[left], return_inverse=True)
        numbers = np.array([self._mpp.setdefault(value, len(self._mpp)) for value in values.tolist()], np.int64)
        if len(self._mpp) > _MOST_MPP:
            raise ConfigError(f"{uri}: over {_MOST_MPP:,} different mpp; round them")
        key = slide[left] * _MOST_MPP + numbers[number]
        x, y = (np.rint(at[left]).astype(np.int32) for at in (x, y))
        return _Rows(key, x, y, None if extra is None else extra[left])

    def _slide_row(self, name: str) -> int:
        if name not in self._row_of:
            self._row_of[name] = next((self._known[key] for key in keys(name) if key in self._known), -1)
        return self._row_of[name]

    def _encoded(self, uri: str, batch: pa.RecordBatch, name: str, number: Any) -> Indices:
        """The number of each row's text (or whatever a cluster is called by), int64 (n,)."""
        column = _filled(uri, batch, name)
        found = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        numbers = np.array([number(value) for value in found.dictionary.to_pylist()], np.int64)
        return numbers[found.indices.to_numpy(zero_copy_only=False)] if len(column) else np.zeros(0, np.int64)

    def _numbers(self, uri: str, batch: pa.RecordBatch, name: str) -> NDArray[np.float64]:
        column = _filled(uri, batch, name)
        try:
            return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{uri}: the column {name} is {column.type}; it holds numbers") from error


def _filled(uri: str, batch: pa.RecordBatch, name: str) -> Any:
    """A column, in which no row lacks a value."""
    column: Any = batch.column(name)
    if column.null_count:
        raise ConfigError(f"{uri}: {column.null_count:,} rows have no {name}; fill them in, or leave them out")
    return column


class _Counts:
    """How often each of some numbers came."""

    def __init__(self) -> None:
        self._found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        self._pending = 0

    def add(self, numbers: Indices) -> None:
        self._found.append(np.unique(numbers, return_counts=True))
        self._pending += len(self._found[-1][0])
        if self._pending > max(2**20, len(self._found[0][0])):
            self._found, self._pending = [self.total()], 0

    def total(self) -> tuple[Indices, Indices]:
        """The numbers, sorted, and their counts."""
        keys, number = np.unique(np.concatenate([keys for keys, _ in self._found]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, number, np.concatenate([count for _, count in self._found]))
        return keys, counts


def _runs(numbers: Indices) -> Iterator[tuple[int, slice]]:
    """Each stretch of equal numbers, and where it is."""
    ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    begin = 0
    for end in ends:
        if end > begin:
            yield int(numbers[begin]), slice(begin, end)
        begin = end


def _known_names(catalog: Catalog) -> dict[str, int]:
    """Rows by what a slide may be called: its address, and where no other slide has them its name and stem."""
    found, twice = dict[str, int](), set[str]()
    slides = catalog.slides()
    for row, uri in enumerate(slides):
        for called in keys(uri)[1:]:
            if found.setdefault(called, row) != row:
                twice.add(called)
    return {called: row for called, row in found.items() if called not in twice} | {
        uri: row for row, uri in enumerate(slides)
    }
