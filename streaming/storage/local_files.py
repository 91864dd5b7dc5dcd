"""Files of this machine's disks, and of what is mounted there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from fsspec.utils import glob_translate

from streaming.storage.addresses import local_path, shortened
from streaming.storage.files import Current
from streaming.storage.object_info import ObjectInfo, file_version
from streaming.storage.patience import Patience
from streaming.storage.trouble import storage_errors

T = TypeVar("T")

# A network's disk may be away for a while, too.
_PATIENCE = Patience()
_PATIENCE.reached = True


@dataclass(frozen=True)
class LocalFiles:
    """As `Files` describes. A link is what it points to: its size, its time, its folder's content."""

    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """To this is added, by path, why what a listing found is no file: a pipe, a link to nothing, a closed folder."""

    def stat(self, uri: str) -> ObjectInfo:
        path = local_path(uri)
        return _PATIENCE.ask(uri, lambda: _info(path, os.stat(path)))[0]

    def below(
        self, uri: str, *, deep: bool, wanted: Callable[[str], bool] = lambda _: True
    ) -> tuple[list[ObjectInfo], list[str]]:
        folder = local_path(uri)
        files, folders = _PATIENCE.ask(uri, lambda: _below(folder, self.left_out, deep=deep))[0]
        return [file for file in files if wanted(os.path.basename(file.uri))], folders

    def matching(self, uri: str) -> list[ObjectInfo]:
        pattern = local_path(uri)
        if "**" not in pattern:
            return self._regular(glob.glob(pattern))
        # glob would follow links in circles.
        fixed = pattern.partition("**")[0].rpartition("/")[0]
        roots = glob.glob(fixed) if glob.has_magic(fixed) else [fixed or "/"]
        wanted = re.compile(glob_translate(pattern))
        found = [info for root in roots if os.path.isdir(root) for info in self.below(root, deep=True)[0]]
        return [info for info in found if wanted.match(info.uri)]

    def read(self, uri: str) -> bytes:
        return _PATIENCE.ask(uri, lambda: Path(_regular_path(uri)).read_bytes())[0]

    def write(self, uri: str, content: bytes) -> None:
        self.stream(uri, lambda file: file.write(content))

    def current(self, uri: str) -> Current:
        def opened() -> Current:
            try:
                with open(_regular_path(uri), "rb") as file:
                    return Current(file.read(), _identity(os.fstat(file.fileno())))
            except FileNotFoundError:
                return Current(None, None)

        return _PATIENCE.ask(uri, opened)[0]

    def replace(self, uri: str, current: Current, content: bytes) -> bool:
        path = local_path(uri)

        def replaced() -> bool:
            with _locked(os.path.dirname(path)):
                there = _identity(os.stat(path)) if os.path.exists(path) else None
                if there != current.version:
                    return False
                with whole_file(path) as temporary:
                    Path(temporary).write_bytes(content)
                return True

        return _PATIENCE.ask(uri, replaced)[0]

    def put(self, uri: str, path: str) -> None:
        with storage_errors(uri), whole_file(local_path(uri)) as temporary:
            shutil.move(path, temporary)  # on the same disk, no byte is copied

    def stream(self, uri: str, write: Callable[[BinaryIO], T]) -> T:
        def written() -> T:
            with whole_file(local_path(uri)) as temporary, open(temporary, "wb") as file:
                return write(file)

        return _PATIENCE.ask(uri, written)[0]

    @contextlib.contextmanager
    def opened(self, uri: str) -> Generator[BinaryIO]:
        with storage_errors(uri), open(_regular_path(uri), "rb") as file:
            yield cast(BinaryIO, file)

    def remove(self, uri: str) -> None:
        path = local_path(uri)
        with storage_errors(uri):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)

    def _regular(self, paths: list[str]) -> list[ObjectInfo]:
        found = list[ObjectInfo]()
        for path in paths:
            try:
                if os.path.isdir(path):
                    self.left_out[path] = "folders, which a pattern does not enter"
                else:
                    found.append(_info(path, os.stat(path)))
            except OSError as error:
                self.left_out[path] = _why_not(error)
        return found


@contextlib.contextmanager
def _locked(folder: str) -> Generator[None]:
    """Keeps others of this machine, and of most network disks, from replacing a file of the folder meanwhile."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: str) -> Generator[str]:
    """A temporary path beside a local one, renamed to it when the block ends well and removed when it does not."""
    folder, name = os.path.split(path)
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = os.path.join(folder, f"{shortened(name)}.part-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(f"{path} is a folder")
    if not stat.S_ISREG(found.st_mode):
        # To open a pipe would wait for somebody who writes into it.
        raise OSError(errno.EINVAL, "no file, but a pipe, a socket or a device")
    return ObjectInfo(path, found.st_size, file_version(found))


def _regular_path(uri: str) -> str:
    path = local_path(uri)
    _info(path, os.stat(path))
    return path


def _why_not(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "links to nothing"
        case errno.ELOOP:
            return "links in a circle"
        case errno.EACCES | errno.EPERM:
            return "not ours to read"
        case _:
            return str(error.strerror)


def _below(folder: str, left_out: dict[str, str], *, deep: bool) -> tuple[list[ObjectInfo], list[str]]:
    files, folders = list[ObjectInfo](), list[str]()
    pending = [(folder, frozenset[tuple[int, int]]())]
    while pending:
        here, above = pending.pop()
        try:
            own = os.stat(here)
            entries = list(os.scandir(here))
        except OSError as error:
            if here == folder:
                raise
            left_out[here] = f"folders that can't be listed: {error.strerror}"
            continue
        for entry in entries:
            try:
                if not entry.is_dir():
                    files.append(_info(entry.path, entry.stat()))
                elif not deep:
                    folders.append(entry.path)
                elif _place(entry.stat()) not in above | {_place(own)}:
                    pending.append((entry.path, above | {_place(own)}))
                else:
                    left_out[entry.path] = "links to a folder above"
            except OSError as error:
                left_out[entry.path] = _why_not(error)
    return files, folders


def _place(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """What tells a file from the one that takes its place."""
    return *_place(found), found.st_size, found.st_mtime_ns
