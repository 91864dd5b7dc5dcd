"""A storage as fsspec's users want it: Ray Train keeps notes of its own in a run's folder."""

from __future__ import annotations

import io
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from streaming.errors import MissingError
from streaming.storage import addresses, clients, objects
from streaming.storage.object_info import ObjectInfo


class _Note(io.BytesIO):
    """A small file that is written, whole, when it is closed."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._uri, self._options = uri, options

    def close(self) -> None:
        if not self.closed:
            objects.write_bytes(self._uri, self.getvalue(), self._options)
        super().close()


class _Notes(AbstractFileSystem):
    """What all others here do with a storage, under fsspec's names; there are no folders to be made."""

    cachable = False

    def __init__(self, kind: str, storage_options: dict[str, Any]) -> None:
        super().__init__()
        self._kind, self._given = kind, storage_options

    def _uri(self, path: str) -> str:
        return f"{self._kind}://{path}"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            return self._entry(objects.stat(self._uri(path), self._given))
        except MissingError:
            if objects.exists(self._uri(path), self._given):
                return {"name": path, "size": 0, "type": "directory"}
            raise FileNotFoundError(path) from None

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        names = [addresses.join(path, name) for name in objects.list_names(self._uri(path), self._given)]
        return [self.info(name) for name in names] if detail else names

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        del recursive, maxdepth
        objects.remove(self._uri(path), self._given)

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if mode == "wb":
            return _Note(self._uri(path), self._given)
        try:
            return io.BytesIO(objects.read_bytes(self._uri(path), self._given))
        except MissingError:
            raise FileNotFoundError(path) from None

    def _entry(self, info: ObjectInfo) -> dict[str, Any]:
        return {"name": info.uri.split("://", 1)[1], "size": info.size, "type": "file"}


def filesystem(uri: str, storage_options: clients.StorageOptions | None = None) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of a URI and the path within it.

    Raises:
        StorageError: the options make no sense.
    """
    if not clients.has_store(uri):
        return url_to_fs(addresses.canonical(uri))
    kind, path = addresses.canonical(uri).split("://", 1)
    clients.check(uri, storage_options or {})
    return _Notes(kind, dict(storage_options or {})), path
