"""Byte ranges of stored objects: many in flight at once, and never bytes of another version of the object."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import obstore
from obstore.exceptions import GenericError

from streaming import storage
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError
from streaming.storage import clients
from streaming.storage.connections import CONNECTIONS, Connections

if TYPE_CHECKING:
    from obstore import ObjectMeta  # there is none at run time

T = TypeVar("T")
Span = tuple[int, int]  # [start, end) in bytes

# Errors that obstore has no class for may pass: throttling, a server's fault, a lost connection, another range than
# wanted. Not so most refusals (status 4xx): the server would say the same again.
_LASTING = re.compile(r"status code: 4(?!08|29)\d\d")
# The object may end before the range does: is it still the one that was opened?
_OUT_OF_RANGE = re.compile(r"Requested \d+\.\.\d+, got|status code: 416")


def _passes(error: BaseException) -> bool:
    """Whether a request that failed so may succeed when it is sent again."""
    return isinstance(error, GenericError) and not _LASTING.search(str(error))


# obstore could send again by itself, but does not tell how often: throttling would look like slow storage.
_PATIENT = storage.patient(_passes)


def _patiently(ask: Callable[..., T], *arguments: Any) -> tuple[T, int]:
    """What a request brings, and how often it was sent again."""
    try:
        # The first time without tenacity, which would cost a tenth of a request's time.
        return ask(*arguments), 0
    except GenericError as error:
        if not _passes(error):
            raise
    time.sleep(random.uniform(0, 0.1))
    # tenacity keeps its statistics by thread: these are of the call just made.
    return _PATIENT(ask, *arguments), _PATIENT.statistics["attempt_number"]


class PendingBytes(Protocol):
    """Ranges of an object that were asked for."""

    def when_ready(self, call: Callable[[], object]) -> None:
        """Calls, from any thread, as soon as `wait` would not wait; at once if it is so already."""
        ...

    def wait(self) -> list[bytes]:
        """The bytes of each range, as soon as they are there.

        Raises:
            StorageError: they can't be read.
            SlideError: the object is not the one that was opened any more, or ends too early.
        """
        ...


class Ranges(Protocol):
    """An object whose byte ranges can be asked for. Safe to use from several threads."""

    size: int
    tag: str
    """what tells its version: ETag, or size and time of modification"""

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Asks for the bytes [start, end) of each span."""
        ...

    def locate(self, offset: int) -> tuple[str, int]:
        """The address of the object that a byte lies in, and where in it; for messages."""
        ...


class LocalRanges:
    """Ranges of a file; opened for each, so that thousands of slides hold no descriptors."""

    def __init__(self, uri: str, tag: str | None = None) -> None:
        """A tag (see `Ranges.tag`) binds it to that version.

        Raises:
            StorageError: the file can't be read.
            SlideError: it has another tag.
        """
        self._uri, self._path = uri, storage.local_path(uri)
        with storage.storage_errors(uri):
            stat = os.stat(self._path)
        self.size, self.tag = stat.st_size, _same(uri, _file_tag(stat), tag)

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Tells the kernel what is wanted, which fetches it meanwhile; it is read when it is waited for.

        A page cache answers at once: to hand its reads to threads would cost four times as much.
        """
        _count(spans, count)
        # What is wrong with the file is told when it is read.
        with contextlib.suppress(OSError):
            file = os.open(self._path, os.O_RDONLY)
            try:
                for start, end in spans:
                    os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
        return _FileRead(self, spans)

    def locate(self, offset: int) -> tuple[str, int]:
        """The file's address, and the same offset."""
        return self._uri, offset

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span, read now.

        Raises:
            StorageError, SlideError: as `PendingBytes.wait`.
        """
        with storage.storage_errors(self._uri):
            file = os.open(self._path, os.O_RDONLY)
            try:
                _same(self._uri, _file_tag(os.fstat(file)), self.tag)
                return [_whole(self._uri, os.pread(file, end - start, start), start, end) for start, end in spans]
            finally:
                os.close(file)


@dataclass(frozen=True, slots=True)
class _FileRead:
    """Ranges of a file that are still to be read."""

    ranges: LocalRanges
    spans: Sequence[Span]

    def when_ready(self, call: Callable[[], object]) -> None:
        call()

    def wait(self) -> list[bytes]:
        return self.ranges.read(self.spans)


class RemoteRanges:
    """Ranges of an object in a store that obstore knows."""

    def __init__(
        self,
        uri: str,
        options: storage.StorageOptions | None = None,
        tag: str | None = None,
        connections: Connections = CONNECTIONS,
        size: int | None = None,
    ) -> None:
        """A tag binds it to that version of the object, without asking for it now.

        Where a listing told the size, nothing is asked either: the first answer tells the tag.

        Raises:
            StorageError: the object can't be reached.
        """
        self._uri, self._connections = uri, connections
        self._store, self._path = connections.store(uri, options)
        self.size, self.tag = size or 0, tag or ""
        if not tag and size is None:
            with storage.storage_errors(uri):
                meta, _ = _patiently(obstore.head, self._store, self._path)
            self.size, self.tag = meta["size"], _object_tag(meta)

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Sends the requests at once, or as soon as others have come back."""
        _count(spans, count)
        return _Requests([self._connections.submit(self._uri, self._read, *span) for span in spans], count)

    def locate(self, offset: int) -> tuple[str, int]:
        """The object's address, and the same offset."""
        return self._uri, offset

    def _read(self, start: int, end: int) -> tuple[bytes, int]:
        """The bytes, and how often the request was sent again: counters belong to the thread that waits for them."""
        with storage.storage_errors(self._uri):
            return _patiently(self._get, start, end)

    def _get(self, start: int, end: int) -> bytes:
        try:
            answer = obstore.get(self._store, self._path, options={"range": (start, end)})
        except GenericError as error:
            if _OUT_OF_RANGE.search(str(error)):
                _same(self._uri, _object_tag(obstore.head(self._store, self._path)), self.tag)
            raise
        self.tag = _same(self._uri, _object_tag(answer.meta), self.tag)
        return _whole(self._uri, answer.bytes().to_bytes(), start, end)


@dataclass(frozen=True, slots=True)
class _Requests:
    """Requests under way, one for each of the ranges, in their order."""

    answers: Sequence[Future[tuple[bytes, int]]]
    count: Counters

    def when_ready(self, call: Callable[[], object]) -> None:
        _when_all(self.answers, call)

    def wait(self) -> list[bytes]:
        results = [answer.result() for answer in self.answers]
        self.count.retries += sum(retries for _, retries in results)
        return [content for content, _ in results]


def _when_all(answers: Sequence[Future[Any]], call: Callable[[], object]) -> None:
    """Calls once all have come. None is handed those before it: in a circle, their bytes would stay in memory."""
    if not answers:
        call()
        return
    first, *rest = answers
    first.add_done_callback(lambda _: _when_all(rest, call))


def open_ranges(
    uri: str, options: storage.StorageOptions | None = None, tag: str | None = None, size: int | None = None
) -> Ranges | None:
    """The ranges of an object, bound to a version by its tag; None where only fsspec knows the store.

    With a tag, or a size that a listing told, a remote object is not asked for it.

    Raises:
        StorageError: it can't be reached.
        SlideError: it has another tag.
    """
    if storage.is_local(uri):
        return LocalRanges(uri, tag)
    return RemoteRanges(uri, options, tag, size=size) if clients.has_ranges(uri) else None


def read_range(ranges: Ranges, start: int, end: int, count: Counters = UNCOUNTED) -> bytes:
    """The bytes [start, end) of an object.

    Raises:
        StorageError, SlideError: as `PendingBytes.wait`.
    """
    return ranges.begin([(start, end)], count).wait()[0]


def _count(spans: Sequence[Span], count: Counters) -> None:
    count.requests += len(spans)
    count.nbytes += sum(end - start for start, end in spans)


def _file_tag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _object_tag(meta: ObjectMeta) -> str:
    return meta["e_tag"] or meta["last_modified"].isoformat()


def _same(uri: str, found: str, wanted: str | None) -> str:
    if wanted and found != wanted:
        raise SlideError(
            f"{uri}: changed since it was catalogued (version {found}, not {wanted}); "
            "run `tilestream catalog` on it again"
        )
    return found


def _whole(uri: str, content: bytes, start: int, end: int) -> bytes:
    if len(content) != end - start:
        raise SlideError(
            f"{uri}: ends after {len(content):,} of the {end - start:,} bytes from {start:,} on; "
            "the upload was cut off? compare the size with the source"
        )
    return content
