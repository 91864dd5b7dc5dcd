"""Bytes of one compressed block → pixels, JPEG also at 1/2, 1/4 and 1/8 of its size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import imagecodecs
import numpy as np
import simplejpeg

from streaming.slide.resample import Pixels, scratch

_SOI, _APP0, _APP14 = b"\xff\xd8", b"\xff\xe0", b"\xff\xee"

# What libjpeg warns of where a JPEG goes on after the last row that its header tells of, and nothing else is wrong. It
# tells only the first thing that is wrong, and sees what is left over only after the last row: if rows before that are
# damaged, the text is another one.
_ONLY_LEFT_OVER = re.compile("extraneous bytes before marker 0xd9$")

# TIFF's compression tag → name: Adobe TIFF 6.0 and its supplements; 33003 and 33005 are Aperio's.
CODECS = {1: "NONE", 5: "LZW", 7: "JPEG", 8: "DEFLATE", 32946: "DEFLATE", 33003: "JP2K_YCBCR", 33005: "JP2K_RGB"}


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a level are compressed; width and height of a block in the level's pixels.

    prefix stands before what follows a JPEG block's start marker: colour transform and shared tables. predictor: rows
    hold differences of neighbouring pixels.
    """

    codec: str
    width: int
    height: int
    prefix: bytes = field(default=b"", repr=False)
    predictor: bool = False

    @property
    def scales(self) -> tuple[int, ...]:
        """By how much a block can be decoded smaller, the most first."""
        if self.codec != "JPEG":
            return (1,)
        return (8, 4, 2, 1) if self.width % 8 == self.height % 8 == 0 else (1,)


def jpeg_prefix(tables: bytes, *, rgb: bool) -> bytes:
    """The start of every JPEG block of a level: start marker, Adobe's colour transform, shared tables.

    The TIFF's photometric tag is what counts, as for OpenSlide; libjpeg believes Adobe's marker (TIFF Technical Note 2;
    Adobe Technical Note 5116: transform 0 is RGB, 1 is YCbCr).
    """
    adobe = _APP14 + b"\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if rgb else b"\x01")
    return _SOI + adobe + tables.removeprefix(_SOI).removesuffix(b"\xff\xd9")


def decode(block: bytes, form: BlockFormat, scale: int = 1, rows: int | None = None) -> Pixels:
    """The pixels of a block, uint8 (height / scale, width / scale, 3); a scale above 1 only of `BlockFormat.scales`.

    Where only the block's first `rows` (in its own pixels) are wanted, those below may be missing or of any content.
    The pixels may lie in memory that this thread's next call overwrites.

    Raises:
        ValueError: it is damaged, or of another size than the level's blocks.
    """
    if form.codec == "JPEG":
        return _decode_jpeg(block, form, scale, form.height if rows is None else rows)
    pixels = _decode_jpeg2000(block, form) if form.codec.startswith("JP2K") else _decode_plain(block, form)
    wanted = (form.height, form.width, 3)
    if pixels.shape != wanted or pixels.dtype != np.uint8:
        raise ValueError(f"it holds {pixels.shape} of {pixels.dtype}, not {wanted} of uint8")
    return cast(Pixels, pixels)


def _decode_jpeg(block: bytes, form: BlockFormat, scale: int, rows: int) -> Pixels:
    if block[:2] != _SOI:
        raise ValueError("it does not begin as a JPEG")
    start = 2
    # A block's own colour markers are left out: they may contradict those of the prefix.
    while block[start : start + 2] in (_APP0, _APP14):
        start += 2 + int.from_bytes(block[start + 2 : start + 4])
    whole = form.prefix + block[start:]
    frame, can_end_early = _frame(whole)
    height, width = int.from_bytes(whole[frame + 5 : frame + 7]), int.from_bytes(whole[frame + 7 : frame + 9])
    # Before a byte is allocated for it: a header can claim 65,535 × 65,535 px.
    if (height, width) != (form.height, form.width):
        raise ValueError(f"it is of {width} × {height} px, not {form.width} × {form.height}")
    # One more row at each scale than wanted, as chroma is interpolated between rows; libjpeg decodes sixteen at once.
    enough = -(-(rows + 2 * scale) // 16) * 16
    if can_end_early and enough < form.height:
        # With a smaller height in its header, decoding ends there: reading the codes below would be most of the work.
        shorter = bytearray(whole)
        shorter[frame + 5 : frame + 7] = enough.to_bytes(2)
        out = scratch("block", enough // scale, form.width // scale)
        try:
            _decode_into(shorter, out, scale)
            return out
        except ValueError as error:
            if _ONLY_LEFT_OVER.search(str(error)):
                return out
            # The block is damaged: decoded whole, it is refused, or given as far as the damage shows.
    out = scratch("block", form.height // scale, form.width // scale)
    _decode_into(whole, out, scale)
    return out


def _decode_into(jpeg: bytes | bytearray, out: Pixels, scale: int) -> None:
    height, width = out.shape[:2]
    simplejpeg.decode_jpeg(jpeg, min_height=height, min_width=width, min_factor=scale, buffer=cast(Any, out))


def _frame(jpeg: bytes) -> tuple[int, bool]:
    """Where a JPEG's frame header lies (ITU-T T.81, B.2.2), and whether decoding may end after any of its rows.

    It may not where more than one pass goes over the rows, or restart markers may hide where one breaks off.

    Raises:
        ValueError: there is no frame before the first scan.
    """
    at, frame, can_end_early = 2, 0, True
    while at + 10 < len(jpeg) and jpeg[at] == 0xFF:
        kind = jpeg[at + 1]
        if kind == 0xFF:  # a marker may stand behind any number of these
            at += 1
            continue
        if kind == 0xDA and frame:
            # One scan of all components.
            return frame, can_end_early and jpeg[at + 4] == jpeg[frame + 9]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            if frame:
                raise ValueError("it has two frames")
            frame = at
            can_end_early &= kind <= 0xC1
        can_end_early &= kind != 0xDD
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    raise ValueError("it has no frame and scan")


@dataclass(frozen=True)
class _Jpeg2000Size:
    """What a JPEG 2000 codestream says of its image, before anything is allocated (SIZ: ISO/IEC 15444-1, A.5.1)."""

    width: int
    height: int
    components: tuple[tuple[int, int, int], ...]
    """of each: 8-bit code of its depth (7: unsigned 8 bits), px of the image per sample across and down"""

    @property
    def is_eight_bit(self) -> bool:
        """Whether it has three components of 8 bits."""
        return len(self.components) == 3 and all(depth == 7 for depth, _, _ in self.components)

    @property
    def subsampling(self) -> tuple[tuple[int, int], ...]:
        """Of the three components: px of the image per sample across and down."""
        return tuple((across, down) for _, across, down in self.components)


# Chroma that is not subsampled is converted to RGB here. Where it is, OpenJPEG converts by itself within imagecodecs,
# but only for these two subsamplings.
_WHOLE, _SUBSAMPLED = ((1, 1),) * 3, (((1, 1), (2, 1), (2, 1)), ((1, 1), (2, 2), (2, 2)))


def _jpeg2000_size(block: bytes) -> _Jpeg2000Size:
    at = block.find(b"\xff\x51", 0, 200)
    count = int.from_bytes(block[at + 38 : at + 40])
    if at < 0 or len(block) < at + 40 + 3 * count:
        raise ValueError("it is no JPEG 2000 image")
    right, bottom, left, top = (int.from_bytes(block[at + 6 + 4 * i : at + 10 + 4 * i]) for i in range(4))
    each = block[at + 40 : at + 40 + 3 * count]
    components = tuple((each[i], each[i + 1], each[i + 2]) for i in range(0, len(each), 3))
    return _Jpeg2000Size(right - left, bottom - top, components)


def decodes_jpeg2000(start: bytes, codec: str) -> bool:
    """Whether blocks of a JPEG 2000 codec that begin so are decoded here: their components, depth and subsampling."""
    try:
        size = _jpeg2000_size(start)
    except ValueError:
        return True  # reading it will tell what is wrong, and where
    known = (_WHOLE, *_SUBSAMPLED) if codec == "JP2K_YCBCR" else (_WHOLE,)
    return size.is_eight_bit and size.subsampling in known


def _decode_jpeg2000(block: bytes, form: BlockFormat) -> Any:
    size = _jpeg2000_size(block)
    if (size.width, size.height) != (form.width, form.height):
        raise ValueError(f"it is of {size.width} × {size.height} px, not {form.width} × {form.height}")
    if not decodes_jpeg2000(block, form.codec):
        raise ValueError(f"it has components (depth, subsampling) {size.components}, which are not decoded here")
    pixels = imagecodecs.jpeg2k_decode(block)
    return _rgb_of_ycbcr(pixels) if form.codec == "JP2K_YCBCR" and size.subsampling == _WHOLE else pixels


def _rgb_of_ycbcr(pixels: Pixels) -> Pixels:
    """BT.601 full range, as JFIF has it: what OpenSlide makes of Aperio's 33003."""
    y, cb, cr = (pixels[..., i].astype(np.float32) - (0, 128, 128)[i] for i in range(3))
    rgb = np.stack((y + 1.402 * cr, y - 0.34414 * cb - 0.71414 * cr, y + 1.772 * cb), axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _decode_plain(block: bytes, form: BlockFormat) -> Any:
    nbytes = form.height * form.width * 3
    out = np.empty(nbytes, dtype=np.uint8)
    if form.codec == "NONE":
        content = np.frombuffer(block, np.uint8)
    elif form.codec == "LZW":
        content = np.frombuffer(imagecodecs.lzw_decode(block, out=cast(Any, out)), np.uint8)
    else:
        content = np.frombuffer(imagecodecs.zlib_decode(block, out=cast(Any, out)), np.uint8)
    if content.size != nbytes:
        raise ValueError(f"it holds {content.size:,} of {nbytes:,} bytes")
    pixels = content.reshape(form.height, form.width, 3)
    return imagecodecs.delta_decode(pixels, axis=1) if form.predictor else pixels
