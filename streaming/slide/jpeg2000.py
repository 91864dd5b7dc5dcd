"""A JPEG 2000 codestream → RGB, whole or at 1/2, 1/4 or 1/8 of its size; what its header says is checked first."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import imagecodecs
import numpy as np
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from streaming.slide.openjpeg import decode_planes
from streaming.slide.resample import Pixels, resize, scratch
from streaming.slide.ycbcr import Painter, painter, rgb_of_ycbcr

HEAD_NBYTES = 512
"""Of a codestream, what holds its image's size, its components and how often it can be halved."""

_SOC, _START_OF_PART = b"\xff\x4f", b"\xff\x90"
_COD, _COC, _SOT, _SOD = 0x52, 0x53, 0x90, 0x93
# Of a header: CAP, SIZ, COD, COC, TLM, PLM, PLT, QCD, QCC, CRG, COM, SOT, SOD (ISO/IEC 15444-1, A.2).
_MARKERS = (0x50, 0x51, _COD, _COC, 0x55, 0x57, 0x58, 0x5C, 0x5D, 0x63, 0x64, _SOT, _SOD)
# OpenJPEG allocates 5 KB for each tile that a header claims. Scanners write one a block.
_MAX_TILES = 64
# Together some 300 MB. 4,096 px on a side have 16,000 code-blocks of 64 px, 260,000 of 16 px; a precinct is all of a
# resolution of a component as a rule, or of 256 px.
_MAX_PRECINCTS, _MAX_CODE_BLOCKS, _MAX_PACKETS = 2**16, 2**19, 2**18

# Chroma that is not subsampled is converted to RGB here. Where it is, OpenJPEG's callers (imagecodecs, Pillow) convert
# by themselves, but only for these two subsamplings.
_WHOLE, _SUBSAMPLED = ((1, 1),) * 3, (((1, 1), (2, 1), (2, 1)), ((1, 1), (2, 2), (2, 2)))

# A code-block is of 64 px of a band; the wavelet reaches three further. Decoding an area costs a fifth more than the
# whole where it leaves out nothing, and as much where it leaves out a quarter of the finest code-blocks.
_CODE_BLOCK_PX, _REACH_PX, _WORTHWHILE = 64, 3, 0.6

_HIGH_THROUGHPUT = 0x40


@dataclass(frozen=True)
class Header:
    """What a codestream says of itself before anything is allocated (SIZ and COD: ISO/IEC 15444-1, A.5.1 and A.6.1)."""

    width: int
    height: int
    is_at_origin: bool
    """whether its image and its tiles are counted from 0, so that reduced pixels cover whole ones"""
    tile_size: tuple[int, int]
    num_tiles: int
    components: tuple[tuple[int, int, int], ...]
    """of each: 8-bit code of its depth (7: unsigned 8 bits), px of the image per sample across and down"""
    is_transformed: bool
    """whether its components are transformed, and so turned back into red, green and blue by any decoder"""
    layers: int
    styles: tuple[bytes, ...]
    """how components are coded, that of all first: Scod, then levels, code-blocks, transform and precincts (SPcod)"""

    @property
    def halvings(self) -> int:
        """How often it can be decoded at half the size; 0 where that is not told."""
        return self.styles[0][1] if self.styles else 0

    @property
    def is_high_throughput(self) -> bool:
        """Whether it has code-blocks of HTJ2K (SPcod: ISO/IEC 15444-15, table A.4)."""
        return any(style[4] & _HIGH_THROUGHPUT for style in self.styles)

    def is_decoded(self, *, ycbcr: bool, samples: int = 3) -> bool:
        """Whether it has so many components of 8 bits, with a subsampling that is known, in few tiles."""
        eight_bit = len(self.components) == samples and all(depth == 7 for depth, _, _ in self.components)
        known = (_WHOLE[:samples], *_SUBSAMPLED) if ycbcr else (_WHOLE[:samples],)
        return eight_bit and self.subsampling in known and 0 < self.num_tiles <= _MAX_TILES

    @property
    def subsampling(self) -> tuple[tuple[int, int], ...]:
        """Of each component: px of the image per sample across and down."""
        return tuple((across, down) for _, across, down in self.components)

    def check_parts(self) -> None:
        """Refuses more parts than OpenJPEG has memory and time for: it takes 1.7 KB a precinct, 0.3 KB a code-block.

        158 bytes that claimed precincts of 2 px on a side took it 14 GB and 40 s.

        Raises:
            ValueError: it has more.
        """
        size = min(self.width, self.tile_size[0]), min(self.height, self.tile_size[1])
        found = [_parts_of(size, style) for style in self.styles]
        each = self.num_tiles * len(self.components)
        precincts, code_blocks = (each * max(numbers) for numbers in zip(*found, strict=True)) if found else (0, 0)
        packets = precincts * self.layers
        if precincts > _MAX_PRECINCTS or code_blocks > _MAX_CODE_BLOCKS or packets > _MAX_PACKETS:
            raise ValueError(f"it is of {precincts:,} precincts, {code_blocks:,} code-blocks and {packets:,} packets")


def read_header(start: bytes) -> Header:
    """The header of an image that begins so.

    Raises:
        ValueError: it is none.
    """
    at = _codestream(start) + 2  # past the marker SOC
    count = int.from_bytes(start[at + 38 : at + 40])
    if start[at : at + 2] != b"\xff\x51" or len(start) < at + 40 + 3 * count:
        raise ValueError("it is no JPEG 2000 image")
    numbers = [int.from_bytes(start[at + 6 + 4 * i : at + 10 + 4 * i]) for i in range(8)]
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = numbers
    each = start[at + 40 : at + 40 + 3 * count]
    num_tiles = 0
    if tile_width and tile_height:
        num_tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    is_transformed, layers, styles = False, 1, list[bytes]()
    for marker, segment in _segments(start, at):
        if marker == _COD and len(segment) >= 10:
            layers = max(layers, int.from_bytes(segment[2:4]))
            is_transformed = is_transformed or segment[4] > 0
            styles.append(segment[:1] + segment[5:])
        elif marker == _COC and len(segment) >= 7:  # of one component of up to 256
            styles.append(segment[1:])
    return Header(
        width=right - left,
        height=bottom - top,
        is_at_origin=not (left or top or tile_left or tile_top),
        tile_size=(tile_width, tile_height),
        num_tiles=num_tiles,
        components=tuple((each[i], each[i + 1], each[i + 2]) for i in range(0, len(each), 3)),
        is_transformed=is_transformed,
        layers=layers,
        styles=tuple(styles),
    )


def _codestream(start: bytes) -> int:
    """Where the codestream of an image begins: at its start, or in the box `jp2c` of a JP2 file (I.4 and I.5).

    Raises:
        ValueError: it is none, or has a palette, which OpenJPEG spreads out to as many channels as it claims.
    """
    at = 0
    while start[:2] != _SOC and start[at + 4 : at + 8] != b"jp2c":
        nbytes = int.from_bytes(start[at : at + 4])
        if nbytes < 8 or at + nbytes >= len(start):
            raise ValueError("it is no JPEG 2000 image")
        at += nbytes
    if b"pclr" in start[:at]:
        raise ValueError("it has a palette, which is not decoded here")
    return at if start[:2] == _SOC else at + (16 if int.from_bytes(start[at : at + 4]) == 1 else 8)


def _segments(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The marker segments of a codestream's main header, from SIZ on, and of its tile-parts', as far as it goes.

    Each is its marker's second byte and its content.

    Raises:
        ValueError: a marker that is none of a header's. OpenJPEG looks for the next one byte by byte then, and might
            find one that is not found here.
    """
    part = 0
    while at + 4 <= len(data):
        marker, nbytes = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if data[at] != 0xFF or marker not in _MARKERS or (marker != _SOD and nbytes < 2):
            raise ValueError(f"its header has the marker {data[at : at + 2].hex()}, which is not decoded here")
        if marker != _SOD:
            part = at if marker == _SOT else part
            yield marker, data[at + 4 : at + 2 + nbytes]
            at += 2 + nbytes
            continue
        # Past the content of the tile-part; a length of 0 is that of the last one.
        part_nbytes = int.from_bytes(data[part + 6 : part + 10])
        at = max(part + part_nbytes, at + 2)
        if not part_nbytes or data[at : at + 2] != _START_OF_PART:
            return


@lru_cache(maxsize=64)
def _parts_of(size: tuple[int, int], style: bytes) -> tuple[int, int]:
    """How many precincts and code-blocks a tile of one component has at the most (A.6.1, B.6 and B.7).

    style is as in `Header.styles`.
    """
    levels, sides = style[1], style[6:] if style[0] & 1 else b""
    precincts = code_blocks = 0
    for resolution in range(levels + 1):
        exponents = sides[resolution] if resolution < len(sides) else 0xFF
        # A resolution but the first is of three bands of half its size.
        halved = 1 if resolution else 0
        num_precincts, num_blocks = 1, 3 if resolution else 1
        for length, precinct, block in zip(size, (exponents & 15, exponents >> 4), style[2:4], strict=True):
            left = -(-length >> levels - resolution)
            # What is not counted from 0 may cross one more border. A code-block lies within a precinct.
            num_precincts *= (left >> precinct) + 2
            num_blocks *= (left >> halved >> min((block & 15) + 2, max(0, precinct - halved))) + 2
        precincts += num_precincts
        code_blocks += num_blocks
    return precincts, code_blocks


def decode_jpeg2000(
    block: bytes,
    size: tuple[int, int],
    scale: int,
    *,
    ycbcr: bool,
    samples: int = 3,
    area: tuple[int, int, int, int] | None = None,
) -> Pixels:
    """Its pixels as RGB, uint8 (height / scale, width / scale, 3); size: the width and height that it must have.

    Of one sample they are grey, three equal channels. Where only an area is wanted (left, top, right and bottom in the
    block's pixels), those outside of it may be of any content.

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
    header.check_parts()
    ycbcr, is_whole = ycbcr and samples == 3, header.subsampling == _WHOLE[:samples]
    if header.is_at_origin and block[:2] == _SOC:
        # What else a file's boxes say of colours, imagecodecs knows.
        part = _area_of(block, header, scale, area, painter(scale, ycbcr=ycbcr, is_whole=is_whole))
        if part is not None:
            return part
    ycbcr = ycbcr and is_whole
    if scale > 1 and header.is_at_origin:
        reduced = _as_three(_reduced(block, scale))
        if reduced is not None and reduced.shape == (size[1] // scale, size[0] // scale, 3):
            return rgb_of_ycbcr(reduced) if ycbcr else reduced
    # Whole: with fewer halvings than the level's first block it is averaged below, and if it is damaged, this tells.
    pixels = cast(Pixels, _as_three(imagecodecs.jpeg2k_decode(block)))
    pixels = rgb_of_ycbcr(pixels) if ycbcr else pixels
    if scale == 1 or pixels.shape[:2] != size[::-1]:
        return pixels
    out = scratch("reduced", size[1] // scale, size[0] // scale)
    resize(pixels, out)
    return out


def _area_of(
    block: bytes,
    header: Header,
    scale: int,
    area: tuple[int, int, int, int] | None,
    paint: Painter,
) -> Pixels | None:
    """A codestream's pixels, of which those within an area are right; None where OpenJPEG can't be asked for them."""
    whole = left, top, right, bottom = 0, 0, header.width, header.height
    # Of HTJ2K's code-blocks OpenJPEG 2.5.4 leaves an area blank, without a word.
    area = None if header.is_high_throughput else area
    if area is not None and _share_of_code_blocks(area, whole, scale) <= _WORTHWHILE:
        unit = 2 * scale  # so that subsampled chroma has a sample at its corner
        left, top = area[0] // unit * unit, area[1] // unit * unit
        right, bottom = (min(-(-at // unit) * unit, most) for at, most in zip(area[2:], whole[2:], strict=True))
    wanted = left, top, right, bottom
    planes = decode_planes(block, scale.bit_length() - 1, wanted if wanted != whole else None)
    if planes is None:
        return None
    out = scratch("block", header.height // scale, header.width // scale)
    shown = out[top // scale : bottom // scale, left // scale : right // scale]
    if planes[0].shape != shown.shape[:2]:
        return None
    painted = paint(planes, shown)
    assert np.shares_memory(painted, shown), "rows of uint8 are painted in place"
    return out


def _share_of_code_blocks(area: tuple[int, int, int, int], whole: tuple[int, int, int, int], scale: int) -> float:
    """How many of the finest code-blocks an area needs, of all; usual ones are reckoned with, larger ones are rare."""
    share = 1.0
    for start, stop, length in zip(area[:2], area[2:], whole[2:], strict=True):
        band = max(1, length // (2 * scale))
        first = max(0, start // (2 * scale) - _REACH_PX) // _CODE_BLOCK_PX
        last = min(band - 1, stop // (2 * scale) + _REACH_PX) // _CODE_BLOCK_PX
        share *= (last - first + 1) / -(-band // _CODE_BLOCK_PX)
    return share


def _as_three(pixels: Any) -> Any:
    """Grey as three equal channels; others as they are."""
    return pixels if pixels is None or pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _reduced(block: bytes, scale: int) -> Pixels | None:
    """It without its finest wavelets, None where they are all that it has or it is damaged.

    By Pillow: imagecodecs has no such option. Its colours are converted where imagecodecs converts them.
    """
    try:
        image = Jpeg2KImageFile(io.BytesIO(block))
        cast(Any, image).reduce = scale.bit_length() - 1
        image.load()
    except (OSError, SyntaxError, ValueError):
        return None
    return np.asarray(image)
