"""Whole objects to local files, in parts."""

from __future__ import annotations

import os
from collections import deque

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import StorageError
from streaming.storage import clients
from streaming.storage.ranges import PendingBytes, Ranges, open_ranges

# So small that even 32 of them at once (a reader's requests, 64 MiB) arrive on a line of 4 MB/s before the 20 s are
# over that one may take (`clients._TIMEOUT_S`).
_PART_NBYTES = 2**21
_MAX_PARTS_COMING = 8


def download(
    info: storage.ObjectInfo, path: str, options: storage.StorageOptions | None = None, count: Counters = UNCOUNTED
) -> None:
    """Copies an object to a local file, whole or not at all: in parts, some at once, all of one version.

    Raises:
        StorageError: it can't be read, there is no room, or it has another size than expected.
        SlideError: it changes meanwhile.
    """
    with storage.storage_errors(info.uri), storage.whole_file(path) as temporary:
        ranges = open_ranges(info.uri, options)
        if ranges is None:
            fs, remote = clients.filesystem(info.uri, options)
            fs.get_file(remote, temporary)
            size = os.path.getsize(temporary)
        else:
            size = ranges.size
        if size != info.size:
            raise StorageError(f"{info.uri}: has {size:,} of {info.size:,} bytes; try again, or upload it anew")
        if ranges is not None:
            _write_parts(ranges, temporary, count)


def _write_parts(ranges: Ranges, path: str, count: Counters) -> None:
    coming = deque[PendingBytes]()
    with open(path, "wb") as file:
        for start in range(0, ranges.size, _PART_NBYTES):
            coming.append(ranges.begin([(start, min(start + _PART_NBYTES, ranges.size))], count))
            if len(coming) > _MAX_PARTS_COMING:
                file.writelines(coming.popleft().wait())
        for part in coming:
            file.writelines(part.wait())
