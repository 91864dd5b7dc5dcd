"""The block index: some bytes a slide that tell how to read its blocks, and where each lies, without the slide.

    magic, length of the header │ header: JSON │ table of level 0 │ table of level 1 │ …

The header names the objects that the blocks lie in, each with its version; offsets are counted on from one object to
the next. A table is records of 64 blocks in the grid's order: the offset of the first as uint64, then the blocks'
lengths, then the gaps before each, both in as few bytes as the level needs (scanners write blocks one after the other:
no gaps, two or three bytes of length, so some 2.2 to 3.2 bytes a block; blocks in no order take up to 8 bytes of gap
more). One
block's place costs one small read, which the page cache shares between all processes of a node. Where those bytes come
from is `IndexBytes`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError
from streaming.slide.block_level import BlockedSlide, BlockLevel, SlideObject
from streaming.slide.codecs import BlockFormat
from streaming.slide.geometry import Rectangle
from streaming.storage.ranges import Span

if TYPE_CHECKING:
    from streaming.storage.sparse_copy import SparseCopy

_MAGIC = b"tilestream blocks 5\n"
_BODY = len(_MAGIC) + 8
_RECORD = 64

_MIN_HEAD = 4096  # read at first; most headers are shorter

Ints = NDArray[np.int64]


class IndexBytes(Protocol):
    """The content of a block index, wherever it lies. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        """That many bytes from an offset on; fewer only where the content ends.

        Raises:
            CatalogError: there is no such file.
            StorageError: it lies remote and can't be fetched.
        """
        ...

    def copied(self, spans: Sequence[Span]) -> tuple[SparseCopy, list[Span]] | None:
        """Where some spans of it lie in a copy that is fetched part by part; None where it needs no fetching."""
        ...


@dataclass(frozen=True, slots=True)
class _InMemory:
    content: bytes
    name: str = "the index"

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        del count  # it costs nothing
        return self.content[offset : offset + size]

    def copied(self, spans: Sequence[Span]) -> None:
        del spans


@dataclass(frozen=True, slots=True)
class IndexedLevel:
    """A level as a grid of blocks; width, height in its own pixels. Its table is read where `places` needs it."""

    width: int
    height: int
    form: BlockFormat
    index: IndexBytes = field(repr=False, compare=False)
    at: int
    """where its table begins in the index"""
    length_bytes: int
    """bytes that the table spends on a block's length"""
    gap_bytes: int
    """bytes that it spends on the gap before a block"""

    @property
    def columns(self) -> int:
        """Blocks in a row."""
        return -(-self.width // self.form.width)

    @property
    def blocks_of_plane(self) -> int:
        """Blocks that cover the level once; those of further planes follow."""
        return self.columns * -(-self.height // self.form.height)

    @property
    def _record_nbytes(self) -> int:
        return 8 + _RECORD * (self.length_bytes + self.gap_bytes)

    def span(self, first: int, last: int) -> Span:
        """The bytes of the index that `places` reads."""
        size = self._record_nbytes
        return self.at + first // _RECORD * size, self.at + (last // _RECORD + 1) * size

    def places(self, first: int, last: int, count: Counters = UNCOUNTED) -> tuple[list[int], list[int]]:
        """Offsets and lengths of the blocks first to last (row by row, both included).

        Raises:
            CatalogError: the index is missing or cut off.
            StorageError: it lies remote and can't be fetched.
        """
        wide, gap_wide = self.length_bytes, self.gap_bytes
        size, (start, stop) = self._record_nbytes, self.span(first, last)
        begin, end = first // _RECORD, last // _RECORD + 1
        raw = self.index.read(start, stop - start, count)
        if len(raw) != stop - start:
            raise CatalogError(f"{self.index.name}: the block index is cut off; build the catalog anew")
        offsets: list[int] = []
        lengths: list[int] = []
        # Plain integers: for the two or three blocks that a tile wants in a row, arrays cost three times as much.
        for record in range(begin, end):
            at = (record - begin) * size
            lengths_at, gaps_at = at + 8, at + 8 + _RECORD * wide
            skip, stop = max(first - record * _RECORD, 0), min(last + 1 - record * _RECORD, _RECORD)
            offset = _number(raw, at, 8) + _sum(raw, lengths_at, wide, skip)
            offset += sum(_gap(raw, gaps_at + gap_wide * i, gap_wide) for i in range(skip if gap_wide else 0))
            for i in range(skip, stop):
                nbytes = _number(raw, lengths_at + wide * i, wide)
                offset += _gap(raw, gaps_at + gap_wide * i, gap_wide)
                offsets.append(offset)
                lengths.append(nbytes)
                offset += nbytes
        return offsets, lengths


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """All that reading a slide's blocks needs; mpp is the metadata's in µm/px, None where it has none.

    The blocks' offsets are counted on from one object to the next.
    """

    objects: tuple[SlideObject, ...]
    vendor: str
    mpp: float | None
    bounds: Rectangle | None
    """what of it was scanned; none: all"""
    levels: tuple[IndexedLevel, ...]


def pack(slide: BlockedSlide, mpp: float | None) -> bytes:
    """The index of a slide as a file's content."""
    levels: list[dict[str, Any]] = []
    tables: list[bytes] = []
    forms: list[BlockFormat] = []  # mostly one for all levels, with half a kilobyte of tables
    at = 0
    for level in slide.levels:
        table, length_bytes, gap_bytes = _table(level)
        if level.form not in forms:
            forms.append(level.form)
        levels.append(
            {
                "size": [level.width, level.height],
                "form": forms.index(level.form),
                "at": at,
                "bytes": [length_bytes, gap_bytes],
            }
        )
        tables.append(table)
        at += len(table)
    objects = [[entry.name, entry.size, entry.tag] for entry in slide.objects]
    about = {"objects": objects, "vendor": slide.vendor, "mpp": mpp, "bounds": slide.bounds, "levels": levels}
    about["forms"] = [asdict(form) | {"prefix": base64.b64encode(form.prefix).decode()} for form in forms]
    header = json.dumps(about).encode()
    return b"".join([_MAGIC, len(header).to_bytes(8, "little"), header, *tables])


def unpack(content: bytes) -> BlockIndex:
    """An index from its content, which stays in memory."""
    return read_index(_InMemory(content))


def read_index(index: IndexBytes, count: Counters = UNCOUNTED) -> BlockIndex:
    """An index from its header; its tables stay where they are.

    Raises:
        CatalogError: it is missing or damaged.
        StorageError: it lies remote and can't be fetched.
    """
    start = index.read(0, _MIN_HEAD, count)
    if start[: len(_MAGIC)] != _MAGIC:
        raise CatalogError(f"{index.name}: not a block index of this version; build the catalog anew")
    end = _BODY + int.from_bytes(start[len(_MAGIC) : _BODY], "little")
    if end > len(start):
        start += index.read(len(start), end - len(start), count)
    try:
        header = json.loads(start[_BODY:end])
    except ValueError as error:
        raise CatalogError(f"{index.name}: the block index is cut off; build the catalog anew") from error
    forms = [_form(**entry) for entry in header["forms"]]
    levels = tuple(_level(entry, forms[entry["form"]], end, index) for entry in header["levels"])
    objects = tuple(SlideObject(*entry) for entry in header["objects"])
    bounds = tuple(header["bounds"]) if header["bounds"] else None
    return BlockIndex(objects, header["vendor"], header["mpp"], bounds, levels)


@lru_cache(maxsize=1024)
def _form(prefix: str, **rest: Any) -> BlockFormat:
    """One for all levels and slides of a kind: thousands are open at once, each with half a kilobyte of tables."""
    return BlockFormat(prefix=base64.b64decode(prefix), **rest)


def _level(entry: dict[str, Any], form: BlockFormat, tables_at: int, index: IndexBytes) -> IndexedLevel:
    return IndexedLevel(
        width=entry["size"][0],
        height=entry["size"][1],
        form=form,
        index=index,
        at=tables_at + entry["at"],
        length_bytes=entry["bytes"][0],
        gap_bytes=entry["bytes"][1],
    )


def _table(level: BlockLevel) -> tuple[bytes, int, int]:
    missing = -len(level.nbytes) % _RECORD
    nbytes = np.pad(level.nbytes, (0, missing)).reshape(-1, _RECORD)
    # An empty block lies nowhere: where the one before ends costs no gap.
    offsets = np.pad(level.offsets, (0, missing)).reshape(-1, _RECORD).copy()
    used = nbytes > 0
    last_used = np.maximum.accumulate(np.where(used, np.arange(_RECORD), -1), axis=1)
    ends = np.take_along_axis(offsets + nbytes, np.maximum(last_used, 0), axis=1)
    first = np.take_along_axis(offsets, used.argmax(axis=1)[:, None], axis=1)
    offsets = np.where(used, offsets, np.where(last_used < 0, first, ends))
    gaps = np.diff(offsets, axis=1, prepend=offsets[:, :1])
    gaps[:, 1:] -= nbytes[:, :-1]
    zigzag = (gaps << 1) ^ (gaps >> 63)
    length_bytes, gap_bytes = _width(nbytes), _width(zigzag)
    parts = [offsets[:, :1].astype("<i8").view(np.uint8), _pack(nbytes, length_bytes), _pack(zigzag, gap_bytes)]
    return np.concatenate(parts, axis=1).tobytes(), length_bytes, gap_bytes


def _width(values: Ints) -> int:
    """Bytes that the largest of some values from 0 on needs."""
    return (int(values.max(initial=0)).bit_length() + 7) // 8


def _pack(values: Ints, width: int) -> NDArray[np.uint8]:
    return values.astype("<i8")[..., None].view(np.uint8)[..., :width].reshape(len(values), -1)


def _number(raw: bytes, at: int, width: int) -> int:
    return int.from_bytes(raw[at : at + width], "little")


def _sum(raw: bytes, at: int, width: int, count: int) -> int:
    """The sum of `count` numbers of `width` bytes: of all lowest bytes, then of all second ones, and so on.

    That is faster than to make the numbers one by one.
    """
    return sum(sum(raw[at + place : at + count * width : width]) << 8 * place for place in range(width))


def _gap(raw: bytes, at: int, width: int) -> int:
    """A signed number by its zigzag (0, -1, 1, -2, … are 0, 1, 2, 3, …)."""
    zigzag = _number(raw, at, width)
    return (zigzag >> 1) ^ -(zigzag & 1)
