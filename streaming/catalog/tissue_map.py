"""The tissue of all slides of a catalog as one file, mapped into memory: opened at once, whatever its size.

    magic, number of chunks, zeros up to 64 bytes │ cells │ running sums

The cells are the slides' tissue grids one after another: uint8 tissue fractions, row by row, each grid filled up with
zeros to whole chunks of 64. The running sums are int64: sum i is of all cells before chunk i. So a cell is drawn in
proportion to its tissue by a search in the sums, and nothing is counted when the file is opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import CatalogError, StorageError
from streaming.storage.mapped_file import MappedFile
from streaming.storage.staging import Staging

CHUNK = 64
_MAGIC = b"tilestream tissue 1\n"
_HEADER = 64

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


class TissueMap:
    """The tissue file of a catalog, mapped when it is first asked for; a remote one by a copy that comes part by part.

    Pickles as its address, so that what holds one crosses Ray small. Safe to use from several threads.
    """

    def __init__(
        self, info: storage.ObjectInfo, options: storage.StorageOptions | None = None, staging: Staging | None = None
    ) -> None:
        self._file = MappedFile(info, options, staging)

    @property
    def cells(self) -> Cells:
        """All cells, uint8 (chunks · CHUNK,).

        Raises:
            CatalogError: the file is missing or damaged.
            StorageError: it can't be fetched.
        """
        return self._whole()[0]

    @property
    def sums(self) -> NDArray[np.int64]:
        """Running sums of the cells, int64 (chunks + 1,).

        Raises:
            CatalogError, StorageError: as `cells`.
        """
        return self._whole()[1]

    def grids(self, begin: NDArray[np.int64], size: NDArray[np.int64]) -> tuple[Cells, NDArray[np.int64]]:
        """Cells and running sums as above, of which those of some grids are there: their first cells and sizes (n,).

        Sizes are those of the file, so whole chunks. Of the others, what is read may be wrong.

        Raises:
            CatalogError, StorageError: as `cells`.
        """
        cells, sums = self._map()
        sums_at = _HEADER + len(cells)
        first, last = sums_at + begin // CHUNK * 8, sums_at + ((begin + size) // CHUNK + 1) * 8
        starts = np.concatenate([_HEADER + begin, first])
        ends = np.concatenate([_HEADER + begin + size, last])
        self._file.fetch(zip(starts.tolist(), ends.tolist(), strict=True))
        return cells, sums

    def release(self) -> None:
        """Lets go of the pages that were read; they stay in the system's cache, which all processes share."""
        self._file.release()

    def _whole(self) -> tuple[Cells, NDArray[np.int64]]:
        found = self._map()
        self._file.fetch([(0, self._file.info.size)])
        return found

    def _map(self) -> tuple[Cells, NDArray[np.int64]]:
        """Cells and running sums, whatever of them is there."""
        uri = self._file.info.uri
        try:
            mapped = self._file.memory
        except StorageError as error:
            if not storage.is_local(uri):
                raise
            raise CatalogError(f"{error}; build the catalog anew") from error
        self._file.fetch([(0, _HEADER)])
        chunks = int.from_bytes(mapped[len(_MAGIC) : len(_MAGIC) + 8], "little")
        if mapped[: len(_MAGIC)] != _MAGIC or file_nbytes(chunks * CHUNK) != len(mapped):
            raise CatalogError(f"{uri}: no tissue of this version; build the catalog anew")
        cells = np.frombuffer(mapped, np.uint8, chunks * CHUNK, _HEADER)
        return cells, np.frombuffer(mapped, np.int64, chunks + 1, _HEADER + chunks * CHUNK)
