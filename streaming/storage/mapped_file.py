"""A large file whose name tells its content, mapped into memory; a remote one by a copy that comes part by part."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streaming.errors import StorageError
from streaming.storage.addresses import is_local, local_path
from streaming.storage.clients import StorageOptions
from streaming.storage.object_info import ObjectInfo
from streaming.storage.ranges import Span
from streaming.storage.sparse_copy import RemoteFile, SparseCopy
from streaming.storage.staging import Staging

# Mapped pages count as the process's memory until they are let go of, and each place that is read brings in some 100 KB
# of them, since the kernel maps what lies around. In a file below this size there is nothing to win by letting go.
_LARGE = 2**26


@dataclass(frozen=True, slots=True)
class _Mapped:
    memory: mmap.mmap
    copy: SparseCopy | None
    """of a remote file, what of it has come"""


class MappedFile:
    """A file that is mapped when it is first asked for. Pickles as its address. Safe to use from several threads."""

    def __init__(self, info: ObjectInfo, options: StorageOptions | None = None, staging: Staging | None = None) -> None:
        self.info, self._options, self._staging = info, options, staging or Staging()
        self._forget()

    def _forget(self) -> None:
        self._mapped: _Mapped | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_mapped", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def memory(self) -> mmap.mmap:
        """All its bytes, of which those are right that `fetch` has brought.

        Raises:
            StorageError: it is missing, or of another size.
        """
        return self._map().memory

    def fetch(self, spans: Iterable[Span]) -> None:
        """Has the bytes of some spans there when it returns.

        Raises:
            StorageError: they can't be had.
        """
        mapped = self._map()
        if mapped.copy is not None:
            mapped.copy.fetch(spans)

    def release(self) -> None:
        """Lets go of the pages that were read; they stay in the system's cache, which all processes share."""
        if self._mapped is not None and self.info.size > _LARGE:
            self._mapped.memory.madvise(mmap.MADV_DONTNEED)

    def _map(self) -> _Mapped:
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    self._mapped = self._open()
        return self._mapped

    def _open(self) -> _Mapped:
        if not is_local(self.info.uri):
            copy = SparseCopy([RemoteFile(self.info.uri, self.info.size)], self._options, self._staging)
            return _Mapped(mmap.mmap(copy.file, 0, access=mmap.ACCESS_READ), copy)
        uri = self.info.uri
        try:
            with open(local_path(uri), "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes != self.info.size:
                    raise StorageError(f"{uri}: {nbytes:,} bytes, not {self.info.size:,}")
                return _Mapped(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), None)
        except OSError as error:
            raise StorageError(f"{uri}: can't be read ({error.strerror})") from error
