"""Files of storages that only fsspec knows: FTP, SFTP, WebDAV, SMB, its memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from streaming.counters import UNCOUNTED, Counters
from streaming.errors import MissingError, StorageError
from streaming.secrets import revealed
from streaming.storage import addresses
from streaming.storage.clients import StorageOptions
from streaming.storage.files import Current
from streaming.storage.object_info import ObjectInfo, object_version
from streaming.storage.patience import Patience
from streaming.storage.trouble import storage_errors

T = TypeVar("T")

_PATIENCE: dict[str, Patience] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class OtherFiles:
    """As `Files` describes."""

    options: StorageOptions

    def stat(self, uri: str) -> ObjectInfo:
        def found() -> ObjectInfo:
            fs, path = self._fs(uri)
            entry: dict[str, Any] = fs.info(path)
            if entry["type"] != "file":
                raise FileNotFoundError(f"{uri} is a folder")
            return _info(fs, entry)

        return self._ask(uri, found)

    def below(
        self, uri: str, *, deep: bool, wanted: Callable[[str], bool] = lambda _: True
    ) -> tuple[list[ObjectInfo], list[str]]:
        def listed() -> tuple[list[ObjectInfo], list[str]]:
            fs, path = self._fs(uri)
            if deep:
                entries = list(cast("dict[str, dict[str, Any]]", fs.find(path, detail=True)).values())
                if not entries:
                    fs.info(path)  # is it there at all?
            else:
                entries = cast("list[dict[str, Any]]", fs.ls(path, detail=True))
            files = [_info(fs, entry) for entry in entries if entry["type"] == "file"]
            folders = [str(fs.unstrip_protocol(entry["name"])) for entry in entries if entry["type"] == "directory"]
            return [file for file in files if wanted(addresses.name_of(file.uri))], folders

        return self._ask(uri, listed)

    def matching(self, uri: str) -> list[ObjectInfo]:
        def matched() -> list[ObjectInfo]:
            fs, path = self._fs(uri)
            found = cast("dict[str, dict[str, Any]]", fs.glob(path, detail=True))
            return [_info(fs, entry) for entry in found.values() if entry["type"] == "file"]

        return self._ask(uri, matched)

    def read(self, uri: str) -> bytes:
        def content() -> bytes:
            fs, path = self._fs(uri)
            return cast(bytes, fs.cat_file(path))

        return self._ask(uri, content)

    def part(self, uri: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to `end`.

        Raises:
            StorageError: they can't be had.
        """

        def content() -> bytes:
            fs, path = self._fs(uri)
            found = cast(bytes, fs.cat_file(path, start=start, end=end))
            if len(found) != end - start:
                raise OSError(f"{len(found):,} bytes instead of {end - start:,}")
            return found

        return self._ask(uri, content)

    def write(self, uri: str, content: bytes) -> None:
        def written() -> None:
            fs, path = self._fs(uri)
            fs.pipe_file(path, content)

        self._ask(uri, written)

    def current(self, uri: str) -> Current:
        try:
            return Current(self.read(uri), None)
        except MissingError:
            return Current(None, None)

    def replace(self, uri: str, current: Current, content: bytes) -> bool:  # noqa: ARG002
        self.write(uri, content)
        return True

    def put(self, uri: str, path: str) -> None:
        def copied() -> None:
            fs, target = self._fs(uri)
            fs.put_file(path, target)

        self._ask(uri, copied)

    def fetch(self, uri: str, path: str) -> None:
        """Copies a file to a local path.

        Raises:
            StorageError: it can't be had.
        """

        def copied() -> None:
            fs, source = self._fs(uri)
            fs.get_file(source, path)

        self._ask(uri, copied)

    def stream(self, uri: str, write: Callable[[BinaryIO], T]) -> T:
        def written() -> T:
            fs, path = self._fs(uri)
            with fs.open(path, "wb") as file:
                return write(cast(BinaryIO, file))

        return self._ask(uri, written)

    @contextlib.contextmanager
    def opened(self, uri: str) -> Generator[BinaryIO]:
        with storage_errors(uri):
            fs, path = self._fs(uri)
            with fs.open(path, "rb") as file:
                yield cast(BinaryIO, file)

    def remove(self, uri: str) -> None:
        def removed() -> None:
            fs, path = self._fs(uri)
            fs.rm(path, recursive=True)

        self._ask(uri, removed)

    def _fs(self, uri: str) -> tuple[AbstractFileSystem, str]:
        own = {
            name: value
            for name, value in revealed(self.options).items()
            if name not in ("timeout_s", "region", "mirrors")
        }
        try:
            # A listing must show what another process wrote a second ago, so no listing is cached.
            return url_to_fs(uri, **own, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"{uri}: no storage for this address ({error}); install the fsspec package for it"
            ) from error

    def _ask(self, uri: str, call: Callable[[], T]) -> T:
        with _LOCK:
            patience = _PATIENCE.setdefault(addresses.split(uri)[0], Patience())
        return patience.ask(uri, call)[0]


class OtherRanges:
    """As `streaming.storage.ranges.Ranges` describes, of a file whose size is known; read when it is waited for."""

    tag = ""

    def __init__(self, uri: str, size: int, options: StorageOptions | None) -> None:
        self.size, self._uri, self._files = size, uri, OtherFiles(options or {})

    def begin(self, spans: Sequence[tuple[int, int]], count: Counters = UNCOUNTED) -> _OtherPart:
        count.requests += len(spans)
        count.nbytes += sum(end - start for start, end in spans)
        return _OtherPart(self, spans)

    def locate(self, offset: int) -> tuple[str, int]:
        return self._uri, offset

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`.

        Raises:
            StorageError: they can't be had.
        """
        return self._files.part(self._uri, start, end)


@dataclass(frozen=True, slots=True)
class _OtherPart:
    ranges: OtherRanges
    spans: Sequence[tuple[int, int]]

    def when_ready(self, call: Callable[[], object]) -> None:
        call()

    def wait(self) -> list[bytes]:
        return [self.ranges.read(start, end) for start, end in self.spans]


def _info(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> ObjectInfo:
    etag = entry.get("ETag") or entry.get("etag")
    times = ("mtime", "LastModified", "last_modified", "Last-Modified")
    changed = next((entry[name] for name in times if entry.get(name)), "")
    version = object_version(str(etag), None) if etag else repr(changed)
    return ObjectInfo(str(fs.unstrip_protocol(entry["name"])), int(entry.get("size") or 0), version)
