"""Slides through OpenSlide on a local file: the file itself, or a copy of the object staged on local disk.

The cache of copies is shared by all processes of a node: a copy appears under its name only when whole, and the least
recently used ones make room for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import openslide
from filelock import FileLock

from streaming import counters, ranges, storage
from streaming.errors import NodeError, SlideError, StorageError
from streaming.slide import geometry
from streaming.slide.geometry import Pixels
from streaming.slide.members import as_one, relative_name

T = TypeVar("T")

# A copy that is evicted as often as this while it is being read has too small a cache.
_TRIES = 3
# So long after its last byte a download's process is taken for dead.
_DEAD_S = 3600


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where copies of remote slides lie, and how much disk they may take together."""

    folder: str = os.environ.get("TILESTREAM_STAGING", os.path.join(tempfile.gettempdir(), "tilestream-staging"))
    max_bytes: int = 100 * 2**30

    def fetch(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        files: Sequence[storage.ObjectInfo] = (),
    ) -> str:
        """The local path of an object's copy, downloaded unless it is there.

        `files` are those of a slide, the one to open first, and `info` is all of them as one object: they are staged
        and evicted together, whole or not at all, and only in the versions that `files` tells.

        Raises:
            StorageError: it can't be read, or is larger than the whole cache.
            SlideError: it, or one of `files`, has changed.
            NodeError: the disk has no room for it.
        """
        entry = Path(self.folder, info.digest[:32])
        path = entry / storage.name_of(info.uri)
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if path.exists():
                counters.mine().staged_hits += 1
                # Another process may evict it at any moment: whoever opens it finds out.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
            else:
                counters.mine().staged_misses += 1
                self._make_room(info)
                shutil.rmtree(entry, ignore_errors=True)
                try:
                    _download_all(entry, info, files, options)
                except StorageError as error:
                    cause = error.__cause__
                    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                        raise self._disk_full(info) from error
                    raise
        return str(path)

    def use(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        read: Callable[[str], T],
        files: Sequence[storage.ObjectInfo] = (),
    ) -> T:
        """What `read` makes of the copy's path; it raises FileNotFoundError where the copy was evicted meanwhile.

        Raises:
            StorageError, SlideError: as `fetch`; or the copy is evicted again and again.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return read(self.fetch(info, options, files))
        raise StorageError(f"{info.uri}: its staged copy is evicted again and again; raise staging_gb")

    def _make_room(self, info: storage.ObjectInfo) -> None:
        if info.size > self.max_bytes:
            raise StorageError(
                f"{info.uri}: {info.size:,} bytes don't fit the staging cache of {self.max_bytes:,}; raise staging_gb"
            )
        with FileLock(os.path.join(self.folder, "evict.lock")):
            entries = sorted(_entries(self.folder))
            # The disk may be smaller than the cache may become, or filled by others.
            over = info.size - shutil.disk_usage(self.folder).free
            excess = max(sum(nbytes for _, nbytes, _ in entries) + info.size - self.max_bytes, over)
            for used_at, nbytes, entry in entries:
                # A download under way is another process's; one that died leaves its folder to age.
                part = ".part-" in entry
                dead = ".gone-" in entry or (part and time.time() - used_at > _DEAD_S)
                if not dead and (part or excess <= 0):
                    continue
                # At once, so that nobody finds a part of it. Whoever has a file open keeps reading it.
                gone = f"{entry}.gone-{uuid.uuid4().hex[:8]}"
                os.rename(entry, gone)
                shutil.rmtree(gone, ignore_errors=True)
                excess -= nbytes
        if shutil.disk_usage(self.folder).free < info.size:
            raise self._disk_full(info)

    def _disk_full(self, info: storage.ObjectInfo) -> NodeError:
        free = shutil.disk_usage(self.folder).free
        return NodeError(
            f"{info.uri}: its copy of {info.size:,} bytes does not fit the disk of {self.folder} on "
            f"{platform.node()}, {free:,} bytes free; free some, or set data.staging or TILESTREAM_STAGING to another"
        )


def _entries(folder: str) -> Iterator[tuple[float, int, str]]:
    """When each copy (a folder with all its files) was last used, its bytes, and its path."""
    for entry in list(os.scandir(folder)):
        if not entry.is_dir():
            continue
        stats: list[os.stat_result] = []
        # A download that ends meanwhile has another name.
        with contextlib.suppress(FileNotFoundError):
            stats += [os.stat(os.path.join(at, name)) for at, _, names in os.walk(entry.path) for name in names]
        used_at = max((stat.st_mtime for stat in stats), default=time.time())
        yield used_at, sum(stat.st_size for stat in stats), entry.path


def _download_all(
    entry: Path,
    info: storage.ObjectInfo,
    files: Sequence[storage.ObjectInfo],
    options: storage.StorageOptions | None,
) -> None:
    part = Path(f"{entry}.part-{uuid.uuid4().hex[:8]}")
    try:
        for file in files or [info]:
            ranges.download(file, str(part / relative_name(file, info)), options)
        for file in files:
            if storage.stat(file.uri, options) != file:
                raise SlideError(f"{file.uri}: changed while it was copied; run `tilestream catalog` on it again")
        os.rename(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
            raise SlideError(f"{uri}: not a slide that OpenSlide knows; is it an image of another kind?")
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{uri}: OpenSlide can't open it: {error}; compare it with its source") from error


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


class OpenSlideSlide:
    """A slide read by OpenSlide; what `streaming.slide.Slide` describes."""

    backend = "openslide"
    packed_index: bytes | None = None

    def __init__(self, uri: str, opener: Callable[[], _Opened], mpp: float | None = None) -> None:
        self.uri = uri
        self._opener = opener
        self._opened = opener()
        handle = self._opened.handle
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.vendor = str(handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"))
        self.mpp = self._metadata_mpp() or mpp

    def _metadata_mpp(self) -> float | None:
        values: list[float] = []
        for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y):
            with contextlib.suppress(KeyError, ValueError):
                values.append(float(self._opened.handle.properties[name]))
        return geometry.plausible_mpp(self.uri, values)

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        return [None] * len(self.level_dimensions)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels; black outside the slide, as OpenSlide."""
        geometry.check_region(self.uri, len(self.level_dimensions), level, size)
        for _ in range(_TRIES):
            opened = self._opened
            try:
                region = opened.handle.read_region(location, level, size)
            except (openslide.OpenSlideError, ctypes.ArgumentError, ValueError) as error:
                if not opened.is_gone():
                    raise SlideError(f"{self.uri}: level {level}, region {location} {size}: {error}") from error
                self._opened = self._opener()
            else:
                return np.asarray(region, dtype=np.uint8)[:, :, :3]
        raise StorageError(f"{self.uri}: its staged copy is evicted again and again; raise staging_gb")

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
        self._opened.handle.close()


def open_staged(
    files: Sequence[storage.ObjectInfo],
    options: storage.StorageOptions | None,
    mpp: float | None,
    staging: Staging,
) -> OpenSlideSlide:
    """Opens a slide, of which `files` are all files and the first the main one, through OpenSlide.

    Where it is remote, on a staged copy, which is staged again whenever it was evicted.

    Raises:
        SlideError: it is no slide, or is broken, or has changed.
        StorageError: it can't be reached.
    """
    uri = files[0].uri
    if storage.is_local(uri):
        return OpenSlideSlide(uri, lambda: _Opened(_open(uri, storage.local_path(uri))), mpp)
    opener = partial(staging.use, as_one(files), options, partial(_open_copy, uri), files)
    return OpenSlideSlide(uri, opener, mpp)
