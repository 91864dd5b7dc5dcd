"""Files and objects by URI: listed, read, written whole or not at all, with errors of one line.

`addresses` tells how a URI is spelled, `clients` which options it takes, `object_info` what its version is, `trouble`
which errors pass, and `patience` how long they are waited for. What is wanted of a storage is `files.Files`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Callable, Generator
from typing import BinaryIO, TypeVar

from streaming.errors import MissingError, StorageError
from streaming.storage import addresses, clients
from streaming.storage.addresses import folder_of, is_local, name_of, shown
from streaming.storage.clients import StorageOptions
from streaming.storage.files import Current, Files
from streaming.storage.local_files import LocalFiles
from streaming.storage.object_files import ObjectFiles
from streaming.storage.object_info import ObjectInfo
from streaming.storage.other_files import OtherFiles

T = TypeVar("T")


def _files(uri: str, options: StorageOptions | None, left_out: dict[str, str] | None = None) -> Files:
    """Where a URI's files are."""
    if is_local(uri):
        return LocalFiles({} if left_out is None else left_out)
    return ObjectFiles(options or {}) if clients.has_store(uri) else OtherFiles(options or {})


def stat(uri: str, storage_options: StorageOptions | None = None) -> ObjectInfo:
    """Size and version of one object.

    Raises:
        StorageError: it does not exist or can't be reached.
    """
    return _files(uri, storage_options).stat(uri)


def exists(uri: str, storage_options: StorageOptions | None = None) -> bool:
    """Whether there is an object or folder at the URI.

    Raises:
        StorageError: the storage can't be reached, or access is denied.
    """
    files = _files(uri, storage_options)
    with contextlib.suppress(MissingError):
        files.stat(uri)
        return True
    with contextlib.suppress(MissingError):
        files.below(uri, deep=False, wanted=lambda _: False)
        return True
    return False


def expand(
    uri: str, storage_options: StorageOptions | None = None, left_out: dict[str, str] | None = None
) -> tuple[list[ObjectInfo], bool]:
    """The objects that a file, folder, prefix or glob names, sorted, and whether it was one file named outright.

    To `left_out` is added, by path, why what else a disk has there is no file: pipes, links to nothing, closed folders.

    Raises:
        StorageError: nothing is there, or it can't be reached.
    """
    if addresses.has_secret(uri):
        raise StorageError(
            f"{shown(uri)}: the address has a query or a password, which would end up in files; give the query as the "
            "storage option query=…, a password as headers=… (of other than web servers, password=…)"
        )
    files = _files(uri, storage_options, left_out)
    with contextlib.suppress(MissingError):
        info = files.stat(uri)
        # Some tools put an empty object beside the "folder" of its name.
        if info.size or is_local(uri) or not _beside(files, uri):
            return [info], True
    try:
        found, _ = files.below(uri, deep=True)
    except MissingError:
        # Only now, for a folder may be called `a [1]`.
        if not glob.has_magic(uri):
            raise
        found = files.matching(uri)
        if not found:
            raise MissingError(f"{uri}: no file matches; check the pattern (and quote it for the shell)") from None
    return sorted(found, key=lambda info: info.uri), False


def _beside(files: Files, uri: str) -> bool:
    with contextlib.suppress(MissingError):
        found, folders = files.below(uri, deep=False)
        return bool(found or folders)
    return False


def list_names(uri: str, storage_options: StorageOptions | None = None) -> list[str]:
    """Names of the entries directly below a folder; empty when there is none."""
    with contextlib.suppress(MissingError):
        files, folders = _files(uri, storage_options).below(uri, deep=False)
        return sorted({*(name_of(info.uri) for info in files), *(name_of(folder) for folder in folders)})
    return []


def list_files(
    uri: str, wanted: Callable[[str], bool], storage_options: StorageOptions | None = None
) -> list[ObjectInfo]:
    """The files directly below a folder whose names are wanted, sorted; none where there is no folder.

    Raises:
        StorageError: it can't be listed.
    """
    with contextlib.suppress(MissingError):
        found, _ = _files(uri, storage_options).below(uri, deep=False, wanted=_names(wanted))
        return sorted(found, key=lambda info: info.uri)
    return []


def list_beside(
    uri: str, wanted: Callable[[str], bool], storage_options: StorageOptions | None = None
) -> list[ObjectInfo]:
    """The files in the folder of another one whose names are wanted, sorted.

    Raises:
        StorageError: it can't be listed.
    """
    folder = folder_of(uri)
    # Of S3's `a//b` the folder `a/` can't be addressed, but the one above it.
    is_nameless = folder.endswith("/")
    with contextlib.suppress(MissingError):
        found, _ = _files(uri, storage_options).below(folder or "/", deep=is_nameless, wanted=_names(wanted))
        return sorted((info for info in found if folder_of(info.uri) == folder), key=lambda info: info.uri)
    return []


def _names(wanted: Callable[[str], bool]) -> Callable[[str], bool]:
    # A key of an object store may be called like the folder above.
    return lambda name: name not in ("", ".", "..") and wanted(name)


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """The whole content of an object.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    return _files(uri, storage_options).read(uri)


def write_bytes(uri: str, content: bytes, storage_options: StorageOptions | None = None) -> None:
    """Writes an object whole or not at all: a put is atomic in object stores, a rename is on disks.

    Raises:
        StorageError: it can't be written.
    """
    _files(uri, storage_options).write(uri, content)


def read_current(uri: str, storage_options: StorageOptions | None = None) -> Current:
    """An object as it is now, for `replace`.

    Raises:
        StorageError: it can't be read.
    """
    return _files(uri, storage_options).current(uri)


def replace(uri: str, current: Current, content: bytes, storage_options: StorageOptions | None = None) -> bool:
    """Writes an object if it still is as it was when it was read, and says whether it was.

    Disks, S3, Azure and Google compare both in one step; S3's likes that refuse to, in two. What only fsspec knows
    can't: there it is written anyway.

    Raises:
        StorageError: it can't be written.
    """
    return _files(uri, storage_options).replace(uri, current, content)


def write_stream(uri: str, write: Callable[[BinaryIO], T], storage_options: StorageOptions | None = None) -> T:
    """What `write` returns, which writes an object of any size piece by piece into the file that it is given.

    It appears when all is written. If the storage fails meanwhile, `write` is called anew.

    Raises:
        StorageError: it can't be written.
    """
    return _files(uri, storage_options).stream(uri, write)


@contextlib.contextmanager
def reading(uri: str, storage_options: StorageOptions | None = None) -> Generator[BinaryIO]:
    """A file to read an object from, piece by piece.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    with _files(uri, storage_options).opened(uri) as file:
        yield file


@contextlib.contextmanager
def written_file(uri: Callable[[], str], storage_options: StorageOptions | None = None) -> Generator[str]:
    """A local path to write a large object to, which appears whole under its address when the block ends well.

    The address is asked for at the end, so that it may tell the content.

    Raises:
        StorageError: it can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="tilestream-") as folder:
        path = os.path.join(folder, "file")
        yield path
        target = uri()
        _files(target, storage_options).put(target, path)


def remove(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Removes an object, or a folder with all below it; nothing there is fine."""
    with contextlib.suppress(MissingError):
        _files(uri, storage_options).remove(uri)
