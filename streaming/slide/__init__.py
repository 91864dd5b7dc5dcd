"""Opening slides: the one seam between formats and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.slide import block_index, geometry
from streaming.slide.block_index import BlockIndex
from streaming.slide.block_slide import BlockSlide
from streaming.slide.geometry import MPP_TOLERANCE
from streaming.slide.multi_file import MULTI_FILE_SUFFIXES, as_one, is_multi_file, members
from streaming.slide.openslide_slide import open_staged
from streaming.slide.resample import Pixels
from streaming.slide.tiff import read_tiff
from streaming.storage.ranges import open_ranges
from streaming.storage.staging import Staging

# What a folder is searched for; a file named outright is tried whatever its suffix.
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".czi"),
    *MULTI_FILE_SUFFIXES,
)


class PendingTile(Protocol):
    """A tile whose bytes were asked for."""

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls, from any thread, as soon as `fill` would wait for no answer of the storage; at once if it is so."""
        ...

    def fill(self, out: Pixels) -> None:
        """Waits for them and makes them the tile's pixels, uint8 (size, size, 3).

        Raises:
            SlideError: the slide is broken there, or has changed.
            StorageError: the storage can't be reached.
        """
        ...


class Slide(Protocol):
    """An open whole-slide image. Safe to read from several threads."""

    uri: str
    backend: str
    vendor: str
    mpp: float | None
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    packed_index: bytes | None
    """Its block index as a file's content, if it was opened by its tags; None where OpenSlide serves"""

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        ...

    def level_blocks(self) -> list[tuple[int, int] | None]:
        """Width and height of each level's blocks in its pixels, None where unknown."""
        ...

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels, size in the level's."""
        ...

    def begin_tile(
        self,
        x: int,
        y: int,
        mpp: float,
        size: int,
        *,
        exact: bool = False,
        tolerance: float = MPP_TOLERANCE,
        count: Counters = UNCOUNTED,
    ) -> PendingTile:
        """Asks for the bytes of a tile as `read_tile` describes it; what it takes is added to `count`."""
        ...

    def read_tile(
        self, x: int, y: int, mpp: float, size: int, *, exact: bool = False, tolerance: float = MPP_TOLERANCE
    ) -> Pixels:
        """A tile of uint8 (size, size, 3); x, y the level-0 pixel of its top-left corner, mpp its µm/px.

        Where a level, or its reduction by 2, 4 or 8, has that µm/px up to a share of `tolerance`, its own pixels are
        the tile, with their µm/px (`geometry.tile_source` tells it); 0 resamples to the very mpp. JPEG and JPEG 2000
        are decoded at 1/2, 1/4 or 1/8 where that fits. `exact` decodes in full and is of the very mpp. White outside
        the slide.
        """
        ...

    def close(self) -> None:
        """Lets go of the file."""
        ...


def open_slide(
    uri: str,
    storage_options: storage.StorageOptions | None = None,
    *,
    mpp: float | None = None,
    index: BlockIndex | None = None,
    expected: storage.ObjectInfo | None = None,
    staging: Staging | None = None,
    count: Counters = UNCOUNTED,
) -> Slide:
    """Opens a whole-slide image by file path, s3://, gs://, az:// or http(s)://.

    Tiled TIFFs (SVS, Philips, OME, generic) are read block by block where they lie; other formats go through OpenSlide,
    remote ones on a copy in `staging`. mpp (µm/px at level 0) serves where the metadata has none. With a block index
    the slide's tags are not read at all. With `expected`, a slide of another size or version is refused. What opening
    takes is added to `count`.

    Raises:
        SlideError: it is no slide, is broken, or is not the version that was expected.
        StorageError: it can't be reached.
    """
    if index is not None:
        ranges = open_ranges(uri, storage_options, index.tag)
        assert ranges is not None, "only slides whose ranges can be read have an index"
        return BlockSlide(uri, ranges, index, mpp)
    files = members(uri, storage_options)
    info = as_one(files)
    if expected is not None and (info.size, info.version) != (expected.size, expected.version):
        raise SlideError(f"{uri}: changed since it was catalogued; run `tilestream catalog` on it again")
    ranges = None if is_multi_file(uri) else open_ranges(uri, storage_options)
    tiff = read_tiff(uri, ranges, count) if ranges is not None else None
    if ranges is None or tiff is None:
        return open_staged(files, storage_options, mpp, staging or Staging(), count)
    packed = block_index.pack(tiff, ranges.tag, geometry.plausible_mpp(uri, tiff.mpp))
    return BlockSlide(uri, ranges, block_index.unpack(packed), mpp, packed)


__all__ = ["SLIDE_SUFFIXES", "PendingTile", "Slide", "Staging", "open_slide"]
