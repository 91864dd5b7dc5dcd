"""Byte ranges of stored objects: many in flight at once, and never bytes of another version of the object."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import obstore
from obstore.exceptions import GenericError
from obstore.store import ObjectStore

from streaming import counters, storage
from streaming.errors import SlideError, StorageError
from streaming.storage import clients

if TYPE_CHECKING:
    from obstore import ObjectMeta  # there is none at run time

T = TypeVar("T")
Span = tuple[int, int]  # [start, end) in bytes

_in_flight = 32
# So many ranges of a slide does one thread ask for, one after the other: a tile's are two, and to hand work from thread
# to thread costs as much as the request.
_A_TURN = 2
# A whole object comes in parts of so many bytes, so many at once: so small that all requests of a reader end within the
# time-out of one, on a line of 4 MB/s.
_PART, _PARTS = 2**21, 8

# Errors that obstore has no class for pass: throttling, a server's fault, a lost connection, another range than wanted.
# But what else a server says of a request (4xx), it would say again.
_LASTING = re.compile(r"status code: 4(?!08|29)\d\d")
# The object may end before the range does: is it still the one that was opened?
_OUT_OF_RANGE = re.compile(r"Requested \d+\.\.\d+, got|status code: 416")


def _passes(error: BaseException) -> bool:
    """Whether a request that failed so may succeed when it is sent again."""
    return isinstance(error, GenericError) and not _LASTING.search(str(error))


# Not obstore's own retries: it does not tell of them, and throttling would look like slow storage.
_PATIENT = storage.patient(_passes)


def _patiently(ask: Callable[..., T], *arguments: Any) -> tuple[T, int]:
    """What a request brings, and how often it was sent again."""
    try:
        return ask(*arguments), 0  # past tenacity: a tenth of a request's time
    except GenericError as error:
        if not _passes(error):
            raise
    time.sleep(random.uniform(0, 0.1))
    return _PATIENT(ask, *arguments), _PATIENT.statistics["attempt_number"]  # of this thread


class Ranges(Protocol):
    """An object whose byte ranges can be asked for. Safe to use from several threads."""

    size: int
    tag: str

    def begin(self, spans: Sequence[Span]) -> Callable[[], list[bytes]]:
        """Asks for the bytes [start, end) of each span; the answer waits for them.

        Raises (the answer):
            StorageError: they can't be read.
            SlideError: the object is not the one that was opened any more, or ends too early.
        """
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

    def begin(self, spans: Sequence[Span]) -> Callable[[], list[bytes]]:
        """Reads when the answer is called for: a page cache needs no company."""
        _count(spans)
        return lambda: self._read(spans)

    def _read(self, spans: Sequence[Span]) -> list[bytes]:
        with storage.storage_errors(self._uri):
            file = os.open(self._path, os.O_RDONLY)
            try:
                _same(self._uri, _file_tag(os.fstat(file)), self.tag)
                return [_whole(self._uri, os.pread(file, end - start, start), start, end) for start, end in spans]
            finally:
                os.close(file)


class RemoteRanges:
    """Ranges of an object in a store that obstore knows."""

    def __init__(self, uri: str, options: storage.StorageOptions | None = None, tag: str | None = None) -> None:
        """A tag binds it to that version of the object, without asking for it now.

        Raises:
            StorageError: the object can't be reached.
        """
        self._uri = uri
        self._store, self._path = _store(uri, options)
        self.size, self.tag = 0, tag or ""
        if not tag:
            with storage.storage_errors(uri):
                meta, _ = _patiently(obstore.head, self._store, self._path)
            self.size, self.tag = meta["size"], _object_tag(meta)

    def begin(self, spans: Sequence[Span]) -> Callable[[], list[bytes]]:
        """Sends the requests at once, or as soon as others have come back."""
        _count(spans)
        pool = _requests()
        answers = [pool.submit(self._read, spans[at : at + _A_TURN]) for at in range(0, len(spans), _A_TURN)]

        def wait() -> list[bytes]:
            results = [answer.result() for answer in answers]
            counters.mine().retries += sum(retries for _, retries in results)
            return [content for contents, _ in results for content in contents]

        return wait

    def _read(self, spans: Sequence[Span]) -> tuple[list[bytes], int]:
        """The bytes, and how often requests were sent again: the thread that waits for them counts that."""
        contents, retries = list[bytes](), 0
        with storage.storage_errors(self._uri), _under_way(self._uri):
            for start, end in spans:
                content, again = _patiently(self._get, start, end)
                contents.append(content)
                retries += again
        return contents, retries

    def _get(self, start: int, end: int) -> bytes:
        try:
            answer = obstore.get(self._store, self._path, options={"range": (start, end)})
        except GenericError as error:
            if _OUT_OF_RANGE.search(str(error)):
                _same(self._uri, _object_tag(obstore.head(self._store, self._path)), self.tag)
            raise
        _same(self._uri, _object_tag(answer.meta), self.tag)
        return _whole(self._uri, answer.bytes().to_bytes(), start, end)


def open_ranges(uri: str, options: storage.StorageOptions | None = None, tag: str | None = None) -> Ranges | None:
    """The ranges of an object, bound to a version by its tag; None where only fsspec knows the store.

    Raises:
        StorageError: it can't be reached.
        SlideError: it has another tag.
    """
    if storage.is_local(uri):
        return LocalRanges(uri, tag)
    return RemoteRanges(uri, options, tag) if clients.has_ranges(uri) else None


def read_range(ranges: Ranges, start: int, end: int) -> bytes:
    """The bytes [start, end) of an object.

    Raises:
        StorageError, SlideError: as `Ranges.begin`.
    """
    return ranges.begin([(start, end)])()[0]


def download(info: storage.ObjectInfo, path: str, options: storage.StorageOptions | None = None) -> None:
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
            _write_parts(ranges, temporary)


def _write_parts(ranges: Ranges, path: str) -> None:
    coming = deque[Callable[[], list[bytes]]]()
    with open(path, "wb") as file:
        for start in range(0, ranges.size, _PART):
            coming.append(ranges.begin([(start, min(start + _PART, ranges.size))]))
            if len(coming) > _PARTS:
                file.writelines(coming.popleft()())
        for answer in coming:
            file.writelines(answer())


def _count(spans: Sequence[Span]) -> None:
    count = counters.mine()
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


def keep_in_flight(requests: int) -> None:
    """Sets how many requests this process keeps under way."""
    global _in_flight
    if requests != _in_flight:
        _in_flight = requests
        _requests.cache_clear()  # those under way in the former threads come to their end


@lru_cache(maxsize=1)
def _requests() -> ThreadPoolExecutor:
    """This process's requests under way. obstore lets go of the interpreter while it waits."""
    return ThreadPoolExecutor(_in_flight, thread_name_prefix="ranges")


_asked: dict[int, tuple[str, float]] = {}


@contextlib.contextmanager
def _under_way(uri: str) -> Generator[None]:
    """A request, while its thread waits for it."""
    _asked[threading.get_ident()] = uri, time.monotonic()
    try:
        yield
    finally:
        del _asked[threading.get_ident()]


def oldest_request() -> tuple[str, float] | None:
    """Address and start (as time.monotonic) of this process's request that has been under way for longest."""
    return min(list(_asked.values()), key=lambda entry: entry[1], default=None)


_stores: dict[tuple[str, str], ObjectStore] = {}


def _store(uri: str, options: storage.StorageOptions | None) -> tuple[ObjectStore, str]:
    """One store a bucket and set of options: it holds the connections."""
    root, path = clients.split_bucket(uri)
    key = (root, repr(sorted((options or {}).items(), key=str)) + clients.store_environment())
    if key not in _stores:
        with storage.storage_errors(uri):
            _stores[key] = clients.object_store(root, options)
    return _stores[key], path


class RangeFile:
    """A read-only seekable file over ranges, for parsers: what lies near is fetched with what is asked for.

    Pages of 64 KiB are kept, a hundred at most.
    """

    _PAGE = 2**16

    def __init__(self, ranges: Ranges) -> None:
        self._ranges, self._at = ranges, 0
        self._page = lru_cache(maxsize=100)(self._fetch)

    def _fetch(self, page: int) -> bytes:
        start = page * self._PAGE
        return read_range(self._ranges, start, min(start + self._PAGE, self._ranges.size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """As io's."""
        self._at = max(0, offset + (0, self._at, self._ranges.size)[whence])
        return self._at

    def tell(self) -> int:
        """As io's."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As io's: fewer bytes at the end."""
        end = self._ranges.size if size < 0 else min(self._at + size, self._ranges.size)
        if end <= self._at:
            return b""
        first, last = self._at // self._PAGE, (end - 1) // self._PAGE
        if last - first > 8:
            content = read_range(self._ranges, self._at, end)
        else:
            pages = b"".join(self._page(page) for page in range(first, last + 1))
            content = pages[self._at - first * self._PAGE : end - first * self._PAGE]
        self._at = end
        return content
