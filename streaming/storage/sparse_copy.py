"""Remote files as one local file of the node's cache, into which those parts come that are read.

The file has its whole size from the start, and takes disk only where a part has come. Beside it lies a file with a byte
for each part, which is 1 once the part is there: so a part is fetched once a node, and what a killed process began is
fetched anew. That file belongs to one start of the machine, since a crash may keep its bytes and lose those of a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError, SlideError, StorageError
from streaming.storage.clients import StorageOptions
from streaming.storage.joined_ranges import JoinedRanges
from streaming.storage.node_cache import cache_at
from streaming.storage.other_files import OtherRanges
from streaming.storage.ranges import PendingBytes, Ranges, Span, open_ranges
from streaming.storage.staging import Staging

# A place in a block index is some hundred bytes, and its header some thousand; but each part is a request.
PART_NBYTES = 2**16
_PARTS_AT_ONCE = 2**21 // PART_NBYTES  # in one request
_REQUESTS_COMING = 64


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that never changes, since its name tells its content."""

    uri: str
    nbytes: int


class SparseCopy:
    """Some remote files, one after another; `file` is the local one's descriptor. Safe to use from several threads.

    Raises:
        NodeError: the node's cache can't be used.
        StorageError: its disk is full.
    """

    def __init__(self, files: Sequence[RemoteFile], options: StorageOptions | None, staging: Staging) -> None:
        sizes = [file.nbytes for file in files]
        self.nbytes = sum(sizes)
        self._name = files[0].uri
        self._ends = [*accumulate(sizes)]
        self._ranges = JoinedRanges(sizes, [partial(_opened, file, options) for file in files])
        self._cache, self._max_bytes = cache_at(staging.path), staging.max_bytes
        self._key = hashlib.sha256("\n".join(f"{file.uri} {file.nbytes}" for file in files).encode()).hexdigest()[:32]
        self._num_parts = -(-self.nbytes // PART_NBYTES)
        # Two threads that want one part at once fetch it once.
        self._coming = set[int]()
        self._come = threading.Condition()
        try:
            self._cache.keep(self._key, self._open)
        except OSError as error:
            raise StorageError(self._cache.disk_full(self._name, self._num_parts)) from error

    def _open(self, folder: Path) -> int:
        here = folder / f"here-{_start_of_machine()}"
        if not here.exists():  # nor is a process that reads of an earlier start
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        self.file = _opened_file(folder / "data")
        os.ftruncate(self.file, self.nbytes)
        self._notes = _opened_file(here)
        if os.fstat(self._notes).st_size != self._num_parts:
            # Written, or a full disk would be told by a signal that ends the process.
            os.pwrite(self._notes, bytes(self._num_parts), 0)
        self._here = mmap.mmap(self._notes, 0, access=mmap.ACCESS_READ)
        return self._here[:].count(1) * PART_NBYTES

    def read(self, start: int, end: int, count: Counters = UNCOUNTED) -> bytes:
        """The bytes from `start` to `end`.

        Raises:
            StorageError: they can't be fetched.
        """
        self.fetch([(start, end)], count)
        return os.pread(self.file, end - start, start)

    def fetch(self, spans: Iterable[Span], count: Counters = UNCOUNTED) -> None:
        """Has some spans there when it returns; those that are missing come at once.

        Raises:
            StorageError: they can't be fetched, or there is no room for them.
            CatalogError: a file is not the one that was catalogued.
        """
        wanted = set[int]()
        for start, end in spans:
            first, last = start // PART_NBYTES, (end - 1) // PART_NBYTES
            if self._here.find(b"\0", first, last + 1) >= 0:
                wanted.update(part for part in range(first, last + 1) if not self._here[part])
        while wanted:
            with self._come:
                mine = wanted - self._coming
                self._coming |= mine
            try:
                if mine:
                    self._fetch(sorted(mine), count)
            finally:
                with self._come:
                    self._coming -= mine
                    self._come.notify_all()
            with self._come:
                while self._coming & wanted:
                    self._come.wait()
            wanted = {part for part in wanted if not self._here[part]}

    def _fetch(self, parts: Sequence[int], count: Counters) -> None:
        spans = list(self._requests(parts))
        missing = sum(end - start for start, end in spans)
        self._cache.grow(self._key, missing, self._max_bytes, self._name)
        coming, left = deque[tuple[Span, PendingBytes]](), deque(spans)
        try:
            while left or coming:
                while left and len(coming) < _REQUESTS_COMING:
                    span = left.popleft()
                    coming.append((span, self._ranges.begin(self._by_file(span), count)))
                (start, end), pending = coming.popleft()
                self._write(start, b"".join(pending.wait()))
                missing -= end - start
                count.index_nbytes += end - start
        except SlideError as error:
            raise CatalogError(f"{error}") from error
        finally:
            if missing:
                self._cache.shrink(self._key, missing)

    def _write(self, start: int, content: bytes) -> None:
        try:
            os.pwrite(self.file, content, start)
            os.pwrite(self._notes, b"\1" * -(-len(content) // PART_NBYTES), start // PART_NBYTES)
        except OSError as error:
            raise StorageError(self._cache.disk_full(self._name, len(content))) from error

    def _requests(self, parts: Sequence[int]) -> Iterable[Span]:
        """Parts that follow each other are one span, which is one request unless files begin in it."""
        first = last = parts[0]
        for part in parts[1:]:
            if part > last + 1 or part - first >= _PARTS_AT_ONCE:
                yield first * PART_NBYTES, min((last + 1) * PART_NBYTES, self.nbytes)
                first = part
            last = part
        yield first * PART_NBYTES, min((last + 1) * PART_NBYTES, self.nbytes)

    def _by_file(self, span: Span) -> list[Span]:
        start, end = span
        ends = [*self._ends[bisect_right(self._ends, start) : bisect_left(self._ends, end)], end]
        return list(zip([start, *ends], ends, strict=False))


@dataclass(frozen=True, slots=True)
class CopiedPart:
    """A part of a copy; what `streaming.slide.block_index.IndexBytes` describes."""

    name: str
    copy: SparseCopy
    at: int
    nbytes: int

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        """As `IndexBytes.read`."""
        end = min(offset + size, self.nbytes)
        return self.copy.read(self.at + offset, self.at + end, count) if end > offset else b""

    def copied(self, spans: Sequence[Span]) -> tuple[SparseCopy, list[Span]]:
        """As `IndexBytes.copied`."""
        return self.copy, [(self.at + start, self.at + min(end, self.nbytes)) for start, end in spans]


def _opened(file: RemoteFile, options: StorageOptions | None) -> Ranges:
    return open_ranges(file.uri, options, size=file.nbytes) or OtherRanges(file.uri, file.nbytes, options)


def _opened_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _start_of_machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return "0"
