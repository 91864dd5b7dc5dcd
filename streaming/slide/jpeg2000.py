"""A JPEG 2000 codestream → RGB, whole or at 1/2, 1/4 or 1/8 of its size; what its header says is checked first."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import imagecodecs
import numpy as np
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from streaming.slide.resample import Pixels, resize, scratch
from streaming.vision import cv2

HEAD_NBYTES = 512
"""Of a codestream, what holds its image's size, its components and how often it can be halved."""

_SIZ, _COD, _SOT = 0x51, 0x52, 0x90
# OpenJPEG allocates 5 KB for each tile that a header claims. Scanners write one a block.
_MAX_TILES = 64

# Chroma that is not subsampled is converted to RGB here. Where it is, OpenJPEG's callers (imagecodecs, Pillow) convert
# by themselves, but only for these two subsamplings.
_WHOLE, _SUBSAMPLED = ((1, 1),) * 3, (((1, 1), (2, 1), (2, 1)), ((1, 1), (2, 2), (2, 2)))


@dataclass(frozen=True)
class Header:
    """What a codestream says of itself before anything is allocated (SIZ and COD: ISO/IEC 15444-1, A.5.1 and A.6.1)."""

    width: int
    height: int
    is_at_origin: bool
    """whether its image and its tiles are counted from 0, so that reduced pixels cover whole ones"""
    num_tiles: int
    components: tuple[tuple[int, int, int], ...]
    """of each: 8-bit code of its depth (7: unsigned 8 bits), px of the image per sample across and down"""
    halvings: int
    """how often it can be decoded at half the size"""
    is_transformed: bool
    """whether its components are transformed, and so turned back into red, green and blue by any decoder"""

    def is_decoded(self, *, ycbcr: bool, samples: int = 3) -> bool:
        """Whether it has so many components of 8 bits, with a subsampling that is known, in few tiles."""
        eight_bit = len(self.components) == samples and all(depth == 7 for depth, _, _ in self.components)
        known = (_WHOLE[:samples], *_SUBSAMPLED) if ycbcr else (_WHOLE[:samples],)
        return eight_bit and self.subsampling in known and 0 < self.num_tiles <= _MAX_TILES

    @property
    def subsampling(self) -> tuple[tuple[int, int], ...]:
        """Of each component: px of the image per sample across and down."""
        return tuple((across, down) for _, across, down in self.components)


def read_header(start: bytes) -> Header:
    """The header of a codestream that begins so.

    Raises:
        ValueError: it is none.
    """
    at = start.find(b"\xff\x51", 0, 200)
    count = int.from_bytes(start[at + 38 : at + 40])
    if at < 0 or len(start) < at + 40 + 3 * count:
        raise ValueError("it is no JPEG 2000 image")
    numbers = [int.from_bytes(start[at + 6 + 4 * i : at + 10 + 4 * i]) for i in range(8)]
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = numbers
    each = start[at + 40 : at + 40 + 3 * count]
    num_tiles = 0
    if tile_width and tile_height:
        num_tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    style = _coding_style(start, at)
    return Header(
        width=right - left,
        height=bottom - top,
        is_at_origin=not (left or top or tile_left or tile_top),
        num_tiles=num_tiles,
        components=tuple((each[i], each[i + 1], each[i + 2]) for i in range(0, len(each), 3)),
        halvings=style[5],
        is_transformed=bool(style[4]),
    )


def _coding_style(start: bytes, at: int) -> bytes:
    """What its segment COD begins with, zeros where that is not found."""
    while len(start) > at + 10 and start[at] == 0xFF and start[at + 1] != _SOT:
        if start[at + 1] == _COD:
            return start[at + 4 : at + 10]
        at += 2 + int.from_bytes(start[at + 2 : at + 4])
    return bytes(6)


def decode_jpeg2000(block: bytes, size: tuple[int, int], scale: int, *, ycbcr: bool, samples: int = 3) -> Pixels:
    """Its pixels as RGB, uint8 (height / scale, width / scale, 3); size: the width and height that it must have.

    Of one sample they are grey, three equal channels.

    Where scale is above 1, a pixel is the wavelet's sample at the first pixel of those that it stands for; see
    `streaming.slide.resample.centre`. They may lie in memory that this thread's next call overwrites.

    Raises:
        ValueError, RuntimeError: it is damaged, or of another size or kind.
    """
    header = read_header(block)
    if (header.width, header.height) != size:
        raise ValueError(f"it is of {header.width} × {header.height} px, not {size[0]} × {size[1]}")
    if not header.is_decoded(ycbcr=ycbcr, samples=samples):
        raise ValueError(
            f"it has {header.num_tiles} tiles and components (depth, subsampling) {header.components}, "
            "which are not decoded here"
        )
    ycbcr = ycbcr and header.subsampling == _WHOLE
    if scale > 1 and header.is_at_origin:
        reduced = _as_three(_reduced(block, scale))
        if reduced is not None and reduced.shape == (size[1] // scale, size[0] // scale, 3):
            return _rgb_of_ycbcr(reduced) if ycbcr else reduced
    # Whole: with fewer halvings than the level's first block it is averaged below, and if it is damaged, this tells.
    pixels = cast(Pixels, _as_three(imagecodecs.jpeg2k_decode(block)))
    pixels = _rgb_of_ycbcr(pixels) if ycbcr else pixels
    if scale == 1 or pixels.shape[:2] != size[::-1]:
        return pixels
    out = scratch("reduced", size[1] // scale, size[0] // scale)
    resize(pixels, out)
    return out


def _as_three(pixels: Any) -> Any:
    """Grey as three equal channels; others as they are."""
    return pixels if pixels is None or pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _reduced(block: bytes, scale: int) -> Pixels | None:
    """It without its finest wavelets, None where they are all that it has or it is damaged.

    By Pillow: imagecodecs has no such option. Half of 256 px costs 0.6 ms where the whole is 1.1 by imagecodecs, 1.9 by
    Pillow. Its colours are converted where imagecodecs converts them.
    """
    try:
        image = Jpeg2KImageFile(io.BytesIO(block))
        cast(Any, image).reduce = scale.bit_length() - 1
        image.load()
    except (OSError, SyntaxError, ValueError):
        return None
    return np.asarray(image)


def _rgb_of_ycbcr(pixels: Pixels) -> Pixels:
    """BT.601 full range, as JFIF has it: what OpenSlide makes of Aperio's 33003. In integers, so the same anywhere."""
    height, width = pixels.shape[:2]
    swapped, out = scratch("ycrcb", height, width), scratch("block", height, width)
    cv2.mixChannels([pixels], [swapped], [0, 0, 1, 2, 2, 1])
    return cast(Pixels, cv2.cvtColor(swapped, cv2.COLOR_YCrCb2RGB, dst=out))
