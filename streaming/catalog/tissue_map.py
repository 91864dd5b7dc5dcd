"""The tissue of all slides of a catalog as one file, mapped into memory: opened at once, whatever its size.

    magic, number of chunks, zeros up to 64 bytes │ cells │ running sums

The cells are the slides' tissue grids one after another: uint8 tissue fractions, row by row, each grid filled up with
zeros to whole chunks of 64. The running sums are int64: sum i is of all cells before chunk i. So a cell is drawn in
proportion to its tissue by a search in the sums, and nothing is counted when the file is opened.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import CatalogError
from streaming.storage.sparse_copy import RemoteFile, SparseCopy
from streaming.storage.staging import Staging

CHUNK = 64
_MAGIC = b"tilestream tissue 1\n"
_HEADER = 64

# Mapped pages count as the process's memory until they are let go of, and each draw brings in some 100 KB of them,
# since the kernel maps what lies around. In a file below this size there is nothing to win by letting go.
_LARGE = 2**26

Cells = NDArray[np.uint8]


def padded(num_cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many cells of the file a tissue grid of so many cells takes, int64 (n,)."""
    return -(-num_cells // CHUNK) * CHUNK


def file_nbytes(num_cells: int) -> int:
    """Size of the file for so many cells, which are whole chunks."""
    return _HEADER + num_cells + (num_cells // CHUNK + 1) * 8


def write_tissue(file: BinaryIO, tissue: Iterable[Cells]) -> None:
    """Writes the cells of tissue grids, uint8 (rows, columns), in their order."""
    file.seek(_HEADER)
    running = np.zeros(1, np.int64)
    num_chunks = 0
    # Sums of 100,000 slides are a gigabyte, too.
    with tempfile.TemporaryFile() as sums:
        sums.write(running.data)
        for of_slide in tissue:
            cells = np.pad(of_slide.ravel(), (0, -of_slide.size % CHUNK)).reshape(-1, CHUNK)
            running = running[-1] + np.cumsum(cells.sum(axis=1, dtype=np.int64))
            file.write(cells.data)
            sums.write(running.data)
            num_chunks += len(running)
        sums.seek(0)
        shutil.copyfileobj(sums, file, 2**20)
    file.seek(0)
    file.write(_MAGIC + num_chunks.to_bytes(8, "little"))


@dataclass(frozen=True, slots=True)
class _Mapped:
    memory: mmap.mmap
    cells: Cells
    sums: NDArray[np.int64]
    copy: SparseCopy | None
    """of a remote file, what of it has come"""


class TissueMap:
    """The tissue file of a catalog, mapped when it is first asked for; a remote one by a copy that comes part by part.

    Pickles as its address, so that what holds one crosses Ray small. Safe to use from several threads.
    """

    def __init__(
        self, info: storage.ObjectInfo, options: storage.StorageOptions | None = None, staging: Staging | None = None
    ) -> None:
        self._info, self._options, self._staging = info, options, staging or Staging()
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
    def cells(self) -> Cells:
        """All cells, uint8 (chunks · CHUNK,).

        Raises:
            CatalogError: the file is missing or damaged.
            StorageError: it can't be fetched.
        """
        return self._whole().cells

    @property
    def sums(self) -> NDArray[np.int64]:
        """Running sums of the cells, int64 (chunks + 1,).

        Raises:
            CatalogError, StorageError: as `cells`.
        """
        return self._whole().sums

    def grids(self, begin: NDArray[np.int64], size: NDArray[np.int64]) -> tuple[Cells, NDArray[np.int64]]:
        """Cells and running sums as above, of which those of some grids are there: their first cells and sizes (n,).

        Sizes are those of the file, so whole chunks. Of the others, what is read may be wrong.

        Raises:
            CatalogError, StorageError: as `cells`.
        """
        mapped = self._map()
        if mapped.copy is not None:
            sums_at = _HEADER + len(mapped.cells)
            first, last = sums_at + begin // CHUNK * 8, sums_at + ((begin + size) // CHUNK + 1) * 8
            starts = np.concatenate([_HEADER + begin, first])
            ends = np.concatenate([_HEADER + begin + size, last])
            mapped.copy.fetch(zip(starts.tolist(), ends.tolist(), strict=True))
        return mapped.cells, mapped.sums

    def release(self) -> None:
        """Lets go of the pages that were read; they stay in the system's cache, which all processes share."""
        if self._mapped is not None and self._info.size > _LARGE:
            self._mapped.memory.madvise(mmap.MADV_DONTNEED)

    def _whole(self) -> _Mapped:
        mapped = self._map()
        if mapped.copy is not None:
            mapped.copy.fetch([(0, self._info.size)])
        return mapped

    def _map(self) -> _Mapped:
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    self._mapped = self._open()
        return self._mapped

    def _open(self) -> _Mapped:
        uri, copy = self._info.uri, None
        if storage.is_local(uri):
            mapped = self._local()
        else:
            copy = SparseCopy([RemoteFile(uri, self._info.size)], self._options, self._staging)
            copy.fetch([(0, _HEADER)])
            mapped = mmap.mmap(copy.file, 0, access=mmap.ACCESS_READ)
        nbytes = len(mapped)
        chunks = int.from_bytes(mapped[len(_MAGIC) : len(_MAGIC) + 8], "little")
        if mapped[: len(_MAGIC)] != _MAGIC or file_nbytes(chunks * CHUNK) != nbytes:
            raise CatalogError(f"{uri}: no tissue of this version; build the catalog anew")
        cells = np.frombuffer(mapped, np.uint8, chunks * CHUNK, _HEADER)
        return _Mapped(mapped, cells, np.frombuffer(mapped, np.int64, chunks + 1, _HEADER + chunks * CHUNK), copy)

    def _local(self) -> mmap.mmap:
        uri = self._info.uri
        try:
            with open(storage.local_path(uri), "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes != self._info.size:
                    raise CatalogError(f"{uri}: {nbytes:,} bytes, not {self._info.size:,}; build the catalog anew")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CatalogError(f"{uri}: can't read the tissue ({error.strerror}); build the catalog anew") from error
