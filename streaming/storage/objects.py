"""Files and objects by URI: listed, read, written whole or not at all, with errors of one line.

`clients` tells what a URI and its `storage_options` may be.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import obstore.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from streaming.errors import StorageError, UnreachableError
from streaming.storage.clients import StorageOptions, filesystem, settings_of

# Packages behind fsspec's, which may not be installed: their errors are known by where they come from.
_FOREIGN = ("aiohttp", "azure", "gcsfs", "google")
# What s3fs makes of a server that throttles (429 and 503) or is in trouble.
_IN_TROUBLE = (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO))


def patient(passes: Callable[[BaseException], bool]) -> Retrying:
    """Tries again for five minutes what fails by an error that passes, with backoff and jitter (AWS's advice).

    So long, because a tile that is given up while storage hangs would make a run another one.
    """
    return Retrying(
        retry=retry_if_exception(passes),
        wait=wait_random_exponential(multiplier=0.1, max=15),
        stop=stop_after_delay(300),
        reraise=True,
    )


PATIENT = patient(lambda error: isinstance(error, UnreachableError))
"""`PATIENT(function, *arguments)` calls it again while storage can't be reached: an outage must not end a job."""


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object: where it is and what tells its version (ETag where there is one, else the modification time)."""

    uri: str
    size: int
    version: str
    files: tuple[ObjectInfo, ...] = field(default=(), compare=False, repr=False)
    """of a slide of several: these, the one that is opened first; where they are known"""

    @property
    def digest(self) -> str:
        """SHA-256 of all three, in hex: names what is made of just this version."""
        return hashlib.sha256(f"{self.uri}\n{self.version}\n{self.size}".encode()).hexdigest()


def is_local(uri: str) -> bool:
    """Whether a URI names a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """The absolute path of a local URI."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))


def canonical(uri: str) -> str:
    """The same address in one spelling: local paths absolute, no trailing slash."""
    return local_path(uri) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *names: str) -> str:
    """A URI below another."""
    return posixpath.join(uri.rstrip("/") or "/", *names)


def name_of(uri: str) -> str:
    """The last part of a URI: a file's name with its suffix."""
    return posixpath.basename(uri.rstrip("/"))


def relative_name(file: ObjectInfo, main: ObjectInfo) -> str:
    """A file's path from the folder of the main one of those that belong together."""
    return file.uri.removeprefix(posixpath.dirname(main.uri) + "/")


@contextlib.contextmanager
def storage_errors(uri: str) -> Generator[None]:
    """Turns what storage libraries raise into a StorageError with the remedy: an UnreachableError if it may pass."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        no_bucket = any(sign in str(error) for sign in ("NoSuchBucket", "bucket does not exist"))
        what = "the bucket does not exist" if no_bucket else "not found"
        raise StorageError(f"{uri}: {what}; check the address and the endpoint") from error
    except PermissionError as error:
        raise StorageError(f"{uri}: access denied; check the credentials and their rights ({error})") from error
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise StorageError(f"{uri}: access denied; check the credentials and their rights") from error
    except obstore.exceptions.BaseError as error:
        text = " ".join(str(error).split("Debug source")[0].split())
        raise StorageError(f"{uri}: {text}; check {settings_of(uri)} and the network") from error
    except (BotoCoreError, ClientError) as error:
        text = " ".join(str(error).split())
        if "credentials" in text.lower():
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage_options"
            raise StorageError(f"{uri}: {text}; {remedy}") from error
        raise UnreachableError(f"{uri}: {text}; check AWS_ENDPOINT_URL, AWS_REGION and the network") from error
    except (OSError, ConnectionError, TimeoutError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        passes = isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _IN_TROUBLE
        kind = UnreachableError if passes and not is_local(uri) else StorageError
        raise kind(f"{uri}: {text}; check that the storage answers and has room") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _FOREIGN:
            raise
        text = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise StorageError(f"{uri}: {text}; check {settings_of(uri)} and the network") from error


def _info(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> ObjectInfo:
    etag = entry.get("ETag") or entry.get("etag")
    times = ("mtime", "LastModified", "last_modified", "Last-Modified")
    changed = next((entry[name] for name in times if entry.get(name)), "")
    version = str(etag).strip('"') if etag else repr(changed)
    uri = str(entry["name"]) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(entry["name"]))
    if uri.startswith("abfs://"):
        uri = f"az://{uri.removeprefix('abfs://')}"  # one spelling for Azure's three, that of the documentation
    return ObjectInfo(uri=uri, size=int(entry.get("size") or 0), version=version)


def stat(uri: str, storage_options: StorageOptions | None = None) -> ObjectInfo:
    """Size and version of one object.

    Raises:
        StorageError: it does not exist or can't be reached.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        return _info(fs, fs.info(path))


def exists(uri: str, storage_options: StorageOptions | None = None) -> bool:
    """Whether there is an object or folder at the URI.

    Raises:
        StorageError: the storage can't be reached, the bucket does not exist, or access is denied.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            fs.info(path)
        except FileNotFoundError:
            return False
        return True


def expand(uri: str, storage_options: StorageOptions | None = None) -> tuple[list[ObjectInfo], bool]:
    """The objects that a file, folder, prefix or glob names, sorted, and whether it was one file named outright.

    Raises:
        StorageError: nothing is there, or it can't be reached.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        if glob.has_magic(path) and not fs.exists(path):
            found: dict[str, Any] = fs.glob(path, detail=True)  # type: ignore[assignment]
            if not found:
                raise StorageError(f"{uri}: no file matches; check the pattern (and quote it for the shell)")
            return sorted((_info(fs, e) for e in found.values() if e["type"] == "file"), key=lambda o: o.uri), False
        entry = fs.info(path)
        if entry["type"] == "file":
            return [_info(fs, entry)], True
        below: dict[str, Any] = fs.find(path, detail=True)  # type: ignore[assignment]
        # S3 marks an empty "folder" with an object whose name ends in a slash.
        files = [_info(fs, e) for name, e in below.items() if not name.endswith("/")]
        return sorted(files, key=lambda o: o.uri), False


def list_names(uri: str, storage_options: StorageOptions | None = None) -> list[str]:
    """Names of the entries directly below a folder; empty when there is none."""
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            return sorted(name_of(str(name)) for name in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def list_files(
    uri: str, wanted: Callable[[str], bool], storage_options: StorageOptions | None = None
) -> list[ObjectInfo]:
    """The files directly below a folder whose names are wanted, sorted; none where there is no folder.

    Raises:
        StorageError: it can't be listed.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            entries: list[dict[str, Any]] = fs.ls(path, detail=True)  # type: ignore[assignment]
        except (FileNotFoundError, NotADirectoryError):
            return []
        found: dict[str, dict[str, Any]] = {}
        for entry in entries:
            name = name_of(str(entry["name"]))
            # A key of an object store may be called like the folder above.
            if entry["type"] == "file" and name not in ("", ".", "..") and wanted(name):
                found[str(entry["name"])] = entry
        # A listing over HTTP tells no sizes.
        infos = [_info(fs, e if e.get("size") is not None else fs.info(name)) for name, e in found.items()]
        return sorted(infos, key=lambda info: info.uri)


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """The whole content of an object.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        content = fs.cat_file(path)
        assert isinstance(content, bytes), "cat_file gives bytes unless asked for text"
        return content


@contextlib.contextmanager
def _target(uri: str, storage_options: StorageOptions | None) -> Generator[tuple[AbstractFileSystem, str]]:
    """Where to write an object: its filesystem, and the path there; for a local one as `whole_file`."""
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        with whole_file(path) if isinstance(fs, LocalFileSystem) else contextlib.nullcontext(path) as target:
            yield fs, target


def write_bytes(uri: str, content: bytes, storage_options: StorageOptions | None = None) -> None:
    """Writes an object whole or not at all: a put is atomic in object stores, a rename is on disks.

    Raises:
        StorageError: it can't be written.
    """
    with _target(uri, storage_options) as (fs, path):
        fs.pipe_file(path, content)


@contextlib.contextmanager
def writing(uri: str, storage_options: StorageOptions | None = None) -> Generator[BinaryIO]:
    """A file to write an object of any size into, piece by piece; a local one appears when the block ends well.

    A remote one that breaks off may be left cut short, so a note written after it must vouch for it.

    Raises:
        StorageError: it can't be written.
    """
    with _target(uri, storage_options) as (fs, path), fs.open(path, "wb") as file:
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def reading(uri: str, storage_options: StorageOptions | None = None) -> Generator[BinaryIO]:
    """A file to read an object from, piece by piece.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        with fs.open(path, "rb") as file:
            yield cast(BinaryIO, file)


@contextlib.contextmanager
def whole_file(path: str) -> Generator[str]:
    """A temporary path beside a local one, renamed to it when the block ends well and removed when it does not."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.part-{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def written_file(uri: Callable[[], str], storage_options: StorageOptions | None = None) -> Generator[str]:
    """A local path to write a large object to, which appears whole under its address when the block ends well.

    The address is asked for at the end, so that it may tell the content. Storage that can't be reached is waited for.

    Raises:
        StorageError: it can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="tilestream-") as folder:
        path = os.path.join(folder, "file")
        yield path
        PATIENT(_put, path, uri(), storage_options)


def _put(path: str, uri: str, storage_options: StorageOptions | None) -> None:
    with _target(uri, storage_options) as (fs, target):
        if isinstance(fs, LocalFileSystem):
            shutil.move(path, target)  # on the same disk, no byte is copied
        else:
            fs.put_file(path, target)


def remove(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Removes an object, or a folder with all below it; nothing there is fine."""
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def read_table(uri: str, storage_options: StorageOptions | None = None) -> pa.Table:
    """A Parquet file as an Arrow table.

    Raises:
        StorageError: it does not exist, can't be read, or is no Parquet.
    """
    content = read_bytes(uri, storage_options)
    try:
        return pq.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri}: not a whole Parquet file ({error}); write it again") from error


def write_table(uri: str, table: pa.Table, storage_options: StorageOptions | None = None) -> None:
    """Writes an Arrow table as Parquet, whole or not at all.

    Raises:
        StorageError: it can't be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes(), storage_options)
