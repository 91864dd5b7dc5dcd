"""What can be done with the files of a storage, whichever it is: the local disk, obstore's, or one of fsspec's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

from streaming.storage.object_info import ObjectInfo

T = TypeVar("T")


@dataclass(frozen=True)
class Current:
    """A file's content and what tells its version to its storage; both None where there is no file."""

    content: bytes | None
    version: Any


class Files(Protocol):
    """The files of a storage by their URIs.

    Each call is whole: it asks again what fails and may pass, for five minutes. All raise StorageError for what can't
    be had, and the MissingError among them where nothing is there.
    """

    def stat(self, uri: str) -> ObjectInfo:
        """Size and version of one file."""
        ...

    def below(
        self, uri: str, *, deep: bool, wanted: Callable[[str], bool] = lambda _: True
    ) -> tuple[Sequence[ObjectInfo], Sequence[str]]:
        """The files in a folder, with all those further down or else with the URIs of the folders in it, unsorted.

        Of the files, those whose names are wanted.
        """
        ...

    def matching(self, uri: str) -> Sequence[ObjectInfo]:
        """The files that a glob matches, unsorted."""
        ...

    def read(self, uri: str) -> bytes:
        """A file's content."""
        ...

    def write(self, uri: str, content: bytes) -> None:
        """Writes a file whole or not at all."""
        ...

    def current(self, uri: str) -> Current:
        """A file as it is now, if there is one."""
        ...

    def replace(self, uri: str, current: Current, content: bytes) -> bool:
        """Writes a file whole if it still is as it was, and says whether it was; fsspec's storages can't tell."""
        ...

    def put(self, uri: str, path: str) -> None:
        """Makes a local file that of the URI, whole or not at all; the local one may be gone afterwards."""
        ...

    def stream(self, uri: str, write: Callable[[BinaryIO], T]) -> T:
        """What `write` returns, which writes the file piece by piece, and is called anew if the storage fails it."""
        ...

    def opened(self, uri: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to read from, here and there."""
        ...

    def remove(self, uri: str) -> None:
        """Removes a file, and a folder with all below it."""
        ...
