"""Slides as grids of compressed blocks: only the blocks that a region touches are fetched and decoded."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from streaming import counters
from streaming.errors import SlideError
from streaming.slide import geometry, resample
from streaming.slide.block_index import BlockIndex
from streaming.slide.codecs import decode
from streaming.slide.geometry import LevelBox
from streaming.slide.resample import Pixels
from streaming.storage.ranges import Ranges, Span

# Neighbours in the file are fetched at once over a gap of this many bytes: word alignment, not another block.
_MAX_GAP = 64

_Place = tuple[int, int, int]  # column of a block, its offset and length


class BlockSlide:
    """A slide read block by block; what `streaming.slide.Slide` describes.

    The pixels equal OpenSlide's wherever a position is a whole pixel of its level (elsewhere OpenSlide blends
    neighbouring pixels, and this takes the nearest).
    """

    backend = "blocks"

    def __init__(
        self, uri: str, ranges: Ranges, index: BlockIndex, mpp: float | None = None, packed_index: bytes | None = None
    ) -> None:
        self.uri, self.vendor, self.packed_index = uri, index.vendor, packed_index
        self.mpp = index.mpp or mpp
        self._ranges, self._levels = ranges, index.levels
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(
            (level.width, level.height) for level in index.levels
        )
        self.level_downsamples = geometry.downsamples(self.level_dimensions)

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name."""
        return [level.form.codec for level in self._levels]

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels; black outside the slide, as OpenSlide.

        Raises:
            SlideError: no such level, or a block that can't be read; names it.
            StorageError: the storage can't be reached.
        """
        geometry.check_region(self.uri, len(self._levels), level, size)
        downsample = self.level_downsamples[level]
        box = LevelBox(level, round(location[0] / downsample), round(location[1] / downsample), *size)
        pixels = np.empty((size[1], size[0], 3), dtype=np.uint8)
        self._begin_box(box)(pixels)
        return pixels

    def begin_tile(self, x: int, y: int, mpp: float, size: int, *, exact: bool = False) -> Callable[[Pixels], None]:
        """Asks for a tile's bytes; calling the answer waits for them and fills uint8 (size, size, 3).

        Raises (both):
            SlideError, StorageError: as `read_region`.
        """
        box = geometry.checked_tile_box(self.mpp, self.level_downsamples, x, y, mpp, size)
        level = self._levels[box.level]
        inside = min(box.x, box.y) >= 0 and box.x + box.width <= level.width and box.y + box.height <= level.height
        scale = geometry.decode_scale(box, size, level.form.scales) if inside and not exact else 1
        fill = self._begin_box(box, scale)

        def finish(out: Pixels) -> None:
            if (box.width, box.height) == (size * scale, size * scale):
                fill(out)
                return
            pixels = resample.scratch("box", box.height // scale, box.width // scale)
            fill(pixels)
            started = perf_counter()
            resample.resize(pixels, out)
            counters.mine().resample_s += perf_counter() - started

        return finish

    def read_tile(self, x: int, y: int, mpp: float, size: int, *, exact: bool = False) -> Pixels:
        """A tile of uint8 (size, size, 3); x, y the level-0 pixel of its top-left corner, mpp its µm/px.

        JPEG is decoded at 1/2, 1/4 or 1/8 where that fits; `exact` decodes in full.
        """
        tile = np.empty((size, size, 3), dtype=np.uint8)
        self.begin_tile(x, y, mpp, size, exact=exact)(tile)
        return tile

    def _begin_box(self, box: LevelBox, scale: int = 1) -> Callable[[Pixels], None]:
        """Asks for the blocks of a rectangle; the answer fills uint8 (h / scale, w / scale, 3)."""
        level = self._levels[box.level]
        wide, high = level.form.width, level.form.height
        left, top = max(box.x, 0), max(box.y, 0)
        right, bottom = min(box.x + box.width, level.width), min(box.y + box.height, level.height)
        if left >= right or top >= bottom:
            return lambda out: out.fill(0)
        whole = (left, top, right - left, bottom - top) == (box.x, box.y, box.width, box.height)
        first, last = left // wide, (right - 1) // wide
        spans: list[Span] = []
        wanted: list[tuple[int, list[_Place]]] = []
        for row in range(top // high, (bottom - 1) // high + 1):
            offsets, nbytes = level.places(row * level.columns + first, row * level.columns + last)
            whole = whole and all(nbytes)
            for start, end, blocks in _merged(offsets, nbytes, first):
                spans.append((start, end))
                wanted.append((row, blocks))
        begun = self._ranges.begin(spans)

        def fill(out: Pixels) -> None:
            if not whole:
                out.fill(0)  # black past the slide and where a block is empty, as OpenSlide
            count, at = counters.mine(), perf_counter()
            contents = begun()
            before, at = at, perf_counter()
            count.fetch_s += at - before
            for (row, blocks), (start, _), content in zip(wanted, spans, contents, strict=True):
                y0, y1 = max(top, row * high), min(bottom, row * high + high)
                for column, offset, nbytes in blocks:
                    x0, x1 = max(left, column * wide), min(right, column * wide + wide)
                    try:
                        compressed = content[offset - start : offset - start + nbytes]
                        block = decode(compressed, level.form, scale, y1 - row * high)
                    except (ValueError, RuntimeError, MemoryError) as error:
                        raise self._broken(box.level, row * level.columns + column, error) from error
                    before, at = at, perf_counter()
                    count.decode_s += at - before
                    rows, columns = _scaled(y0, y1, box.y, scale), _scaled(x0, x1, box.x, scale)
                    out[rows, columns] = block[
                        _scaled(y0, y1, row * high, scale), _scaled(x0, x1, column * wide, scale)
                    ]
                    before, at = at, perf_counter()
                    count.assemble_s += at - before
                count.blocks += len(blocks)

        return fill

    def _broken(self, level: int, block: int, error: Exception) -> SlideError:
        reason = " ".join(str(error).split())
        return SlideError(f"{self.uri}: level {level}, block {block}: {reason}; compare the slide with its source")

    def close(self) -> None:
        """Holds nothing open."""


def _scaled(start: int, stop: int, origin: int, scale: int) -> slice:
    """A span of level pixels, counted from an origin and in pixels reduced by scale."""
    return slice((start - origin) // scale, -((origin - stop) // scale))


def _merged(offsets: list[int], nbytes: list[int], first: int) -> list[tuple[int, int, list[_Place]]]:
    """Spans [start, end) to fetch, each with its blocks (column, offset, length); empty blocks are in none."""
    spans: list[tuple[int, int, list[_Place]]] = []
    for column, (offset, size) in enumerate(zip(offsets, nbytes, strict=True), start=first):
        if not size:
            continue
        if spans and 0 <= offset - spans[-1][1] <= _MAX_GAP:
            start, _, blocks = spans[-1]
            spans[-1] = (start, offset + size, [*blocks, (column, offset, size)])
        else:
            spans.append((offset, offset + size, [(column, offset, size)]))
    return spans
