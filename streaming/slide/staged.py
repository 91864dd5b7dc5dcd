"""Slides through OpenSlide on a local file: the file itself, or a copy of the object staged on local disk.

The cache of copies is shared by all processes of a node: a copy appears under its name only when whole, and the least
recently used ones make room for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from filelock import FileLock

from streaming import counters, storage
from streaming.errors import SlideError, StorageError
from streaming.slide import geometry
from streaming.slide.geometry import Pixels

# Formats whose pixels lie in other files beside the one that is opened; one object alone is not the slide.
_MULTI_FILE_SUFFIXES = {".mrxs", ".vms", ".vmu", ".dcm"}


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where copies of remote slides lie, and how much disk they may take together."""

    folder: str = os.environ.get("TILESTREAM_STAGING", os.path.join(tempfile.gettempdir(), "tilestream-staging"))
    max_bytes: int = 100 * 2**30

    def fetch(self, info: storage.ObjectInfo, options: storage.StorageOptions | None) -> str:
        """The local path of an object's copy, downloaded unless it is there.

        Raises:
            StorageError: it can't be read, or is larger than the whole cache.
        """
        key = info.digest[:32]
        path = Path(self.folder, key, storage.name_of(info.uri))
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with FileLock(os.path.join(self.folder, f"{key}.lock")):
            if path.exists():
                counters.mine().staged_hits += 1
                os.utime(path)
            else:
                counters.mine().staged_misses += 1
                self._make_room(info)
                storage.download(info, str(path), options)
        return str(path)

    def _make_room(self, info: storage.ObjectInfo) -> None:
        if info.size > self.max_bytes:
            raise StorageError(
                f"{info.uri}: {info.size:,} bytes don't fit the staging cache of {self.max_bytes:,}; raise staging_gb"
            )
        with FileLock(os.path.join(self.folder, "evict.lock")):
            copies = sorted((c for c in Path(self.folder).glob("*/*") if c.is_file()), key=lambda c: c.stat().st_mtime)
            sizes = {copy: copy.stat().st_size for copy in copies}
            excess = sum(sizes.values()) + info.size - self.max_bytes
            for copy in copies:
                # A download under way is another process's; one that died leaves its part file to age.
                under_way = ".part-" in copy.name and time.time() - copy.stat().st_mtime < 3600
                if (excess <= 0 and ".part-" not in copy.name) or under_way:
                    continue
                # Whoever has the file open keeps reading it: only its name goes.
                shutil.rmtree(copy.parent, ignore_errors=True)
                excess -= sizes[copy]


class OpenSlideSlide:
    """A slide read by OpenSlide; what `streaming.slide.Slide` describes."""

    backend = "openslide"
    packed_index: bytes | None = None

    def __init__(self, uri: str, path: str, mpp: float | None = None) -> None:
        self.uri = uri
        self._path = path
        try:
            if openslide.OpenSlide.detect_format(path) is None:
                raise SlideError(f"{uri}: not a slide that OpenSlide knows; is it an image of another kind?")
            self._handle = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise SlideError(f"{uri}: OpenSlide can't open it: {error}; compare it with its source") from error
        self.level_dimensions: tuple[tuple[int, int], ...] = self._handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = self._handle.level_downsamples
        self.vendor = str(self._handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"))
        self.mpp = self._metadata_mpp() or mpp

    def _metadata_mpp(self) -> float | None:
        values: list[float] = []
        for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y):
            with contextlib.suppress(KeyError, ValueError):
                values.append(float(self._handle.properties[name]))
        return geometry.plausible_mpp(self.uri, values)

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        return [None] * len(self.level_dimensions)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels; black outside the slide, as OpenSlide."""
        geometry.check_region(self.uri, len(self.level_dimensions), level, size)
        try:
            region = self._handle.read_region(location, level, size)
        except (openslide.OpenSlideError, ctypes.ArgumentError, ValueError) as error:
            raise SlideError(f"{self.uri}: level {level}, region {location} {size}: {error}") from error
        return np.asarray(region, dtype=np.uint8)[:, :, :3]

    def begin_tile(self, x: int, y: int, mpp: float, size: int, *, exact: bool = False) -> Callable[[Pixels], None]:
        """A tile that is read when the answer is called; it fills uint8 (size, size, 3)."""
        del exact  # OpenSlide always is
        box = geometry.checked_tile_box(self.mpp, self.level_downsamples, x, y, mpp, size)
        downsample = self.level_downsamples[box.level]
        location = (round(box.x * downsample), round(box.y * downsample))

        def finish(out: Pixels) -> None:
            count, started = counters.mine(), time.perf_counter()
            pixels = self.read_region(location, box.level, (box.width, box.height))
            decoded = time.perf_counter()
            geometry.resize(pixels, out)
            count.decode_s += decoded - started
            count.resample_s += time.perf_counter() - decoded

        return finish

    def read_tile(self, x: int, y: int, mpp: float, size: int, *, exact: bool = False) -> Pixels:
        """A tile of uint8 (size, size, 3); x, y the level-0 pixel of its top-left corner, mpp its µm/px."""
        tile = np.empty((size, size, 3), dtype=np.uint8)
        self.begin_tile(x, y, mpp, size, exact=exact)(tile)
        return tile

    def close(self) -> None:
        """Lets go of the file."""
        self._handle.close()


def open_staged(
    info: storage.ObjectInfo, options: storage.StorageOptions | None, mpp: float | None, staging: Staging
) -> OpenSlideSlide:
    """Opens a slide through OpenSlide, on a staged copy where it is remote.

    Raises:
        SlideError: it is no slide, or is broken.
        StorageError: it can't be reached.
    """
    uri = info.uri
    if storage.is_local(uri):
        return OpenSlideSlide(uri, storage.local_path(uri), mpp)
    if Path(storage.name_of(uri)).suffix.lower() in _MULTI_FILE_SUFFIXES:
        raise SlideError(f"{uri}: this format spreads over several files; copy the slide's files to a local disk")
    for _ in range(3):
        path = staging.fetch(info, options)
        # Between fetch and open another process may have made room by removing just this copy.
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
            return OpenSlideSlide(uri, path, mpp)
    raise StorageError(f"{uri}: its staged copy is evicted again and again; raise staging_gb")
