"""Whole objects to local files, in parts."""

from __future__ import annotations

import os
from collections import deque

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import StorageError
from streaming.storage.addresses import shown
from streaming.storage.clients import StorageOptions, has_store
from streaming.storage.local_files import whole_file
from streaming.storage.object_files import fetch_whole
from streaming.storage.object_info import ObjectInfo
from streaming.storage.other_files import OtherFiles
from streaming.storage.range_file import PART_NBYTES
from streaming.storage.ranges import PendingBytes, Ranges, open_ranges
from streaming.storage.trouble import storage_errors

_MAX_PARTS_COMING = 8


def download(info: ObjectInfo, path: str, options: StorageOptions | None = None, count: Counters = UNCOUNTED) -> None:
    """Copies an object to a local file, whole or not at all: in parts, some at once, all of one version.

    Raises:
        StorageError: it can't be read, there is no room, or it has another size than expected.
        SlideError: it changes meanwhile.
    """
    with storage_errors(info.uri), whole_file(path) as temporary:
        ranges = open_ranges(info.uri, options)
        if ranges is not None:
            _check(info, ranges.size)
            _write_parts(ranges, temporary, count)
        elif has_store(info.uri):
            fetch_whole(info.uri, options, temporary)
        else:
            OtherFiles(options or {}).fetch(info.uri, temporary)
        _check(info, os.path.getsize(temporary))


def _check(info: ObjectInfo, nbytes: int) -> None:
    if nbytes != info.size:
        raise StorageError(f"{shown(info.uri)}: has {nbytes:,} of {info.size:,} bytes; try again, or upload it anew")


def _write_parts(ranges: Ranges, path: str, count: Counters) -> None:
    coming = deque[PendingBytes]()
    with open(path, "wb") as file:
        for start in range(0, ranges.size, PART_NBYTES):
            coming.append(ranges.begin([(start, min(start + PART_NBYTES, ranges.size))], count))
            if len(coming) > _MAX_PARTS_COMING:
                file.writelines(coming.popleft().wait())
        for part in coming:
            file.writelines(part.wait())
