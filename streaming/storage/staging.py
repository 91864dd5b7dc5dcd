"""The cache of a node: copies of remote objects on local disk, for what can only be read from a file.

It is shared by all processes of a node: a copy appears under its name only when whole, and the least recently used ones
make room for the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import NodeError, SlideError, StorageError
from streaming.storage.download import download

T = TypeVar("T")

# How often a copy is staged anew that is evicted before it was read; after that, the cache is told to be too small.
TRIES = 3
# A download to which nothing was added for so long is taken for one whose process died.
_DEAD_S = 3600


def default_folder() -> str:
    """Where copies lie unless told otherwise: `TILESTREAM_STAGING`, else below the system's temporary folder."""
    return os.environ.get("TILESTREAM_STAGING", os.path.join(tempfile.gettempdir(), "tilestream-staging"))


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where copies of remote slides lie, and how much disk they may take together."""

    folder: str = field(default_factory=default_folder)
    max_bytes: int = 100 * 2**30

    def fetch(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        files: Sequence[storage.ObjectInfo] = (),
        count: Counters = UNCOUNTED,
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
                count.staged_hits += 1
                # Another process may evict it at any moment: whoever opens it finds out.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
            else:
                count.staged_misses += 1
                self._make_room(info)
                shutil.rmtree(entry, ignore_errors=True)
                try:
                    _download_all(entry, info, files, options, count)
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
        count: Counters = UNCOUNTED,
    ) -> T:
        """What `read` makes of the copy's path; it raises FileNotFoundError where the copy was evicted meanwhile.

        Raises:
            StorageError, SlideError: as `fetch`; or the copy is evicted again and again.
        """
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):
                return read(self.fetch(info, options, files, count))
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
                # A part is another process's download under way; nothing is added any more if that process died.
                part = ".part-" in entry
                dead = ".gone-" in entry or (part and time.time() - used_at > _DEAD_S)
                if not dead and (part or excess <= 0):
                    continue
                # Renamed first, so that nobody finds a part of it. Whoever has a file of it open keeps reading that.
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
    count: Counters,
) -> None:
    part = Path(f"{entry}.part-{uuid.uuid4().hex[:8]}")
    try:
        for file in files or [info]:
            download(file, str(part / storage.relative_name(file, info)), options, count)
        for file in files:
            if storage.stat(file.uri, options) != file:
                raise SlideError(f"{file.uri}: changed while it was copied; run `tilestream catalog` on it again")
        os.rename(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)
