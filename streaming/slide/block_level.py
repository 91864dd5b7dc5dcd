"""What formats tell of a slide that is read by its blocks: its objects, its levels, where their blocks lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streaming.errors import SlideError
from streaming.slide.codecs import BlockFormat
from streaming.slide.geometry import Rectangle
from streaming.slide.jpeg2000 import HEAD_NBYTES, Header, read_header

MAX_BLOCK_PX = 2**24


@dataclass(frozen=True)
class SlideObject:
    """An object that blocks of a slide lie in."""

    name: str
    """its address from the slide's folder"""
    size: int
    tag: str
    """its version (`streaming.storage.ranges.Ranges`)"""


@dataclass(frozen=True)
class BlockLevel:
    """A level as a grid of compressed blocks, row after row.

    width, height in the level's pixels; offsets and nbytes int64 (rows · columns,): where each block lies in the
    slide's objects, whose bytes are counted on from one to the next. A block of 0 bytes is empty.
    """

    width: int
    height: int
    form: BlockFormat
    offsets: NDArray[np.int64] = field(repr=False)
    nbytes: NDArray[np.int64] = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.height // self.form.height), -(-self.width // self.form.width)


@dataclass(frozen=True)
class BlockedSlide:
    """A slide whose blocks can be read one by one; mpp as the metadata has it, in µm/px at level 0, unchecked."""

    vendor: str
    mpp: tuple[float, ...]
    levels: tuple[BlockLevel, ...]
    objects: tuple[SlideObject, ...]
    left_out: str = ""
    """what of it is never read, such as further focal planes"""
    bounds: Rectangle | None = None
    """what of it was scanned; none: all"""


def check_places(
    where: str, offsets: NDArray[np.int64], nbytes: NDArray[np.int64], file_nbytes: int, unit: str = "block"
) -> None:
    """Blocks must lie within the file and be apart; the same bytes for several blocks are fine, and so is none.

    Raises:
        SlideError: they do not; begins with `where`, and names the block, which is called a `unit`.
    """
    wrong = (nbytes < 0) | (offsets < 0) | (nbytes > file_nbytes) | (offsets > file_nbytes - nbytes)
    if wrong.any():
        block = int(wrong.argmax())
        raise SlideError(
            f"{where}, {unit} {block}: {nbytes[block]:,} bytes at {offsets[block]:,} of a file of "
            f"{file_nbytes:,}; the upload was cut off? compare the size with the source"
        )
    used = np.flatnonzero(nbytes > 0)
    # In the file's order, in which they lie already but for odd slides: a stable sort sees that at once.
    used = used[np.argsort(offsets[used], kind="stable")]
    starts, sizes = offsets[used], nbytes[used]
    is_same = (starts[1:] == starts[:-1]) & (sizes[1:] == sizes[:-1])
    overlap = ~is_same & (starts[1:] < starts[:-1] + sizes[:-1])
    if overlap.any():
        block = int(used[1:][overlap.argmax()])
        raise SlideError(
            f"{where}, {unit} {block}: its bytes from {offsets[block]:,} on belong to another {unit} too"
            "; compare it with its source"
        )


def first_header(level: BlockLevel, read: Callable[[int, int], bytes]) -> Header | None:
    """The header of a JPEG 2000 level's first block; `read` gives the bytes [start, end).

    There stand the components, their subsampling, and how often it can be halved. None where all blocks are empty, or
    where it is damaged: reading it will tell what is wrong, and where.
    """
    used = np.flatnonzero(level.nbytes)
    if not len(used):
        return None
    start, nbytes = int(level.offsets[used[0]]), int(level.nbytes[used[0]])
    try:
        return read_header(read(start, start + min(nbytes, HEAD_NBYTES)))
    except ValueError:
        return None
