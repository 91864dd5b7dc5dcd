"""Where block indices lie: in local files, or remote and read by a staged copy."""

from __future__ import annotations

import os
from dataclasses import dataclass

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError
from streaming.slide.block_index import BlockIndex, read_index
from streaming.storage.staging import Staging


def open_index(path: str) -> BlockIndex:
    """An index by its local path.

    Raises:
        CatalogError: it is missing or damaged.
    """
    return read_index(_LocalFile(path))


def open_staged_index(
    info: storage.ObjectInfo,
    options: storage.StorageOptions | None,
    staging: Staging,
    count: Counters = UNCOUNTED,
) -> BlockIndex:
    """An index that lies remote, by a staged copy, which is staged again whenever it was evicted.

    Raises:
        CatalogError: it is damaged.
        StorageError: it can't be staged.
    """
    return read_index(_StagedCopy(staging.fetch(info, options, count=count), info, options, staging), count)


@dataclass(frozen=True, slots=True)
class _LocalFile:
    """What `block_index.IndexBytes` describes, in a file that stays where it is."""

    name: str

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        del count  # it costs no request
        try:
            return _bytes_at(self.name, offset, size)
        except OSError as error:
            reason = f"can't read this block index ({error.strerror})"
            raise CatalogError(f"{self.name}: {reason}; build the catalog anew") from error


@dataclass(frozen=True, slots=True)
class _StagedCopy:
    """What `block_index.IndexBytes` describes, in a copy that may be evicted at any time."""

    name: str
    """the copy's path"""
    info: storage.ObjectInfo
    options: storage.StorageOptions | None
    staging: Staging

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        try:
            return _bytes_at(self.name, offset, size)
        except FileNotFoundError:
            return self.staging.use(self.info, self.options, lambda path: _bytes_at(path, offset, size), count=count)


def _bytes_at(path: str, offset: int, size: int) -> bytes:
    # Opened for each read: 12,000 slides would be 12,000 descriptors, and a memory map counts as resident.
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)
