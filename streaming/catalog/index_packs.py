"""The block indexes of a catalog's slides, in packs: files of several, one after another, each written once and whole.

Whoever looks at some slides writes a pack of theirs, so nothing that was written is written again when slides are
added. A pack is called by its content and its size. A local one is read where it is. Remote ones are, one after
another, one file of the node's cache, into which the parts come that are read (`streaming.storage.sparse_copy`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from streaming import storage
from streaming.catalog import schema
from streaming.catalog.inspection import Inspected, Rejected
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError, StorageError
from streaming.slide.block_index import IndexBytes
from streaming.storage.ranges import Span
from streaming.storage.sparse_copy import CopiedPart, RemoteFile, SparseCopy
from streaming.storage.staging import Staging


def save_indexes(
    found: Sequence[Inspected | Rejected], out: str, options: storage.StorageOptions | None
) -> list[Inspected | Rejected]:
    """Writes the block indexes of some slides as a pack of the catalog at `out`; their rows then tell where they lie.

    Where it can't be written, its slides are rejected.
    """
    contents = [entry.index for entry in found if isinstance(entry, Inspected) and entry.index]
    if not contents:
        return list(found)
    name = _name(contents)
    try:
        storage.write_bytes(storage.join(out, schema.BLOCKS, name), b"".join(contents), options)
    except StorageError as error:
        return [_rejected(entry, error) if isinstance(entry, Inspected) and entry.index else entry for entry in found]
    saved, at = list[Inspected | Rejected](), 0
    for entry in found:
        if isinstance(entry, Inspected) and entry.index:
            row = replace(entry.row, index=name, index_at=at, index_nbytes=len(entry.index))
            at += len(entry.index)
            entry = replace(entry, row=row, index=None)
        saved.append(entry)
    return saved


def _name(contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return f"{digest.hexdigest()[:32]}-{sum(map(len, contents))}"


def _rejected(entry: Inspected, error: StorageError) -> Rejected:
    row = entry.row
    return Rejected(row.slide, row.size, row.version, f"its block index can't be written: {error}")


class IndexPacks:
    """The packs that a catalog's rows name. Pickles as their addresses. Safe to use from several threads."""

    def __init__(
        self, uri: str, slides: pa.Table, options: storage.StorageOptions | None = None, staging: Staging | None = None
    ) -> None:
        self._folder, self._options, self._staging = storage.join(uri, schema.BLOCKS), options, staging or Staging()
        names = cast("list[str | None]", pc.unique(slides["index"]).to_pylist())
        self._names = sorted(name for name in names if name is not None)
        self._forget()

    def _forget(self) -> None:
        self._copy: SparseCopy | None = None
        self._begins: dict[str, int] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_copy", "_begins", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def index(self, name: str, at: int, nbytes: int) -> IndexBytes:
        """The index that lies in a pack from a byte on.

        Raises:
            CatalogError: the pack's name makes no sense.
            NodeError: the node's cache can't be used.
        """
        if storage.is_local(self._folder):
            return FilePart(storage.local_path(storage.join(self._folder, name)), at, nbytes)
        copy = self._opened()
        return CopiedPart(storage.join(self._folder, name), copy, self._begins[name] + at, nbytes)

    def _opened(self) -> SparseCopy:
        if self._copy is None:
            with self._lock:
                if self._copy is None:
                    sizes = [_nbytes_of(name) for name in self._names]
                    self._begins = dict(zip(self._names, accumulate([0, *sizes]), strict=False))
                    files = [
                        RemoteFile(storage.join(self._folder, name), size)
                        for name, size in zip(self._names, sizes, strict=True)
                    ]
                    self._copy = SparseCopy(files, self._options, self._staging)
        return self._copy


def _nbytes_of(name: str) -> int:
    nbytes = name.rpartition("-")[2]
    if not nbytes.isdecimal():
        raise CatalogError(f"{name}: no name of a pack of block indexes; build the catalog anew")
    return int(nbytes)


@dataclass(frozen=True, slots=True)
class FilePart:
    """What `block_index.IndexBytes` describes, in a local file."""

    name: str
    at: int
    nbytes: int

    def read(self, offset: int, size: int, count: Counters = UNCOUNTED) -> bytes:
        """As `IndexBytes.read`."""
        del count  # it costs no request
        try:
            # Opened for each read: the packs of 100,000 slides would be thousands of descriptors.
            file = os.open(self.name, os.O_RDONLY)
            try:
                return os.pread(file, max(0, min(size, self.nbytes - offset)), self.at + offset)
            finally:
                os.close(file)
        except OSError as error:
            reason = f"can't read this block index ({error.strerror})"
            raise CatalogError(f"{self.name}: {reason}; build the catalog anew") from error

    def copied(self, spans: Sequence[Span]) -> None:
        """As `IndexBytes.copied`."""
        del spans
