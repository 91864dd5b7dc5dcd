"""What the tags of a tiled TIFF say: which pages are levels, where their blocks lie, how they are compressed.

Levels, downsamples and mpp are told as OpenSlide tells them; label, macro and thumbnail are never read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from streaming.errors import SlideError, StorageError
from streaming.slide.codecs import CODECS, BlockFormat, decodes_jpeg2000, jpeg_prefix
from streaming.storage.ranges import RangeFile, Ranges, read_range

_RGB, _YCBCR = 2, 6
_XMP, _NDPI_FORMAT = 700, 65420
_MAX_BLOCK_PX = 2**24
_JPEG2000_HEAD = 512  # bytes of a block that hold its image's size and components
_MAX_PAGES = 1000  # the largest Z-stacks have some hundred
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF's ResolutionUnit: inch, cm


@dataclass(frozen=True)
class BlockLevel:
    """A level as a grid of compressed blocks, row after row.

    width, height in the level's pixels; offsets and nbytes int64 (rows · columns,): where each block lies in the file.
    A block of 0 bytes is empty.
    """

    width: int
    height: int
    form: BlockFormat
    offsets: NDArray[np.int64] = field(repr=False)
    nbytes: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class TiffSlide:
    """A slide whose blocks can be read one by one; mpp as the metadata has it, in µm/px at level 0, unchecked."""

    vendor: str
    mpp: tuple[float, ...]
    levels: tuple[BlockLevel, ...]


def read_tiff(uri: str, ranges: Ranges) -> TiffSlide | None:
    """The blocks of a tiled TIFF; None where it is another format, or one of whose blocks only OpenSlide makes sense.

    Raises:
        SlideError: its tags contradict each other or the file's size.
        StorageError: it can't be read.
    """
    magic = read_range(ranges, 0, min(4, ranges.size))
    if magic not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        with tifffile.TiffFile(RangeFile(ranges), name=uri) as tiff:  # type: ignore[arg-type]
            return _slide(uri, tiff, ranges)
    except (SlideError, StorageError):
        raise
    except (tifffile.TiffFileError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
        text = " ".join(str(error).split())
        raise SlideError(f"{uri}: its TIFF tags make no sense ({text}); compare it with its source") from error


def _slide(uri: str, tiff: tifffile.TiffFile, ranges: Ranges) -> TiffSlide | None:
    first = tiff.pages.first
    if not first.is_tiled:
        return None
    pages = _pages(uri, tiff)
    description = first.description or ""
    software = str(first.tags.valueof(305) or "")
    spacings: list[tuple[float, ...]] = []
    if description.startswith("Aperio"):
        vendor = "aperio"
        levels = [page for page in pages if page.is_tiled]
        found = re.search(r"\|\s*MPP\s*=\s*([0-9.eE+-]+)", description)
        mpp: tuple[float, ...] = (float(found[1]),) if found else ()
    elif software.startswith("Philips"):
        vendor = "philips"
        levels = [page for page in pages if page.is_tiled]
        spacings = _philips_spacings(description)
        mpp = spacings[0] if spacings else ()
    elif "<OME" in description[:2000]:
        vendor = "ome"
        levels = [first, *_sub_pages(first)]
        mpp = _ome_mpp(description)
    else:
        # Formats whose blocks overlap or are of several pictures: only OpenSlide knows how they lie.
        special = _NDPI_FORMAT in first.tags or _XMP in first.tags or "leica" in description or "MedScan" in software
        if special:
            return None
        vendor = "generic-tiff"
        levels = [page for page in pages if page.is_tiled and (page is first or page.subfiletype & 1)]
        mpp = _resolution_mpp(first)
    sizes = [(page.imagewidth, page.imagelength) for page in levels]
    if vendor == "philips":
        if len(spacings) < len(levels):
            return None
        # Philips' tags count whole blocks; the spacing tells how much of a level is picture.
        factors = [round(spacing[0] / spacings[0][0]) for spacing in spacings]
        sizes = [(sizes[0][0] // factor, sizes[0][1] // factor) for factor in factors[: len(levels)]]
    if any(b[0] >= a[0] for a, b in pairwise(sizes)):
        return None
    blocks = [
        _blocks(uri, n, page, size, ranges.size) for n, (page, size) in enumerate(zip(levels, sizes, strict=True))
    ]
    usable = [level for level in blocks if level is not None]
    # OpenSlide paints Aperio's empty blocks from other levels.
    painted = vendor == "aperio" and len(usable) > 1 and any((level.nbytes == 0).any() for level in usable)
    if len(usable) < len(blocks) or painted or not all(_decodes(level, ranges) for level in usable):
        return None
    return TiffSlide(vendor, mpp, tuple(usable))


def _pages(uri: str, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    pages: dict[int, tifffile.TiffPage] = {}
    for page in tiff.pages:
        if page.offset in pages or len(pages) == _MAX_PAGES:
            raise SlideError(
                f"{uri}: its directories of tags form a loop, or are more than {_MAX_PAGES}; compare it with its source"
            )
        assert isinstance(page, tifffile.TiffPage), "frames are only made where they are asked for"
        if page.is_tiled and not 0 < page.tilewidth * page.tilelength <= _MAX_BLOCK_PX:
            # OpenSlide 4.0.1 aborts the process where it can't allocate one.
            raise SlideError(
                f"{uri}: blocks of {page.tilewidth:,} × {page.tilelength:,} px in directory {page.index}; "
                "compare it with its source"
            )
        pages[page.offset] = page
    return list(pages.values())


def _blocks(
    uri: str, level: int, page: tifffile.TiffPage, size: tuple[int, int], file_nbytes: int
) -> BlockLevel | None:
    """A page's blocks, None where they are not plain 8-bit RGB in a codec of ours.

    What a tag must be in any TIFF is checked first: OpenSlide 4.0.1 aborts the process where it can't allocate.
    """
    width, height = page.tilewidth, page.tilelength
    if not 0 < width * height <= _MAX_BLOCK_PX or min(size) < 1:
        raise SlideError(
            f"{uri}: level {level}: blocks of {width} × {height} px for {size}; compare it with its source"
        )
    columns, rows = -(-page.imagewidth // width), -(-page.imagelength // height)
    offsets, nbytes = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    num_planes = page.samplesperpixel if page.planarconfig == 2 else 1
    if not len(offsets) == len(nbytes) == rows * columns * num_planes * page.imagedepth:
        raise SlideError(
            f"{uri}: level {level}: {len(offsets):,} offsets and {len(nbytes):,} lengths for {rows * columns:,} blocks"
            "; compare it with its source"
        )
    _check_places(uri, level, offsets, nbytes, file_nbytes)
    plain = page.samplesperpixel == 3 and page.bitspersample == 8 and page.planarconfig == 1 and page.imagedepth == 1
    codec = CODECS.get(int(page.compression))
    photometric = int(page.photometric)  # type: ignore[arg-type]
    if not plain or page.fillorder != 1 or codec is None or int(page.predictor) not in (1, 2):
        return None
    if codec == "JPEG" and photometric not in (_RGB, _YCBCR):
        return None
    if codec not in ("JPEG", "JP2K_YCBCR", "JP2K_RGB") and photometric != _RGB:
        return None
    tables = cast(object, page.jpegtables or b"")
    if not isinstance(tables, bytes):
        raise SlideError(f"{uri}: level {level}: its JPEG tables are no bytes; compare it with its source")
    # Philips cuts its levels off its blocks: what lies past the picture is never read.
    kept = (np.arange(-(-size[1] // height))[:, None] * columns + np.arange(-(-size[0] // width))).ravel()
    offsets, nbytes = offsets[kept], nbytes[kept]
    prefix = jpeg_prefix(tables, rgb=photometric == _RGB) if codec == "JPEG" else b""
    form = BlockFormat(codec, width, height, prefix, int(page.predictor) == 2)
    return BlockLevel(*size, form, offsets, nbytes)


def _decodes(level: BlockLevel, ranges: Ranges) -> bool:
    """Whether its blocks are decoded here; JPEG 2000 tells its components and their subsampling in the block alone."""
    used = np.flatnonzero(level.nbytes)
    if not level.form.codec.startswith("JP2K") or not len(used):
        return True
    start, nbytes = int(level.offsets[used[0]]), int(level.nbytes[used[0]])
    return decodes_jpeg2000(read_range(ranges, start, start + min(nbytes, _JPEG2000_HEAD)), level.form.codec)


def _check_places(
    uri: str, level: int, offsets: NDArray[np.int64], nbytes: NDArray[np.int64], file_nbytes: int
) -> None:
    """Blocks must lie within the file and be apart; the same bytes for several blocks are fine, and so is none."""
    wrong = (nbytes < 0) | (offsets < 0) | (nbytes > file_nbytes) | (offsets > file_nbytes - nbytes)
    if wrong.any():
        block = int(wrong.argmax())
        raise SlideError(
            f"{uri}: level {level}, block {block}: {nbytes[block]:,} bytes at {offsets[block]:,} of a file of "
            f"{file_nbytes:,}; the upload was cut off? compare the size with the source"
        )
    places = np.unique(np.stack((offsets, nbytes), axis=1)[nbytes > 0], axis=0)
    overlap = places[1:, 0] < places[:-1].sum(axis=1)
    if overlap.any():
        at = int(overlap.argmax())
        block = int(np.flatnonzero(offsets == places[at + 1, 0])[0])
        raise SlideError(
            f"{uri}: level {level}, block {block}: its bytes from {places[at + 1, 0]:,} on belong to another block too"
            "; compare it with its source"
        )


def _sub_pages(page: tifffile.TiffPage) -> Sequence[tifffile.TiffPage]:
    return [sub for sub in page.pages or () if isinstance(sub, tifffile.TiffPage)]


def _resolution_mpp(page: tifffile.TiffPage) -> tuple[float, ...]:
    unit = _UM_PER_UNIT.get(int(page.tags.valueof(296) or 2))
    found: list[float] = []
    for code in (282, 283):
        value = page.tags.valueof(code)
        if unit and value and value[0] and value[1]:
            found.append(unit * value[1] / value[0])
    return tuple(found)


def _xml(text: str) -> ElementTree.Element | None:
    # No slide needs entities of its own, and nested ones are a known bomb.
    if "<!ENTITY" in text:
        return None
    try:
        return ElementTree.fromstring(text.strip().strip("\0"))
    except ElementTree.ParseError:
        return None


def _philips_spacings(description: str) -> list[tuple[float, ...]]:
    """(x, y) in µm/px of each level."""
    root = _xml(description)
    if root is None:
        return []
    found: list[tuple[float, ...]] = []
    for entry in root.iter("DataObject"):
        if entry.get("ObjectType") == "PixelDataRepresentation":
            for attribute in entry.findall("Attribute"):
                if attribute.get("Name") == "DICOM_PIXEL_SPACING":
                    row, column = (float(part) * 1000 for part in (attribute.text or "").replace('"', "").split())
                    found.append((column, row))
    return sorted(found)


def _ome_mpp(description: str) -> tuple[float, ...]:
    root = _xml(description)
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels")), None) if root is not None else None
    if pixels is None:
        return ()
    found: list[float] = []
    for axis in "XY":
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if value and unit in ("µm", "um", "mm", "nm"):
            found.append(float(value) * {"mm": 1000.0, "nm": 0.001}.get(unit, 1.0))
    return tuple(found)
