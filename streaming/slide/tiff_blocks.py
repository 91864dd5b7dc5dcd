"""The blocks of one page of a tiled TIFF: where they lie, how they are compressed, whether they are decoded here."""

from __future__ import annotations

from typing import cast

import numpy as np
import tifffile

from streaming.errors import SlideError
from streaming.slide.block_level import MAX_BLOCK_PX, BlockLevel, check_places
from streaming.slide.codecs import CODECS, BlockFormat, jpeg_prefix

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_PREMULTIPLIED = 1  # TIFF's ExtraSamples: associated alpha
_APERIO_S = (33003, 33004, 33005)
_WHOLE_COLOURS = ("JPEG", "WEBP", "JP2K_YCBCR", "JP2K_RGB")  # whose planes apart nobody writes
_SIXTEEN_BITS = ("NONE", "LZW", "DEFLATE", "ZSTD", "LZMA", "PACKBITS", "JPEGXL")


def blocks_of(
    uri: str, level: int, page: tifffile.TiffPage, size: tuple[int, int], file_nbytes: int
) -> BlockLevel | None:
    """A page's blocks, None where they are no RGB or grey in a codec of ours.

    What a tag must be in any TIFF is checked first: OpenSlide 4.0.1 aborts the process where it can't allocate.
    """
    width, height = page.tilewidth, page.tilelength
    if not 0 < width * height <= MAX_BLOCK_PX or min(size) < 1:
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
    check_places(f"{uri}: level {level}", offsets, nbytes, file_nbytes)
    form = _form_of(uri, level, page)
    if form is None:
        return None
    # Philips cuts its levels off its blocks: what lies past the picture is never read. Nor is a plane of alpha.
    one = (np.arange(-(-size[1] // height))[:, None] * columns + np.arange(-(-size[0] // width))).ravel()
    kept = (np.arange(form.planes)[:, None] * (rows * columns) + one).ravel()
    return BlockLevel(*size, form, offsets[kept], nbytes[kept])


def _form_of(uri: str, level: int, page: tifffile.TiffPage) -> BlockFormat | None:
    """How a page's blocks are compressed, None where they are not decoded here."""
    codec, samples, bits = CODECS.get(int(page.compression)), page.samplesperpixel, page.bitspersample
    photometric, predictor = int(page.photometric), int(page.predictor)  # type: ignore[arg-type]
    if codec is None or page.imagedepth != 1 or page.fillorder != 1 or predictor not in (1, 2):
        return None
    # Orientation is not looked at: OpenSlide leaves it alone for JPEG, and else mirrors each block in its place.
    if bits not in (8, 16) or page.sampleformat != 1:
        return None
    is_grey = samples == 1 and photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    is_rgb = samples in (3, 4) and photometric == _RGB
    if codec == "JPEG":
        is_grey = is_grey and photometric == _BLACK_IS_ZERO
        is_rgb = samples == 3 and photometric in (_RGB, _YCBCR)
    elif codec.startswith("JP2K"):
        # Aperio's say what they are by their compression, whatever their photometric tag.
        is_rgb = samples == 3 and (photometric in (_RGB, _YCBCR) or int(page.compression) in _APERIO_S)
        is_grey = is_grey and photometric == _BLACK_IS_ZERO and codec == "JP2K_RGB"
        codec = "JP2K_YCBCR" if photometric == _YCBCR and int(page.compression) not in _APERIO_S else codec
    if not (is_grey or is_rgb) or (bits == 16 and codec not in _SIXTEEN_BITS):
        return None
    planes = 3 if page.planarconfig == 2 and samples > 1 else 1
    if planes > 1 and (codec in _WHOLE_COLOURS or samples == 4 or photometric == _YCBCR):
        return None
    tables = cast(object, page.jpegtables or b"")
    if not isinstance(tables, bytes):
        raise SlideError(f"{uri}: level {level}: its JPEG tables are no bytes; compare it with its source")
    return BlockFormat(
        codec,
        page.tilewidth,
        page.tilelength,
        jpeg_prefix(tables, rgb=photometric == _RGB) if codec == "JPEG" else b"",
        predictor=predictor == 2,
        samples=1 if planes > 1 else samples,
        bits=bits,
        is_big_endian=page.parent.byteorder == ">",
        is_inverted=photometric == _WHITE_IS_ZERO,
        is_premultiplied=tuple(page.extrasamples[:1]) == (_PREMULTIPLIED,),
        planes=planes,
    )


def check_block_size(uri: str, page: tifffile.TiffPage) -> None:
    """Refuses blocks that are none.

    Raises:
        SlideError: they have no pixels, or too many. OpenSlide 4.0.1 aborts the process where it can't allocate one.
    """
    if page.is_tiled and not 0 < page.tilewidth * page.tilelength <= MAX_BLOCK_PX:
        raise SlideError(
            f"{uri}: blocks of {page.tilewidth:,} × {page.tilelength:,} px in directory {page.index}; "
            "compare it with its source"
        )
