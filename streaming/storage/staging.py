"""The cache of a node: copies of remote objects on local disk, for what can only be read from a file.

It is shared by all processes of a node: a copy is found only when it is whole, and the least recently used ones make
room for the next. `node_cache` counts them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import NodeError, SlideError, StorageError
from streaming.storage.download import download
from streaming.storage.node_cache import REMEDY, cache_at

T = TypeVar("T")

# How often a copy is staged anew that vanished before it was read: something else removes files there.
TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where copies of remote slides lie, and how much disk they may take together."""

    folder: str | None = None
    """none: what `TILESTREAM_STAGING` of the machine that reads says, else a folder of the user's own below the
    system's temporary one"""
    max_bytes: int = 100 * 2**30

    @property
    def path(self) -> str:
        """The folder on this machine."""
        own = os.path.join(tempfile.gettempdir(), f"tilestream-staging-{os.geteuid()}")
        return self.folder or os.environ.get("TILESTREAM_STAGING") or own

    @contextlib.contextmanager
    def holding(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        files: Sequence[storage.ObjectInfo] = (),
        count: Counters = UNCOUNTED,
    ) -> Generator[str]:
        """The local path of an object's copy, downloaded unless it is there, which stays until the block ends.

        `files` are those of a slide, the one to open first, and `info` is all of them as one object: they are staged
        and evicted together, whole or not at all, and only in the versions that `files` tells.

        Raises:
            StorageError: it can't be read, or the cache or its disk has no room for it.
            SlideError: it, or one of `files`, has changed.
            NodeError: the cache can't be used on this machine.
            FileNotFoundError: somebody removed the cache while the copy came; `use` and `fetch` try again.
        """
        cache, key = cache_at(self.path), info.digest[:32]
        entry = cache.folder / key
        path = _inside(entry, storage.name_of(info.uri), info)
        if cache.take(key, path.name, info.size, self.max_bytes, info.uri):
            count.staged_hits += 1
        else:
            count.staged_misses += 1
            try:
                _download_all(entry, info, files, options, count)
            except BaseException as error:
                is_removed = not entry.exists()
                cache.dropped(key)
                cause = error if isinstance(error, OSError) else error.__cause__
                if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                    raise StorageError(cache.disk_full(info.uri, info.size)) from error
                if isinstance(cause, FileNotFoundError) and is_removed:
                    raise FileNotFoundError(f"{entry}: was removed while a copy came") from error
                if isinstance(error, OSError):  # of the folder itself
                    raise NodeError(f"{entry}: can't be written ({error.strerror}); {REMEDY}") from error
                raise
            cache.filled(key)
        try:
            yield str(path)
        finally:
            cache.let_go(key)

    def fetch(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        files: Sequence[storage.ObjectInfo] = (),
        count: Counters = UNCOUNTED,
    ) -> str:
        """The path of an object's copy as `holding`, which may be evicted from now on."""
        return self.use(info, options, lambda path: path, files, count)

    def use(
        self,
        info: storage.ObjectInfo,
        options: storage.StorageOptions | None,
        read: Callable[[str], T],
        files: Sequence[storage.ObjectInfo] = (),
        count: Counters = UNCOUNTED,
    ) -> T:
        """What `read` makes of the copy's path; it raises FileNotFoundError where somebody removed the copy meanwhile.

        Raises:
            StorageError, SlideError, NodeError: as `holding`; or the copy vanishes again and again.
        """
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError), self.holding(info, options, files, count) as path:
                return read(path)
        raise StorageError(f"{info.uri}: its copy vanishes again and again; what else removes files in {self.path}?")


def _download_all(
    entry: Path,
    info: storage.ObjectInfo,
    files: Sequence[storage.ObjectInfo],
    options: storage.StorageOptions | None,
    count: Counters,
) -> None:
    shutil.rmtree(entry, ignore_errors=True)  # what somebody left who removed the database
    entry.mkdir(mode=0o700, parents=True)  # somebody may have removed the cache meanwhile
    for file in files or [info]:
        download(file, str(_inside(entry, storage.relative_name(file, info), file)), options, count)
    for file in files:
        if storage.stat(file.uri, options) != file:
            raise SlideError(f"{file.uri}: changed while it was copied; run `tilestream catalog` on it again")


def _inside(entry: Path, name: str, info: storage.ObjectInfo) -> Path:
    """A file of an entry, whatever a listing calls it.

    Raises:
        StorageError: its name leads elsewhere.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"{info.uri}: its name leads out of the folder for its copy; rename it")
    return entry / name
