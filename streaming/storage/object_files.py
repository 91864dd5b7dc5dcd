"""Files in buckets and behind web servers: obstore carries their bytes."""

from __future__ import annotations

import contextlib
import glob
import io
import posixpath
import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import urljoin

import obstore
from fsspec.utils import glob_translate
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from streaming.errors import MissingError
from streaming.storage import addresses, trouble
from streaming.storage.addresses import HTTP, S3, is_plain
from streaming.storage.buckets import Bucket, bucket_at
from streaming.storage.clients import StorageOptions
from streaming.storage.files import Current
from streaming.storage.object_info import ObjectInfo, object_version
from streaming.storage.range_file import opened
from streaming.storage.ranges import head, open_remote

if TYPE_CHECKING:
    from obstore import ObjectMeta, WritableFile  # there are none at run time

T = TypeVar("T")

# S3 takes 10,000 parts, so up to 80 GB; four at once are through a line of 2 Mbit/s before the storage seems silent.
_PART_NBYTES = 8 * 2**20
_PARTS_AT_ONCE = 4
_STATS_AT_ONCE = 16


@dataclass(frozen=True)
class ObjectFiles:
    """As `Files` describes."""

    options: StorageOptions

    def stat(self, uri: str) -> ObjectInfo:
        bucket, key = bucket_at(uri, self.options)
        if not key and not bucket.root.startswith(HTTP):
            raise MissingError(f"{uri}: a bucket, not a file in it; name one")
        return bucket.ask(uri, lambda: _stat(bucket, key, addresses.canonical(uri)))[0]

    def below(
        self, uri: str, *, deep: bool, wanted: Callable[[str], bool] = lambda _: True
    ) -> tuple[list[ObjectInfo], list[str]]:
        bucket, key = bucket_at(uri, self.options)
        if bucket.root.startswith(HTTP):
            return self._linked(addresses.canonical(uri), wanted)
        found = _listed_s3(bucket, key, deep=deep) if bucket.root.startswith(S3) else _listed(bucket, key, deep=deep)
        if found.is_empty and key:
            raise MissingError(f"{uri}: not found; check the address and the endpoint")
        return [file for file in found.files if wanted(addresses.name_of(file.uri))], found.folders

    def matching(self, uri: str) -> list[ObjectInfo]:
        fixed, below = _fixed_part(uri)
        try:
            files, _ = self.below(fixed, deep="/" in below or "**" in below)
        except MissingError:
            return []
        wanted = re.compile(glob_translate(addresses.canonical(fixed) + "/" + below))
        return [file for file in files if wanted.match(file.uri)]

    def read(self, uri: str) -> bytes:
        bucket, key = bucket_at(uri, self.options)
        return bucket.ask(uri, lambda: _read(bucket, key))[0]

    def write(self, uri: str, content: bytes) -> None:
        bucket, key = bucket_at(uri, self.options)
        bucket.ask(uri, lambda: obstore.put(bucket.uploads, key, content, **_parts()))

    def current(self, uri: str) -> Current:
        bucket, key = bucket_at(uri, self.options)

        try:
            return bucket.ask(uri, lambda: _current(bucket, key))[0]
        except MissingError:
            return Current(None, None)

    def replace(self, uri: str, current: Current, content: bytes) -> bool:
        bucket, key = bucket_at(uri, self.options)
        mode: Any = "create" if current.version is None else current.version

        def replaced() -> bool:
            try:
                obstore.put(bucket.uploads, key, content, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                # Or it was written by a request whose answer was lost.
                with contextlib.suppress(FileNotFoundError):
                    return obstore.get(bucket.store, key).bytes().to_bytes() == content
                return False
            except FileNotFoundError:
                if current.version is None:
                    raise  # no bucket
                return False
            except BaseError as error:
                if not trouble.takes_no_conditions(error):
                    raise
                # What another process writes between these two lines is lost.
                with contextlib.suppress(FileNotFoundError):
                    if _current(bucket, key).version != current.version:
                        return False
                obstore.put(bucket.uploads, key, content, use_multipart=False)
            return True

        return bucket.ask(uri, replaced)[0]

    def put(self, uri: str, path: str) -> None:
        bucket, key = bucket_at(uri, self.options)
        bucket.ask(uri, lambda: obstore.put(bucket.uploads, key, Path(path), **_parts()))

    def stream(self, uri: str, write: Callable[[BinaryIO], T]) -> T:
        bucket, key = bucket_at(uri, self.options)

        def written() -> T:
            file = obstore.open_writer(bucket.uploads, key, buffer_size=_PART_NBYTES, max_concurrency=_PARTS_AT_ONCE)
            try:
                result = write(cast(BinaryIO, _Copying(file)))
                file.close()  # only now, and only if all went well, is it there
            except OSError as error:
                if not trouble.answered(error):
                    # obstore's files do not tell why a server was not reached: a certificate, a name.
                    with contextlib.suppress(FileNotFoundError, PermissionDeniedError, UnauthenticatedError):
                        head(bucket, key)
                raise
            return result

        return bucket.ask(uri, written)[0]

    @contextlib.contextmanager
    def opened(self, uri: str) -> Generator[BinaryIO]:
        ranges = open_remote(uri, self.options)
        yield cast(BinaryIO, io.BytesIO(self.read(uri)) if ranges is None else opened(ranges))

    def remove(self, uri: str) -> None:
        bucket, key = bucket_at(uri, self.options)
        below = list[ObjectInfo]()
        with contextlib.suppress(MissingError):
            below, _ = self.below(uri, deep=True)
        keys = [key, *(addresses.split(file.uri)[1] for file in below)]
        if bucket.root.startswith(S3):
            for start in range(0, len(keys), 1000):
                gone = {"Objects": [{"Key": each} for each in keys[start : start + 1000]], "Quiet": True}
                bucket.ask(uri, lambda gone=gone: bucket.s3_client.delete_objects(**bucket.s3_object(), Delete=gone))
            return
        for each in keys:
            with contextlib.suppress(MissingError):
                bucket.ask(uri, lambda each=each: obstore.delete(bucket.uploads, each))

    def _linked(self, folder: str, wanted: Callable[[str], bool]) -> tuple[list[ObjectInfo], list[str]]:
        """What the index page of a web server's folder links to, of what lies in that folder."""
        page = Bucket(f"{folder}/", self.options)  # obstore's paths end in no slash, without which links lead elsewhere
        content, _ = page.ask(folder, lambda: _read(page, ""))
        links = _Links()
        links.feed(content.decode("utf-8", "replace"))
        files, folders = set[str](), set[str]()
        for href in links.hrefs:
            absolute = urljoin(f"{folder}/", href)
            uri = addresses.canonical(absolute)
            if "?" not in uri and uri.rpartition("/")[0] == folder:
                (folders if absolute.endswith("/") else files).add(uri)
        # A page tells no sizes.
        with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
            found = list(pool.map(self.stat, sorted(uri for uri in files if wanted(addresses.name_of(uri)))))
        return found, sorted(folders)


def fetch_whole(uri: str, options: StorageOptions | None, path: str) -> None:
    """Copies an object to a local file in one answer, for servers that give no parts of it.

    Raises:
        StorageError: it can't be had.
    """
    bucket, key = bucket_at(uri, options)

    def copied() -> None:
        with open(path, "wb") as file:
            for piece in obstore.get(bucket.store, key).stream(min_chunk_size=2**20):
                file.write(piece)

    bucket.ask(uri, copied)


class _Copying:
    """obstore's file for writing, which keeps what it is given until it is sent: by then it may be something else."""

    def __init__(self, file: WritableFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PART_NBYTES):
            self._file.write(bytes(view[start : start + _PART_NBYTES]))
        return len(view)

    def flush(self) -> None:
        """Nothing: parts go out as they are full."""


class _Links(HTMLParser):
    """The links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for name, value in attrs if tag == "a" and name == "href" and value]


@dataclass
class _Listing:
    files: list[ObjectInfo] = field(default_factory=list[ObjectInfo])
    folders: list[str] = field(default_factory=list[str])
    is_empty: bool = True
    """whether not even an object is there that stands for the folder"""


def _listed_s3(bucket: Bucket, key: str, *, deep: bool) -> _Listing:
    """The objects below a key, by botocore: obstore lists none where one of them has a key that it can't ask for."""
    asked = {"Prefix": f"{key}/" if key else ""} | ({} if deep else {"Delimiter": "/"})
    found, uri = _Listing(), addresses.join(bucket.root, key)
    while True:
        page, _ = bucket.ask(uri, lambda: bucket.s3_client.list_objects_v2(**bucket.s3_object(**asked)))
        for entry in page.get("Contents", ()):
            found.is_empty = False
            # An empty "folder" is an object whose name ends in a slash.
            if not entry["Key"].endswith("/"):
                version = object_version(entry.get("ETag"), entry.get("LastModified"))
                found.files.append(ObjectInfo(f"{bucket.root}/{entry['Key']}", entry["Size"], version))
        found.folders += [f"{bucket.root}/{entry['Prefix'].rstrip('/')}" for entry in page.get("CommonPrefixes", ())]
        if not page.get("IsTruncated"):
            found.is_empty = found.is_empty and not found.folders
            return found
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _listed(bucket: Bucket, key: str, *, deep: bool) -> _Listing:
    """The objects below a key of Azure or Google."""
    uri = addresses.join(bucket.root, key)
    if deep:
        metas, _ = bucket.ask(uri, lambda: [m for page in obstore.list(bucket.store, prefix=key or None) for m in page])
        folders = list[str]()
    else:
        found, _ = bucket.ask(uri, lambda: obstore.list_with_delimiter(bucket.store, prefix=key or None))
        metas, folders = list(found["objects"]), list(found["common_prefixes"])
    # An empty object beside a "folder" of its name stands for the folder.
    above = {key, *folders, *(parent for meta in metas for parent in _parents(meta["path"]))}
    files = [_info(bucket, meta) for meta in metas if meta["size"] or meta["path"] not in above]
    return _Listing(files, [f"{bucket.root}/{folder}" for folder in folders], not metas and not folders)


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _info(bucket: Bucket, meta: ObjectMeta) -> ObjectInfo:
    version = object_version(meta["e_tag"], meta["last_modified"])
    return ObjectInfo(f"{bucket.root}/{meta['path']}", meta["size"], version)


def _stat(bucket: Bucket, key: str, uri: str) -> ObjectInfo:
    if not is_plain(key):
        found = bucket.s3_client.head_object(**bucket.s3_object(Key=key))
        return ObjectInfo(uri, found["ContentLength"], object_version(found.get("ETag"), found.get("LastModified")))
    meta = head(bucket, key)
    return ObjectInfo(uri, meta["size"], object_version(meta["e_tag"], meta["last_modified"]))


def _current(bucket: Bucket, key: str) -> Current:
    found = obstore.get(bucket.store, key)
    version = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]}
    return Current(found.bytes().to_bytes(), version)


def _read(bucket: Bucket, key: str) -> bytes:
    if not is_plain(key):
        return bucket.s3_client.get_object(**bucket.s3_object(Key=key))["Body"].read()
    return obstore.get(bucket.store, key).bytes().to_bytes()


def _parts() -> Any:
    return {"chunk_size": _PART_NBYTES, "max_concurrency": _PARTS_AT_ONCE}


def _fixed_part(uri: str) -> tuple[str, str]:
    """The folder in which all lies that a glob matches, and the pattern below it."""
    parts = uri.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]), "/".join(parts[first:])
