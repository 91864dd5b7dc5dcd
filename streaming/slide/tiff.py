"""What the tags of a tiled TIFF say: which pages are levels, where their blocks lie, how they are compressed.

Levels, downsamples and mpp are told as OpenSlide tells them; label, macro and thumbnail are never read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import tifffile

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError, StorageError
from streaming.slide.block_level import BlockedSlide, BlockLevel, SlideObject, first_header
from streaming.slide.empty_blocks import are_cheap, blocks_for_one, with_those_above
from streaming.slide.geometry import Rectangle
from streaming.slide.slide import CONVERT
from streaming.slide.tiff_blocks import blocks_of, check_block_size
from streaming.slide.tiff_vendors import PAINTS_EMPTY_BLOCKS, TELLS_BOUNDS, pyramid_of
from streaming.storage.range_file import RangeFile
from streaming.storage.ranges import Ranges, read_range

_OLD_JPEG = 6
_MAX_PAGES = 1000  # the largest Z-stacks have some hundred

# What tifffile raises over tags that are cut off, or of another type than they must be.
_CONTRADICTIONS = (
    *(tifffile.TiffFileError, struct.error, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError),
)


def read_tiff(uri: str, ranges: Ranges, start: bytes, count: Counters = UNCOUNTED) -> BlockedSlide | None:
    """The blocks of a tiled TIFF; None where it is another format, or one of whose blocks only OpenSlide makes sense.

    start: what the file begins with, four bytes at least.

    Raises:
        SlideError: its tags contradict each other or the file's size.
        StorageError: it can't be read.
    """
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        with tifffile.TiffFile(RangeFile(ranges, count), name=uri) as tiff:  # type: ignore[arg-type]
            return _slide(uri, tiff, ranges, count)
    except (SlideError, StorageError):
        raise
    except _CONTRADICTIONS as error:
        text = " ".join(str(error).split())
        raise SlideError(f"{uri}: its TIFF tags make no sense ({text}); compare it with its source") from error


def _slide(uri: str, tiff: tifffile.TiffFile, ranges: Ranges, count: Counters) -> BlockedSlide | None:
    if not tiff.pages.first.is_tiled:
        if tiff.is_ndpi or any(page.is_tiled for page in _pages(uri, tiff)):
            return None
        raise SlideError(f"{uri}: a stripped TIFF, of which a tile takes whole rows; convert it with `{CONVERT}`")
    pyramid = pyramid_of(_pages(uri, tiff))
    if pyramid is not None and pyramid.vendor in PAINTS_EMPTY_BLOCKS:
        _check_empty_blocks(uri, pyramid.pages)
    if pyramid is None or any(b[0] >= a[0] for a, b in pairwise(pyramid.sizes)):
        return None
    levels: list[BlockLevel] = []
    for number, (page, size) in enumerate(zip(pyramid.pages, pyramid.sizes, strict=True)):
        level = blocks_of(uri, number, page, size, ranges.size)
        if level is not None and page.compression == _OLD_JPEG:
            _check_old_jpeg(uri, number, level, ranges, count)
        level = level and _looked_into(level, ranges, count)
        if level is None:
            return None
        levels.append(level)
    if pyramid.vendor in PAINTS_EMPTY_BLOCKS:
        levels = with_those_above(levels)
        if not are_cheap(levels):
            return None
    whole = SlideObject(storage.name_of(uri), ranges.size, ranges.tag)
    bounds = _scanned(levels[0]) if pyramid.vendor in TELLS_BOUNDS else None
    return BlockedSlide(pyramid.vendor, pyramid.mpp, tuple(levels), (whole,), bounds=bounds)


def _scanned(level: BlockLevel) -> Rectangle | None:
    """What the blocks of level 0 that are not empty cover; None: all, or nothing."""
    blocks = level.nbytes.reshape(level.form.planes, *level.grid)[0] > 0
    rows, columns = (np.flatnonzero(blocks.any(axis=axis)) for axis in (1, 0))
    if blocks.all() or not len(rows):
        return None
    left, right = columns[0] * level.form.width, min((columns[-1] + 1) * level.form.width, level.width)
    top, bottom = rows[0] * level.form.height, min((rows[-1] + 1) * level.form.height, level.height)
    return int(left), int(top), int(right - left), int(bottom - top)


def _check_old_jpeg(uri: str, number: int, level: BlockLevel, ranges: Ranges, count: Counters) -> None:
    """Refuses blocks that are no JPEG of their own.

    In TIFF 6.0 their tables stood in tags, which nothing but libtiff puts together; others wrote whole JPEGs.
    """
    used = level.offsets[level.nbytes >= 2][:1].tolist()
    if any(read_range(ranges, at, at + 2, count) != b"\xff\xd8" for at in used):
        raise SlideError(
            f"{uri}: level {number}: old-style JPEG (compression 6), whose blocks are no whole JPEGs; convert it with "
            f"`{CONVERT}`"
        )


def _check_empty_blocks(uri: str, levels: Sequence[tifffile.TiffPage]) -> None:
    """Refuses what makes OpenSlide 4.0.1 divide by 0, which ends the process."""
    grids = [(-(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)) for page in levels]
    has_empty = False
    for number, (grid, next_grid) in enumerate(pairwise(grids)):
        nbytes = levels[number].databytecounts
        has_empty = has_empty or len(nbytes) < grid[0] * grid[1] or not all(nbytes)
        if has_empty and not (min(*grid, *next_grid) and all(blocks_for_one(grid, next_grid))):
            raise SlideError(
                f"{uri}: level {number} has empty blocks, and is of {grid[1]} × {grid[0]} blocks where level "
                f"{number + 1} is of {next_grid[1]} × {next_grid[0]}; compare it with its source"
            )


def _looked_into(level: BlockLevel, ranges: Ranges, count: Counters) -> BlockLevel | None:
    """A level with what only its blocks tell, None where they are not decoded here."""
    if not level.form.is_jpeg2000:
        return level
    header = first_header(level, lambda start, end: read_range(ranges, start, end, count))
    if header is None:
        return level
    if not header.is_decoded(ycbcr=level.form.codec == "JP2K_YCBCR", samples=level.form.samples):
        return None
    return replace(level, form=replace(level.form, halvings=header.halvings))


def _pages(uri: str, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    pages: dict[int, tifffile.TiffPage] = {}
    for page in tiff.pages:
        if page.offset in pages or len(pages) == _MAX_PAGES:
            raise SlideError(
                f"{uri}: its directories of tags form a loop, or are more than {_MAX_PAGES}; compare it with its source"
            )
        assert isinstance(page, tifffile.TiffPage), "frames are only made where they are asked for"
        check_block_size(uri, page)
        pages[page.offset] = page
    return list(pages.values())
