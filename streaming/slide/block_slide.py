"""Slides as grids of compressed blocks: only the blocks that a region touches are fetched and decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide import geometry, resample
from streaming.slide.block_index import BlockIndex, IndexedLevel
from streaming.slide.codecs import decode
from streaming.slide.geometry import LevelBox
from streaming.slide.resample import Pixels
from streaming.slide.slide import Slide
from streaming.slide.tiff_vendors import PAINTS_EMPTY_BLOCKS
from streaming.storage.ranges import PendingBytes, Ranges, Span

if TYPE_CHECKING:
    from streaming.storage.sparse_copy import SparseCopy

# Blocks that lie apart by no more bytes than this are fetched by one request: such gaps are alignment, not a block.
_MAX_GAP = 64


class _Run(NamedTuple):
    """Blocks of a row of the grid that are neighbours in the file too: one request, [start, end), fetches them."""

    plane: int
    row: int
    start: int
    end: int
    blocks: list[tuple[int, int, int]]
    """column, offset and length of each"""


class _Unpainted(NamedTuple):
    """What an empty block shows of a box, [x0, x1) × [y0, y1) in the level's pixels, and how to ask for its content."""

    x0: int
    y0: int
    x1: int
    y1: int
    begin: Callable[[], PendingBox]


@dataclass(frozen=True, slots=True)
class PendingBox:
    """A rectangle of a level whose blocks were asked for; what `streaming.slide.PendingTile` describes."""

    ranges: Ranges
    """of the slide's objects"""
    level: IndexedLevel
    box: LevelBox
    """may reach past the slide's edges"""
    edges: tuple[int, int, int, int]
    """left, top, right and bottom of the part of the box that lies on the slide, in the level's pixels"""
    scale: int
    """by how much its blocks are decoded smaller"""
    runs: list[_Run]
    coming: PendingBytes | None
    """the bytes of the runs; None where the box lies outside the slide"""
    is_covered: bool
    """whether blocks cover all of the box"""
    background: int
    """the grey level where they do not"""
    count: Counters
    unpainted: list[_Unpainted]
    """empty blocks that are painted from the next finer level"""

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls, from any thread, as soon as the bytes are there; what empty blocks are painted from comes later.

        It is asked for one block after another, so that a large region does not hold the bytes of finer levels, too.
        """
        if self.coming is None:
            call()
        else:
            self.coming.when_ready(call)

    def fill(self, out: Pixels) -> None:
        """Waits for the bytes and decodes them into uint8 (h, w, 3), to which the box is resampled if need be.

        Raises:
            SlideError: a block can't be read; names it.
            StorageError: the storage can't be reached.
        """
        height, width = self.box.height // self.scale, self.box.width // self.scale
        if out.shape[:2] == (height, width):
            decode_box(self, out)
            return
        pixels = resample.scratch("box", height, width)
        decode_box(self, pixels)
        started = perf_counter()
        resample.resize(pixels, out)
        self.count.resample_s += perf_counter() - started


class BlockSlide(Slide):
    """A slide read block by block; what `streaming.slide.Slide` describes.

    The pixels equal OpenSlide's wherever a position is a whole pixel of its level (elsewhere OpenSlide blends
    neighbouring pixels, and this takes the nearest).
    """

    backend = "blocks"

    def __init__(
        self,
        uri: str,
        ranges: Ranges,
        index: BlockIndex,
        mpp: float | None = None,
        packed_index: bytes | None = None,
        left_out: str = "",
    ) -> None:
        self.uri, self.vendor, self.packed_index, self.left_out = uri, index.vendor, packed_index, left_out
        self.mpp = index.mpp or mpp
        self._ranges, self._levels = ranges, index.levels
        self._paints = index.vendor in PAINTS_EMPTY_BLOCKS
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(
            (level.width, level.height) for level in index.levels
        )
        self.level_downsamples = geometry.downsamples(self.level_dimensions)
        self.bounds = index.bounds or (0, 0, *self.level_dimensions[0])

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name."""
        return [level.form.codec for level in self._levels]

    def level_blocks(self) -> list[tuple[int, int] | None]:
        """Width and height of each level's blocks in its pixels."""
        return [(level.form.width, level.form.height) for level in self._levels]

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int], reduction: int = 1) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels; black outside the slide, as OpenSlide.

        Raises:
            SlideError: no such level, or a block that can't be read; names it.
            StorageError: the storage can't be reached.
        """
        geometry.check_region(self.uri, len(self._levels), level, size)
        downsample = self.level_downsamples[level]
        box = LevelBox(level, round(location[0] / downsample), round(location[1] / downsample), *size)
        pixels = np.empty((size[1] // reduction, size[0] // reduction, 3), dtype=np.uint8)
        is_whole = all(side % reduction == 0 for side in (box.x, box.y, *size))
        form = self._levels[level].form
        scale = next(s for s in form.scales_for(reduction) if s <= reduction) if is_whole else 1
        self._begin(box, scale, UNCOUNTED, background=0).fill(pixels)
        return pixels

    def begin_tile(
        self,
        x: int,
        y: int,
        mpp: float,
        size: int,
        *,
        exact: bool = False,
        tolerance: float = geometry.MPP_TOLERANCE,
        count: Counters = UNCOUNTED,
    ) -> PendingBox:
        """Asks for a tile's bytes; what lies outside the slide or in an empty block is white, as glass is.

        Raises:
            SlideError: it is no tile.
            StorageError, CatalogError: the block index can't be read.
        """
        box = self.tile_box(x, y, mpp, size, exact=exact, tolerance=tolerance)
        level = self._levels[box.level]
        inside = min(box.x, box.y) >= 0 and box.x + box.width <= level.width and box.y + box.height <= level.height
        scale = geometry.decode_scale(box, size, level.form.scales_for(box.width / size)) if inside and not exact else 1
        return self._begin(box, scale, count)

    def copied(self, x: int, y: int, mpp: float, size: int, tolerance: float) -> tuple[SparseCopy, list[Span]] | None:
        """What `begin_tile` reads of the block index, where that is a copy that is fetched part by part."""
        if self._levels[0].index.copied(()) is None:
            return None
        try:
            box = self.tile_box(x, y, mpp, size, exact=False, tolerance=tolerance)
        except SlideError:
            return None  # `begin_tile` tells it
        level = self._levels[box.level]
        return level.index.copied([level.span(first, last) for *_, first, last in _rows(level, _edges(level, box))])

    def _begin(self, box: LevelBox, scale: int, count: Counters, background: int = 255) -> PendingBox:
        """Asks for the blocks of a rectangle."""
        level = self._levels[box.level]
        edges = left, top, right, bottom = _edges(level, box)
        if left >= right or top >= bottom:
            return PendingBox(self._ranges, level, box, edges, scale, [], None, False, background, count, [])
        is_covered = (left, top, right - left, bottom - top) == (box.x, box.y, box.width, box.height)
        first_column = left // level.form.width
        runs: list[_Run] = []
        unpainted: list[_Unpainted] = []
        for plane, row, first, last in _rows(level, edges):
            offsets, nbytes = level.places(first, last, count)
            is_covered = is_covered and all(nbytes)
            runs += _runs(plane, row, first_column, offsets, nbytes)
            if self._paints and box.level:
                empty = [column for column, size in enumerate(nbytes, first_column) if not size]
                unpainted += [self._unpainted(box.level, edges, row, at, background, count) for at in empty]
        coming = self._ranges.begin([(run.start, run.end) for run in runs], count)
        scale = 1 if unpainted else scale  # what is painted is averaged, as OpenSlide does
        return PendingBox(
            self._ranges, level, box, edges, scale, runs, coming, is_covered, background, count, unpainted
        )

    def _unpainted(
        self, number: int, edges: tuple[int, int, int, int], row: int, column: int, background: int, count: Counters
    ) -> _Unpainted:
        """An empty block of a level, as far as it lies within some edges."""
        form, finer = self._levels[number].form, self._levels[number - 1]
        ratio = self.level_downsamples[number] / self.level_downsamples[number - 1]
        left, top, right, bottom = edges
        x0, x1 = max(left, column * form.width), min(right, (column + 1) * form.width)
        y0, y1 = max(top, row * form.height), min(bottom, (row + 1) * form.height)
        x, y = (min(round(at * ratio), length - 1) for at, length in ((x0, finer.width), (y0, finer.height)))
        width = min(max(1, round((x1 - x0) * ratio)), finer.width - x)
        height = min(max(1, round((y1 - y0) * ratio)), finer.height - y)
        box = LevelBox(number - 1, x, y, width, height)
        return _Unpainted(x0, y0, x1, y1, partial(self._begin, box, 1, count, background))

    def close(self) -> None:
        """Holds nothing open."""


def _edges(level: IndexedLevel, box: LevelBox) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what of a box lies on the level."""
    right, bottom = min(box.x + box.width, level.width), min(box.y + box.height, level.height)
    return max(box.x, 0), max(box.y, 0), right, bottom


def _rows(level: IndexedLevel, edges: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Plane and row of the grid, and the first and last block in it, of each row of blocks within some edges."""
    left, top, right, bottom = edges
    if left >= right or top >= bottom:
        return
    first, last = left // level.form.width, (right - 1) // level.form.width
    for plane in range(level.form.planes):
        for row in range(top // level.form.height, (bottom - 1) // level.form.height + 1):
            at = plane * level.blocks_of_plane + row * level.columns
            yield plane, row, at + first, at + last


def decode_box(pending: PendingBox, out: Pixels) -> None:
    """Waits for the blocks of a box and decodes them into uint8 (h / scale, w / scale, 3).

    Raises:
        SlideError, StorageError: as `PendingBox.fill`.
    """
    if not pending.is_covered:
        out.fill(pending.background)
    if pending.coming is None:
        return
    for part in pending.unpainted:
        finer = part.begin()
        pixels = np.empty((finer.box.height, finer.box.width, 3), np.uint8)
        decode_box(finer, pixels)
        at = np.s_[part.y0 - pending.box.y : part.y1 - pending.box.y, part.x0 - pending.box.x : part.x1 - pending.box.x]
        resample.resize(pixels, out[at])
    level, box, scale, count = pending.level, pending.box, pending.scale, pending.count
    wide, high = level.form.width, level.form.height
    left, top, right, bottom = pending.edges
    at = perf_counter()
    contents = pending.coming.wait()
    before, at = at, perf_counter()
    count.fetch_s += at - before
    for run, content in zip(pending.runs, contents, strict=True):
        y0, y1 = max(top, run.row * high), min(bottom, run.row * high + high)
        for column, offset, nbytes in run.blocks:
            x0, x1 = max(left, column * wide), min(right, column * wide + wide)
            try:
                compressed = content[offset - run.start : offset - run.start + nbytes]
                across, down = column * wide, run.row * high
                block = decode(compressed, level.form, scale, (x0 - across, y0 - down, x1 - across, y1 - down))
            except (ValueError, RuntimeError, MemoryError) as error:
                reason, (uri, at_byte) = " ".join(str(error).split()), pending.ranges.locate(offset)
                number = run.plane * level.blocks_of_plane + run.row * level.columns + column
                raise SlideError(
                    f"{uri}: level {box.level}, block {number} at byte {at_byte:,}: {reason}; "
                    "compare the slide with its source"
                ) from error
            before, at = at, perf_counter()
            count.decode_s += at - before
            rows, columns = _scaled(y0, y1, box.y, scale), _scaled(x0, x1, box.x, scale)
            shown = block[_scaled(y0, y1, run.row * high, scale), _scaled(x0, x1, column * wide, scale)]
            if level.form.planes == 1:
                out[rows, columns] = shown
            else:
                out[rows, columns, run.plane] = shown[..., 0]
            before, at = at, perf_counter()
            count.assemble_s += at - before
        count.blocks += len(run.blocks)
    if scale > 1 and level.form.is_jpeg2000:
        resample.centre(out, scale)
        count.assemble_s += perf_counter() - at


def _scaled(start: int, stop: int, origin: int, scale: int) -> slice:
    """A span of level pixels, counted from an origin and in pixels reduced by scale."""
    return slice((start - origin) // scale, -((origin - stop) // scale))


def _runs(plane: int, row: int, first: int, offsets: list[int], nbytes: list[int]) -> list[_Run]:
    """The blocks of a row from column `first` on as few runs; empty blocks are in none."""
    runs: list[_Run] = []
    for column, (offset, size) in enumerate(zip(offsets, nbytes, strict=True), start=first):
        if not size:
            continue
        if runs and 0 <= offset - runs[-1].end <= _MAX_GAP:
            last = runs[-1]
            runs[-1] = _Run(plane, row, last.start, offset + size, [*last.blocks, (column, offset, size)])
        else:
            runs.append(_Run(plane, row, offset, offset + size, [(column, offset, size)]))
    return runs
