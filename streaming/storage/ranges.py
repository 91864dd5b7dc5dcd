"""Byte ranges of stored objects: many in flight at once, and never bytes of another version of the object."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import obstore
from obstore.exceptions import GenericError, NotSupportedError, PermissionDeniedError

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import NoRangesError, SlideError
from streaming.storage import addresses, clients
from streaming.storage.addresses import HTTP, is_plain
from streaming.storage.buckets import Bucket, bucket_at
from streaming.storage.connections import CONNECTIONS, Connections
from streaming.storage.object_info import file_version, object_version
from streaming.storage.patience import Tries
from streaming.storage.trouble import storage_errors

if TYPE_CHECKING:
    from obstore import ObjectMeta  # there is none at run time

T = TypeVar("T")
Span = tuple[int, int]  # [start, end) in bytes

# The object may end before the range does: is it still the one that was opened?
_OUT_OF_RANGE = re.compile(r"Requested \d+\.\.\d+, got|status code: 416|InvalidRange")


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
    """what tells its version: as `ObjectInfo.version`"""

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Asks for the bytes [start, end) of each span."""
        ...

    def locate(self, offset: int) -> tuple[str, int]:
        """The address of the object that a byte lies in, and where in it; for messages."""
        ...


class LocalRanges:
    """Ranges of a file; opened for each, so that thousands of slides hold no descriptors."""

    def __init__(self, uri: str, tag: str | None = None, size: int | None = None) -> None:
        """A tag (see `Ranges.tag`) binds it to that version, without one a size does.

        Raises:
            StorageError: the file can't be read.
            SlideError: it has another tag or size.
        """
        self._uri, self._path = uri, addresses.local_path(uri)
        with storage_errors(uri):
            stat = os.stat(self._path)
        self.size, self.tag = stat.st_size, _same(uri, file_version(stat), tag)
        if not tag and size is not None:
            _same_size(uri, self.size, size)

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
        with storage_errors(self._uri):
            file = os.open(self._path, os.O_RDONLY)
            try:
                _same(self._uri, file_version(os.fstat(file)), self.tag)
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
        options: clients.StorageOptions | None = None,
        tag: str | None = None,
        connections: Connections = CONNECTIONS,
        size: int | None = None,
    ) -> None:
        """A tag binds it to that version of the object, without asking for it now.

        Where a listing or a catalog told the size, nothing is asked either: the first answer tells the tag, and is of
        an object of that size.

        Raises:
            StorageError: the object can't be reached, or its server answers no ranges.
        """
        self._uri, self._connections = addresses.shown(uri), connections
        self._bucket, self._key = bucket_at(uri, options)
        self._get = self._get_plain if is_plain(self._key) else self._get_odd
        self.size, self.tag = size or 0, (tag or "").strip('"')
        if not tag and size is None:
            self.size, self.tag = self._bucket.ask(uri, lambda: _looked_at(self._bucket, self._key))[0]

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Sends the requests at once, or as soon as others have come back."""
        _count(spans, count)
        return _Requests([self._connections.submit(self._uri, self._read, *span) for span in spans], count)

    def locate(self, offset: int) -> tuple[str, int]:
        """The object's address, and the same offset."""
        return self._uri, offset

    def _read(self, start: int, end: int) -> tuple[bytes, Tries]:
        """The bytes, and what they took besides: counters belong to the thread that waits for them."""
        return self._bucket.ask(self._uri, lambda: self._get(start, end))

    def _seen(self, tag: str, size: int) -> None:
        """Refuses another version than the one that was opened; of the first answer, the size tells that."""
        if not self.tag:
            _same_size(self._uri, size, self.size)
        self.tag = _same(self._uri, tag, self.tag)

    def _get_plain(self, start: int, end: int) -> bytes:
        try:
            answer = obstore.get(self._bucket.store, self._key, options={"range": (start, end)})
        except GenericError as error:
            if _OUT_OF_RANGE.search(str(error)):
                found = head(self._bucket, self._key)
                self._seen(_version(found), found["size"])
            raise
        self._seen(_version(answer.meta), answer.meta["size"])
        return _whole(self._uri, answer.bytes().to_bytes(), start, end)

    def _get_odd(self, start: int, end: int) -> bytes:
        """The same by botocore."""
        asked = self._bucket.s3_object(Key=self._key, Range=f"bytes={start}-{end - 1}")
        answer = self._bucket.s3_client.get_object(**asked)
        found = object_version(answer.get("ETag"), answer.get("LastModified"))
        size = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
        self._seen(found, int(size))
        return _whole(self._uri, answer["Body"].read(), start, end)


@dataclass(frozen=True, slots=True)
class _Requests:
    """Requests under way, one for each of the ranges, in their order."""

    answers: Sequence[Future[tuple[bytes, Tries]]]
    count: Counters

    def when_ready(self, call: Callable[[], object]) -> None:
        when_all(self.answers, _when_done, call)

    def wait(self) -> list[bytes]:
        results = [answer.result() for answer in self.answers]
        for _, tries in results:
            self.count.retries += tries.retries
            self.count.throttled += tries.throttled
            self.count.held_s += tries.held_s
        return [content for content, _ in results]


def when_all(
    parts: Sequence[T], when_one: Callable[[T, Callable[[], object]], object], call: Callable[[], object]
) -> None:
    """Calls once all parts have come, of which `when_one` calls for one.

    None is handed those before it: in a circle, their bytes would stay in memory.
    """
    if not parts:
        call()
        return
    first, *rest = parts
    when_one(first, lambda: when_all(rest, when_one, call))


def _when_done(answer: Future[Any], call: Callable[[], object]) -> None:
    answer.add_done_callback(lambda _: call())


def open_ranges(
    uri: str, options: clients.StorageOptions | None = None, tag: str | None = None, size: int | None = None
) -> Ranges | None:
    """The ranges of an object, bound to a version by its tag; None where only fsspec knows the store, or it has none.

    With a tag, or a size that a listing or a catalog told, a remote object is not asked for it.

    Raises:
        StorageError: it can't be reached.
        SlideError: it has another tag, or without one another size.
    """
    if addresses.is_local(uri):
        return LocalRanges(uri, tag, size)
    return open_remote(uri, options, tag, size) if clients.has_store(uri) else None


def open_remote(
    uri: str, options: clients.StorageOptions | None = None, tag: str | None = None, size: int | None = None
) -> RemoteRanges | None:
    """The ranges of an object of a store that obstore knows; None of a web server that sends whole files only.

    Raises:
        StorageError: it can't be reached.
    """
    try:
        return RemoteRanges(uri, options, tag, size=size)
    except NoRangesError:
        return None


def head(bucket: Bucket, key: str) -> ObjectMeta:
    """Size, ETag and time of an object, or the error that tells best why there is none."""
    if bucket.root.startswith(HTTP):
        # Many signed addresses are good for GET alone; and a server that answers no ranges is found out.
        with contextlib.suppress(NotSupportedError):
            return _head_by_range(bucket, key)
        return obstore.get(bucket.store, key).meta  # nobody reads the body: it does not come
    try:
        return obstore.head(bucket.store, key)
    except (GenericError, PermissionDeniedError):
        # A refused HEAD has no content that could tell why: expired credentials, another region.
        return _head_by_range(bucket, key)


def _head_by_range(bucket: Bucket, key: str) -> ObjectMeta:
    try:
        return obstore.get(bucket.store, key, options={"range": (0, 1)}).meta
    except GenericError as error:
        if _OUT_OF_RANGE.search(str(error)):  # it is empty
            return obstore.head(bucket.store, key)
        raise


def _looked_at(bucket: Bucket, key: str) -> tuple[int, str]:
    """Size and version of an object whose ranges are to be read."""
    if not is_plain(key):
        found = bucket.s3_client.head_object(**bucket.s3_object(Key=key))
        return int(found["ContentLength"]), object_version(found.get("ETag"), found.get("LastModified"))
    meta = _head_by_range(bucket, key) if bucket.root.startswith(HTTP) else head(bucket, key)
    return meta["size"], _version(meta)


def read_range(ranges: Ranges, start: int, end: int, count: Counters = UNCOUNTED) -> bytes:
    """The bytes [start, end) of an object.

    Raises:
        StorageError, SlideError: as `PendingBytes.wait`.
    """
    return ranges.begin([(start, end)], count).wait()[0]


def _count(spans: Sequence[Span], count: Counters) -> None:
    count.requests += len(spans)
    count.nbytes += sum(end - start for start, end in spans)


def _version(meta: ObjectMeta) -> str:
    return object_version(meta["e_tag"], meta["last_modified"])


def _same_size(uri: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise SlideError(
            f"{uri}: changed since it was catalogued ({found:,} bytes, not {wanted:,}); copy it anew, or run "
            "`tilestream catalog` on it again"
        )


def _same(uri: str, found: str, wanted: str | None) -> str:
    # Catalogs of before held the ETag with its quotes.
    if wanted and found != wanted.strip('"'):
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
