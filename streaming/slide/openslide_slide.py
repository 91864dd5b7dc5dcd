"""Slides through OpenSlide, on a local file: the file itself, or a copy of the object staged on local disk."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import openslide

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError, StorageError
from streaming.slide import geometry, resample
from streaming.slide.geometry import LevelBox, Rectangle
from streaming.slide.multi_file import as_one
from streaming.slide.resample import Pixels
from streaming.slide.resolution import number, plausible_mpp, why_no_mpp
from streaming.slide.slide import CONVERT, Slide
from streaming.storage.staging import TRIES, Staging

T = TypeVar("T")

# Decoded blocks that all slides of a process share; OpenSlide's own default is 32 MiB for each of them. Random tiles
# hit nothing that is kept; tiles in order, as embedding reads them, share the blocks between two rows of tiles: those
# of 512 px, at 4 bytes a pixel, fill this on a slide of 32,768 px.
_CACHE = openslide.OpenSlideCache(64 * 2**20)


_BOUNDS = (
    openslide.PROPERTY_NAME_BOUNDS_X,
    openslide.PROPERTY_NAME_BOUNDS_Y,
    openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
)


@dataclass(frozen=True)
class _Opened:
    """An OpenSlide handle; OpenSlide opens files anew while it reads, so it breaks when a staged copy is evicted."""

    handle: openslide.OpenSlide
    entry: str = ""
    """The copy's folder; none where the slide is local"""
    mark: tuple[int, int] = (0, 0)

    def is_gone(self) -> bool:
        """Whether the copy that was opened is not there any more; another one may be in its place."""
        return bool(self.entry) and _mark(self.entry) != self.mark


def _mark(entry: str) -> tuple[int, int] | None:
    """What tells a folder of the cache from a later one of the same name."""
    try:
        stat = os.stat(entry)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _open(uri: str, path: str) -> openslide.OpenSlide:
    try:
        if openslide.OpenSlide.detect_format(path) is None:
            raise SlideError(
                f"{uri}: not a slide that OpenSlide knows; is it an image of another kind? A TIFF is converted with "
                f"`{CONVERT}`"
            )
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"{uri}: OpenSlide can't open it: {error}; compare it with its source, or convert it with `{CONVERT}`"
        ) from error
    handle.set_cache(_CACHE)
    return handle


def _open_copy(uri: str, path: str) -> _Opened:
    """Opens a staged copy.

    Raises:
        FileNotFoundError: it was evicted meanwhile.
        SlideError: it is no slide, or is broken.
    """
    entry = os.path.dirname(path)
    mark = _mark(entry)
    if mark is None:
        raise FileNotFoundError(path)
    try:
        return _Opened(_open(uri, path), entry, mark)
    except SlideError:
        if _mark(entry) != mark:
            raise FileNotFoundError(path) from None
        raise


class OpenSlideSlide(Slide):
    """A slide read by OpenSlide; what `streaming.slide.Slide` describes."""

    backend = "openslide"
    packed_index: bytes | None = None
    left_out = ""

    def __init__(
        self,
        uri: str,
        opener: Callable[[Counters], _Opened],
        mpp: float | None = None,
        count: Counters = UNCOUNTED,
    ) -> None:
        self.uri = uri
        self._opener = opener
        self._opened = opener(count)
        handle = self._opened.handle
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.vendor = str(handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"))
        told = self._told_mpp()
        self.mpp, self.no_mpp = plausible_mpp(uri, told) or mpp, why_no_mpp(told)
        self.bounds = self._metadata_bounds()
        # As "FFFFFF"; few formats tell it.
        colour = str(handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF"))
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8)

    def _told_mpp(self) -> tuple[float, ...]:
        properties = self._opened.handle.properties
        names = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
        values = [number(properties.get(name, "")) for name in names]
        return tuple(value for value in values if value is not None)

    def _metadata_bounds(self) -> Rectangle:
        properties, (width, height) = self._opened.handle.properties, self.level_dimensions[0]
        try:
            x, y, w, h = (int(properties[name]) for name in _BOUNDS)
        except (KeyError, ValueError):
            return 0, 0, width, height
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        return (left, top, right - left, bottom - top) if left < right and top < bottom else (0, 0, width, height)

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        return [None] * len(self.level_dimensions)

    def level_blocks(self) -> list[tuple[int, int] | None]:
        """Width and height of each level's blocks, None where unknown."""
        return [None] * len(self.level_dimensions)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int], reduction: int = 1) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels; black outside the slide, as OpenSlide."""
        pixels = self._read(location, level, size, UNCOUNTED)[:, :, :3]
        if reduction == 1:
            return pixels
        reduced = np.empty((size[1] // reduction, size[0] // reduction, 3), np.uint8)
        resample.resize(pixels, reduced)
        return reduced

    def _read(self, location: tuple[int, int], level: int, size: tuple[int, int], count: Counters) -> Pixels:
        """RGB and alpha, uint8 (h, w, 4)."""
        geometry.check_region(self.uri, len(self.level_dimensions), level, size)
        for _ in range(TRIES):
            opened = self._opened
            try:
                region = opened.handle.read_region(location, level, size)
            except (openslide.OpenSlideError, ctypes.ArgumentError, ValueError) as error:
                if not opened.is_gone():
                    raise SlideError(f"{self.uri}: level {level}, region {location} {size}: {error}") from error
                self._opened = self._opener(count)
            else:
                return np.asarray(region, dtype=np.uint8)
        raise StorageError(f"{self.uri}: its staged copy is evicted again and again; raise staging_gb")

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
    ) -> PendingRead:
        """Notes which box of which level the tile is; it is read when it is filled.

        Raises:
            SlideError: it is no tile.
        """
        box = self.tile_box(x, y, mpp, size, exact=exact, tolerance=tolerance)
        return PendingRead(self, box, count)

    def read_box(self, box: LevelBox, out: Pixels, count: Counters) -> None:
        """A rectangle of a level, resampled to uint8 (h, w, 3); the slide's background where it was not scanned.

        Raises:
            SlideError, StorageError: it can't be read.
        """
        downsample, started = self.level_downsamples[box.level], time.perf_counter()
        location = (round(box.x * downsample), round(box.y * downsample))
        region = self._read(location, box.level, (box.width, box.height), count)
        pixels, missing = region[:, :, :3], region[:, :, 3] == 0
        if missing.any():
            pixels = np.where(missing[:, :, None], self._background, pixels)
        decoded = time.perf_counter()
        resample.resize(pixels, out)
        count.decode_s += decoded - started
        count.resample_s += time.perf_counter() - decoded

    def close(self) -> None:
        """Lets go of the file."""
        self._opened.handle.close()


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A rectangle of a level that is still to be read; what `streaming.slide.PendingTile` describes."""

    slide: OpenSlideSlide
    box: LevelBox
    count: Counters

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls at once: the file is local."""
        call()

    def fill(self, out: Pixels) -> None:
        """Reads it into uint8 (h, w, 3), resampled to that size.

        Raises:
            SlideError, StorageError: it can't be read.
        """
        self.slide.read_box(self.box, out, self.count)


def open_staged(
    files: Sequence[storage.ObjectInfo],
    options: storage.StorageOptions | None,
    mpp: float | None,
    staging: Staging,
    count: Counters = UNCOUNTED,
) -> OpenSlideSlide:
    """Opens a slide, of which `files` are all files and the first the main one, through OpenSlide.

    Where it is remote, on a staged copy, which is staged again whenever it was evicted.

    Raises:
        SlideError: it is no slide, or is broken, or has changed.
        StorageError: it can't be reached.
    """
    uri = files[0].uri
    if storage.is_local(uri):
        return OpenSlideSlide(uri, lambda _: _Opened(_open(uri, storage.local_path(uri))), mpp)

    def open_copy(count: Counters) -> _Opened:
        return staging.use(as_one(files), options, partial(_open_copy, uri), files, count)

    return OpenSlideSlide(uri, open_copy, mpp, count)
