"""Where the frames of a DICOM object lie: by a TIFF's directory, an offset table, or from item to item."""

from __future__ import annotations

import struct
from typing import cast

import numpy as np
import tifffile
from numpy.typing import NDArray

from streaming.errors import SlideError, StorageError
from streaming.slide.block_level import check_places
from streaming.slide.dicom import Picture
from streaming.storage.range_file import RangeFile

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_HEAD = 8  # of an item: its tag and its length
_UNDEFINED = 0xFFFFFFFF
_PIECE_NBYTES = 2**22
# Where frames are further apart than this, only their heads are fetched.
_FAR = 2**18
# What tifffile raises over tags that make no sense.
_NONSENSE = (
    *(tifffile.TiffFileError, struct.error),
    *(IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError),
)
_COMPARE = "compare it with its source"

Ints = NDArray[np.int64]


def frames_of(uri: str, file: RangeFile, picture: Picture) -> tuple[Ints, Ints]:
    """Offset and length of each frame of an object, int64 (frames,) each; of 0 bytes where it is empty.

    A TIFF's directory tells it, else the extended offset table, else the basic one, else the items themselves, of which
    then all are gone through.

    Raises:
        SlideError: what tells it contradicts the header or the size of the object; names the frame.
        StorageError: it can't be read.
    """
    num, start = picture.num_frames, picture.pixels_at
    if not 0 < num <= file.size // _HEAD:
        raise SlideError(f"{uri}: {num:,} frames in {file.size:,} bytes; the upload was cut off? {_COMPARE}")
    if picture.pixels_nbytes is not None:
        return _native(uri, file, picture)
    by_tiff = _by_tiff(uri, file, picture)
    if by_tiff is not None:
        offsets, nbytes = by_tiff
    else:
        table = _table(uri, file, start)
        first = start + _HEAD + len(table)
        if picture.extended is not None:
            offsets, nbytes = _extended(uri, picture, first)
        elif len(table):
            offsets, nbytes = _basic(uri, file, num, first, np.frombuffer(table[: len(table) // 4 * 4], "<u4"))
        else:
            offsets, nbytes = _items(uri, file, num, first)
    check_places(uri, offsets, nbytes, file.size, "frame")
    if (offsets[nbytes > 0] < start).any():
        frame = int(((offsets < start) & (nbytes > 0)).argmax())
        raise SlideError(f"{uri}, frame {frame}: lies at {offsets[frame]:,}, in front of the pixels at {start:,}")
    return offsets, nbytes


def _native(uri: str, file: RangeFile, picture: Picture) -> tuple[Ints, Ints]:
    """Frames without compression follow each other."""
    each = picture.tile_width * picture.tile_height * picture.samples * (picture.bits[0] // 8)
    have = min(picture.pixels_nbytes or 0, file.size - picture.pixels_at)
    if each < 1 or have < each * picture.num_frames:
        raise SlideError(
            f"{uri}: {have:,} bytes of pixels for {picture.num_frames:,} frames of {each:,}; "
            "the upload was cut off? compare the size with the source"
        )
    return picture.pixels_at + each * np.arange(picture.num_frames), np.full(picture.num_frames, each, np.int64)


def _by_tiff(uri: str, file: RangeFile, picture: Picture) -> tuple[Ints, Ints] | None:
    """The blocks of a TIFF whose header lies in the DICOM preamble; None where there is none of these frames.

    Its directory lies behind the pixels, and the values of its tags behind it: one request for both.
    """
    file.seek(0)
    start = file.read(16)
    if start[:4] == b"II*\0":
        directory = int.from_bytes(start[4:8], "little")
    elif start[:4] == b"II+\0":
        directory = int.from_bytes(start[8:16], "little")
    else:
        return None
    if not picture.pixels_at < directory < file.size:
        return None
    file.fetch(directory, min(file.size, directory + 2**12 + 16 * picture.num_frames))
    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:  # type: ignore[arg-type]
            page = tiff.pages.first
            if not page.is_tiled or (page.tilewidth, page.tilelength) != (picture.tile_width, picture.tile_height):
                return None
            offsets = np.array(page.dataoffsets, np.int64)
            nbytes = np.array(page.databytecounts, np.int64)
    except StorageError:
        raise
    except _NONSENSE:
        return None
    if not len(offsets) == len(nbytes) == picture.num_frames:
        if picture.num_planes > 1 or picture.num_parts != 1:
            return None
        raise SlideError(
            f"{uri}: {len(offsets):,} offsets and {len(nbytes):,} lengths in its TIFF directory for "
            f"{picture.num_frames:,} frames; {_COMPARE}"
        )
    return offsets, nbytes


def _table(uri: str, file: RangeFile, start: int) -> bytes:
    """The basic offset table, the first item of the pixels; empty where it has no entries."""
    file.seek(start)
    head = file.read(_HEAD)
    length = int.from_bytes(head[4:], "little")
    if len(head) < _HEAD or head[:4] != _ITEM or length > file.size - start - _HEAD:
        raise SlideError(f"{uri}: its pixels begin with no offset table; the upload was cut off? {_COMPARE}")
    return file.read(length)


def _extended(uri: str, picture: Picture, first: int) -> tuple[Ints, Ints]:
    """By the extended offset table: where each frame's item begins behind the basic one, and the frame's length."""
    offsets, lengths = cast("tuple[Ints, Ints]", picture.extended)
    if not len(offsets) == len(lengths) == picture.num_frames:
        raise SlideError(
            f"{uri}: {len(offsets):,} offsets and {len(lengths):,} lengths in the extended table for "
            f"{picture.num_frames:,} frames; {_COMPARE}"
        )
    return offsets + (first + _HEAD), lengths


def _basic(uri: str, file: RangeFile, num: int, first: int, table: NDArray[np.uint32]) -> tuple[Ints, Ints]:
    """By the basic offset table, which tells where each frame begins; the last one's item tells its end."""
    if len(table) != num:
        raise SlideError(f"{uri}: {len(table):,} offsets in the basic table for {num:,} frames; {_COMPARE}")
    begins = table.astype(np.int64) + first
    if begins[0] != first or (np.diff(begins) < _HEAD).any():
        frame = int((np.diff(begins, prepend=first - _HEAD) < _HEAD).argmax())
        raise SlideError(
            f"{uri}, frame {frame}: its offset {table[frame]:,} in the basic table makes no sense; {_COMPARE}"
        )
    last = _item_nbytes(uri, file, int(begins[-1]), num - 1)
    gaps = np.append(np.diff(begins), _HEAD + last)
    # The first one is looked at: where a frame may be of several items, a table does not tell their ends.
    if _item_nbytes(uri, file, first, 0) != gaps[0] - _HEAD:
        return _items(uri, file, num, first)
    return begins + _HEAD, gaps - _HEAD


def _item_nbytes(uri: str, file: RangeFile, at: int, frame: int) -> int:
    file.seek(at)
    head = file.read(_HEAD)
    if len(head) < _HEAD or head[:4] != _ITEM:
        raise SlideError(f"{uri}, frame {frame}: no item at {at:,}; the upload was cut off? {_COMPARE}")
    return int.from_bytes(head[4:], "little")


def _items(uri: str, file: RangeFile, num: int, first: int) -> tuple[Ints, Ints]:
    """From item to item, all through the pixels: one for each frame."""
    offsets, nbytes = np.zeros(num, np.int64), np.zeros(num, np.int64)
    at, fetched, frame = first, first, 0
    while frame <= num:
        if at + _HEAD > fetched and at - first <= _FAR * frame:
            fetched = at + _PIECE_NBYTES
            file.fetch(at, fetched)
        file.seek(at)
        head = file.read(_HEAD)
        length = int.from_bytes(head[4:], "little")
        if head[:4] == _END or (frame == num and len(head) < _HEAD):
            break
        if len(head) < _HEAD or head[:4] != _ITEM or length == _UNDEFINED or frame == num:
            what = "one more item than frames" if frame == num else f"no item at {at:,}"
            raise SlideError(f"{uri}, frame {frame}: {what} of {num:,}; {_COMPARE}")
        offsets[frame], nbytes[frame] = at + _HEAD, length
        at += _HEAD + length
        frame += 1
    if frame < num:
        raise SlideError(f"{uri}, frame {frame}: the pixels end after {frame:,} of {num:,} frames; {_COMPARE}")
    return offsets, nbytes
