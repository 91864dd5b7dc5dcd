"""A list of tiles, mapped into memory: opened at once, whatever its size, and any row of it read at once.

    rows │ groups │ what it is, as JSON │ magic, where the JSON lies and its size, zeros up to 64 bytes

Rows are int32 x and y in level-0 pixels, and in a list with weights the share that the row keeps (uint32, of 2³²) and
its other row in its group (uint32), by `streaming.plan.alias`. A group is the rows of one slide at one mpp; groups are
sorted by slide and mpp: int64 slide (row of the catalog), float64 mpp, float64 weight, int64 number of rows. It is made
of a user's Parquet file by `streaming.plan.list_packing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.errors import CatalogError
from streaming.plan.counter_random import Indices
from streaming.storage.mapped_file import MappedFile
from streaming.storage.staging import Staging

_MAGIC = b"tilestream tile list 1\n"
_TRAILER = 64
PLACE = np.dtype([("x", "<i4"), ("y", "<i4")])
WEIGHED = np.dtype([*PLACE.descr, ("keep", "<u4"), ("other", "<u4")])


@dataclass(frozen=True)
class LeftOut:
    """Tiles that a list names and nobody draws."""

    missing_slides: int = 0
    """that the catalog lacks"""
    missing: str = ""
    """the first of them"""
    of_missing: int = 0
    """tiles of those"""
    outside: int = 0
    """whose centre is not on their slide"""
    too_coarse: int = 0
    """whose slide would have to be enlarged too much"""
    weightless: int = 0
    """of weight 0"""

    def lines(self) -> Iterator[str]:
        """A line for each reason."""
        if self.missing_slides:
            yield (
                f"{self.missing_slides:,} of its slides are not in the catalog, so {self.of_missing:,} tiles are left "
                f"out (first: {self.missing}); add them: `tilestream catalog`"
            )
        if self.outside:
            yield f"{self.outside:,} tiles are left out whose centre is not on their slide; x and y are level-0 pixels"
        if self.too_coarse:
            yield (
                f"{self.too_coarse:,} tiles are left out whose slide is too coarse for their mpp; raise "
                "data.max_upsampling (--max-upsampling) to have them enlarged"
            )
        if self.weightless:
            yield f"{self.weightless:,} tiles of weight 0 are left out"


@dataclass(frozen=True)
class Groups:
    """The groups of a list as columns (n,)."""

    slide: Indices
    mpp: NDArray[np.float64]
    weight: NDArray[np.float64]
    num_rows: Indices

    def __len__(self) -> int:
        return len(self.slide)


@dataclass(frozen=True)
class TileList:
    """An opened list; digest tells its content. Pickles as its address and its groups."""

    uri: str
    """of the user's file"""
    digest: str
    is_weighted: bool
    left_out: LeftOut
    groups: Groups
    file: MappedFile

    @classmethod
    def load(cls, uri: str, packed: str, options: storage.StorageOptions | None, staging: Staging | None) -> TileList:
        """Opens what a list at `uri` was packed into.

        Raises:
            CatalogError: that is damaged.
            StorageError: it can't be read.
        """
        file = MappedFile(storage.stat(packed, options), options, staging)
        memory, size = file.memory, file.info.size
        try:
            file.fetch([(size - _TRAILER, size)])
            trailer = memory[size - _TRAILER :]
            at, nbytes = np.frombuffer(trailer, np.int64, 2, len(_MAGIC) + 1).tolist()
            if not trailer.startswith(_MAGIC) or not 0 <= at < at + nbytes <= size:
                raise ValueError("no list of this version")
            file.fetch([(at, at + nbytes)])
            about = json.loads(memory[at : at + nbytes])
            begin, n = at - 32 * about["groups"], about["groups"]
            file.fetch([(begin, at)])
            kinds = (np.int64, np.float64, np.float64, np.int64)
            columns: list[Any] = [np.frombuffer(memory, k, n, begin + 8 * i * n).copy() for i, k in enumerate(kinds)]
        except (ValueError, KeyError) as error:
            raise CatalogError(f"{packed}: damaged ({error}); remove it, and it is made anew of {uri}") from error
        return cls(uri, about["digest"], about["weighted"], LeftOut(**about["left_out"]), Groups(*columns), file)

    def rows(self, at: Indices) -> NDArray[Any]:
        """Some rows, PLACE or WEIGHED (n,).

        Raises:
            StorageError: they can't be read.
        """
        kind = WEIGHED if self.is_weighted else PLACE
        start = at * kind.itemsize
        self.file.fetch(zip(start.tolist(), (start + kind.itemsize).tolist(), strict=True))
        return np.frombuffer(self.file.memory, kind, int(self.groups.num_rows.sum()))[at]

    def release(self) -> None:
        """Lets go of what was read, as `MappedFile.release`."""
        self.file.release()


def write_end(
    file: BinaryIO, num_nbytes: int, groups: Groups, digest: str, left_out: LeftOut, *, is_weighted: bool
) -> None:
    """Writes what comes after the rows, which took so many bytes."""
    for column, kind in ((groups.slide, np.int64), (groups.mpp, float), (groups.weight, float)):
        file.write(np.ascontiguousarray(column, kind).tobytes())
    file.write(np.ascontiguousarray(groups.num_rows, np.int64).tobytes())
    about = {"groups": len(groups), "weighted": is_weighted, "digest": digest, "left_out": asdict(left_out)}
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    file.write(text)
    where = np.array([num_nbytes + 32 * len(groups), len(text)], np.int64).tobytes()
    file.write((_MAGIC + b"\0" + where).ljust(_TRAILER, b"\0"))
