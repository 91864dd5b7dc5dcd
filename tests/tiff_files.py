"""A maker of small tiled TIFF slides, byte by byte: every layout that scanners and converters write.

tifffile can't write shared JPEG tables, empty or shared blocks, gaps or blocks in random order, so the container is
laid out here; the blocks are compressed by imagecodecs. Whether a layout is right is for OpenSlide and tifffile to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np

from streaming.synthetic.drawing import pixels
from streaming.synthetic.jpeg2000 import jpeg2000_ycbcr
from streaming.synthetic.layout import SyntheticSlide
from streaming.vision import cv2

Compression = Literal["jpeg", "jpeg-rgb", "jp2k-ycbcr", "jp2k-rgb", "lzw", "deflate", "none"]
Vendor = Literal["aperio", "generic", "ome", "philips"]
Tag = tuple[int, int, tuple[int, ...] | bytes]  # code, type, values

LABEL_COLOUR = (255, 0, 255)
MACRO_COLOUR = (0, 255, 0)
LABEL_SIZE, MACRO_SIZE, THUMBNAIL_SIZE = (80, 96), (160, 64), (64, 48)

ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 2, 3, 4, 5, 7, 16
_NUMBER = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}
_CODES = {"jpeg": 7, "jpeg-rgb": 7, "jp2k-ycbcr": 33003, "jp2k-rgb": 33005, "lzw": 5, "deflate": 8, "none": 1}


@dataclass(frozen=True, kw_only=True)
class TiffSlide:
    """One slide file; equal values give equal bytes."""

    width: int = 700
    """Level-0 px; Philips pads it to whole blocks in its tags."""
    height: int = 500
    """Level-0 px."""
    block: tuple[int, int] = (256, 256)
    """Width and height of a block, multiples of 16."""
    downsamples: tuple[int, ...] = (1,)
    """Level-0 px per px of each level; what is left over is cut (4443 / 2 is 2221)."""
    compression: Compression = "jpeg"
    quality: int = 80
    """JPEG quality, or PSNR in dB of JPEG 2000."""
    subsampling: tuple[int, int] = (2, 2)
    """Of the chroma of JPEG and JPEG 2000 in YCbCr (horizontal, vertical)."""
    shared_tables: bool = True
    """JPEG tables in a tag of the level, not in every block."""
    predictor: bool = False
    """LZW and Deflate of horizontal differences."""
    bigtiff: bool = False
    byte_order: Literal["<", ">"] = "<"
    vendor: Vendor = "aperio"
    mpp: float | None = 0.25
    description: bytes | None = None
    """ImageDescription of all pages, in place of the vendor's."""
    resolution: tuple[Tag, ...] | None = None
    """XResolution, YResolution and ResolutionUnit of all pages, in place of the vendor's."""
    associated: bool = False
    """Aperio's thumbnail, label and macro, stripped."""
    gap: int = 0
    """Bytes of 0xA5 before each block."""
    shuffled: bool = False
    """Blocks of all levels in random order."""
    empty: tuple[tuple[int, int], ...] = ()
    """(level, block) of offset and byte count 0."""
    shared: tuple[tuple[int, int, int], ...] = ()
    """(level, block, other): `block` points at the bytes of `other`."""
    tissue: bool = True
    """H&E, else smooth noise."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.predictor and self.compression not in ("lzw", "deflate"):
            raise ValueError(f"compression {self.compression}: only LZW and Deflate know a predictor")
        if any(side % 16 for side in self.block):
            raise ValueError(f"block {self.block}: TIFF wants multiples of 16")

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each level as a reader is to see them."""
        width, height = self.padded(self.width, self.height) if self.vendor == "philips" else (self.width, self.height)
        return tuple((width // downsample, height // downsample) for downsample in self.downsamples)

    def padded(self, width: int, height: int) -> tuple[int, int]:
        """Rounded up to whole blocks."""
        return -(-width // self.block[0]) * self.block[0], -(-height // self.block[1]) * self.block[1]


@lru_cache(maxsize=1)
def _tissue() -> np.ndarray:
    """2304 × 2304 px from the middle of a synthetic slide."""
    return pixels(SyntheticSlide(width=8192, height=6144, patient=1), 2800, 1800, 2304, 2304)


def level_pixels(slide: TiffSlide, level: int) -> np.ndarray:
    """What is compressed, uint8 (h, w, 3)."""
    width, height = slide.level_dimensions[0]
    if slide.tissue and max(width, height) <= 2304:
        base = _tissue()[:height, :width]
    else:
        rng = np.random.default_rng(slide.seed)
        coarse = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
        fine = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
        base = cv2.add(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), fine)
    if not level:
        return base
    return cv2.resize(base, slide.level_dimensions[level], interpolation=cv2.INTER_AREA)


def split_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG as (tables-only stream, abbreviated image)."""
    tables, image, at = b"\xff\xd8", b"\xff\xd8", 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] in (0xDB, 0xC4):
            tables += data[at:end]
        else:
            image += data[at:end]
        at = end
    return tables + b"\xff\xd9", image + data[at:]


def restyled(block: bytes, *, precinct: int, code_block: int, layers: int = 1) -> bytes:
    """A JPEG 2000 codestream that claims precincts and code-blocks of other sides, in px, and so many layers.

    Sides are powers of 2, code-blocks from 4 px on. Its packets are left as they were, so that it is damaged.
    """
    at = block.index(b"\xff\x52")  # COD: ISO/IEC 15444-1, A.6.1
    nbytes = int.from_bytes(block[at + 2 : at + 4])
    style, levels = block[at + 4 : at + 2 + nbytes], block[at + 9]
    side, precinct_side = code_block.bit_length() - 3, precinct.bit_length() - 1
    claimed = bytes([style[0] | 1, style[1], *layers.to_bytes(2), style[4], levels, side, side, *style[8:10]])
    claimed += bytes([precinct_side | precinct_side << 4]) * (levels + 1)
    return block[:at] + b"\xff\x52" + (2 + len(claimed)).to_bytes(2) + claimed + block[at + 2 + nbytes :]


def encode(slide: TiffSlide, block: np.ndarray) -> bytes:
    """One block, JPEG with all its tables."""
    kind = slide.compression
    if kind == "jpeg":
        options = {"colorspace": "RGB", "outcolorspace": "YCBCR", "subsampling": slide.subsampling}
        return imagecodecs.jpeg8_encode(block, slide.quality, **options)
    if kind == "jpeg-rgb":
        return imagecodecs.jpeg8_encode(block, slide.quality, colorspace="RGB", outcolorspace="RGB")
    if kind == "jp2k-ycbcr":
        return jpeg2000_ycbcr(block, slide.subsampling, slide.quality)
    if kind == "jp2k-rgb":
        return imagecodecs.jpeg2k_encode(block, level=slide.quality, codecformat="j2k", mct=True)
    if slide.predictor:
        block = np.concatenate((block[:, :1], np.diff(block, axis=1)), axis=1)
    raw = np.ascontiguousarray(block).tobytes()
    return {"lzw": imagecodecs.lzw_encode, "deflate": imagecodecs.zlib_encode}.get(kind, bytes)(raw)


def blocks_of(slide: TiffSlide, level: int) -> list[bytes]:
    """The compressed blocks of a level, row by row; those at the edge repeat their last pixels."""
    image = level_pixels(slide, level)
    width, height = slide.padded(image.shape[1], image.shape[0])
    image = cv2.copyMakeBorder(
        image, 0, height - image.shape[0], 0, width - image.shape[1], borderType=cv2.BORDER_REPLICATE
    )
    w, h = slide.block
    return [
        encode(slide, np.ascontiguousarray(image[y : y + h, x : x + w]))
        for y in range(0, height, h)
        for x in range(0, width, w)
    ]


def _philips(slide: TiffSlide) -> bytes:
    spacing = (slide.mpp or 0.25) / 1000
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" '
        f'Element="0x0030" PMSVR="IDoubleArray">&quot;{spacing * d:.9f}&quot; &quot;{spacing * d:.9f}&quot;</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER" Group="0x301D" Element="0x2002" PMSVR="IUInt16">{n}'
        "</Attribute></DataObject>"
        for n, d in enumerate(slide.downsamples)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>'
        '<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x301D" Element="0x2001" '
        f'PMSVR="IDataObjectArray"><Array>{levels}</Array></Attribute></DataObject></Array></Attribute>'
        '<Attribute Name="DICOM_MANUFACTURER" Group="0x0008" Element="0x0070" PMSVR="IString">PHILIPS</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">'
        f"&quot;{spacing:.9f}&quot; &quot;{spacing:.9f}&quot;</Attribute></DataObject>"
    ).encode()


def _description(slide: TiffSlide, level: int) -> bytes:
    """ImageDescription; empty where the page has none."""
    if slide.description is not None:
        return slide.description
    width, height = slide.level_dimensions[level]
    if slide.vendor == "aperio":
        facts = "" if slide.mpp is None else f"|AppMag = 40|MPP = {slide.mpp:.4f}"
        size = f"{slide.block[0]}x{slide.block[1]}"
        sizes = f"{slide.width}x{slide.height} -> {width}x{height} ({size})"
        return f"Aperio Image Library v12.0.0 \r\n{sizes}{facts}".encode()
    if level:
        return b""
    if slide.vendor == "philips":
        return _philips(slide)
    if slide.vendor == "ome":
        size = "" if slide.mpp is None else f'PhysicalSizeX="{slide.mpp}" PhysicalSizeY="{slide.mpp}" '
        return (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" {size}SizeX="{width}" '
            f'SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" Interleaved="true"><Channel ID="Channel:0:0" '
            'SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
        ).encode()
    return b""


class _File:
    """A TIFF being laid out in memory."""

    def __init__(self, slide: TiffSlide) -> None:
        self.order, self.big = slide.byte_order, slide.bigtiff
        self.address = LONG8 if self.big else LONG
        magic = b"II" if self.order == "<" else b"MM"
        self.data = bytearray(magic + (self._pack("HHHQ", 43, 8, 0, 0) if self.big else self._pack("HI", 42, 0)))
        self._link = 8 if self.big else 4  # where the offset of the next IFD is to be written

    def _pack(self, form: str, *values: int) -> bytes:
        return struct.pack(self.order + form, *values)

    def append(self, data: bytes) -> int:
        """Writes at the next even offset and returns it."""
        self.data += b"\0" * (len(self.data) % 2)
        self.data += data
        return len(self.data) - len(data)

    def ifd(self, tags: Iterable[Tag], *, chained: bool = True) -> int:
        """Writes a directory and returns its offset."""
        entries = []
        for code, kind, values in sorted(tags, key=lambda tag: tag[0]):
            raw = values if isinstance(values, bytes) else self._pack(f"{len(values)}{_NUMBER[kind]}", *values)
            count = len(values) // (2 if kind == RATIONAL else 1)
            inline = 8 if self.big else 4
            place = (
                raw.ljust(inline, b"\0")
                if len(raw) <= inline
                else self._pack("Q" if self.big else "I", self.append(raw))
            )
            entries.append(self._pack("HHQ" if self.big else "HHI", code, kind, count) + place)
        form = "Q" if self.big else "I"
        offset = self.append(
            self._pack("Q" if self.big else "H", len(entries)) + b"".join(entries) + self._pack(form, 0)
        )
        if chained:
            struct.pack_into(self.order + form, self.data, self._link, offset)
            self._link = len(self.data) - struct.calcsize(self.order + form)
        return offset


def _level_tags(slide: TiffSlide, level: int, offsets: list[int], counts: list[int], tables: bytes) -> list[Tag]:
    width, height = slide.level_dimensions[level]
    if slide.vendor == "philips":
        width, height = slide.padded(width, height)
    address = LONG8 if slide.bigtiff else LONG
    ycbcr = slide.compression in ("jpeg", "jp2k-ycbcr")
    tags: list[Tag] = [
        (254, LONG, (1 if level and slide.vendor != "aperio" else 0,)),
        (256, LONG, (width,)),
        (257, LONG, (height,)),
        (258, SHORT, (8, 8, 8)),
        (259, SHORT, (_CODES[slide.compression],)),
        (262, SHORT, (6 if ycbcr else 2,)),
        (277, SHORT, (3,)),
        (284, SHORT, (1,)),
        (322, LONG, (slide.block[0],)),
        (323, LONG, (slide.block[1],)),
        (324, address, tuple(offsets)),
        (325, LONG, tuple(counts)),
    ]
    if description := _description(slide, level):
        tags.append((270, ASCII, description + b"\0"))
    if slide.vendor == "philips":
        tags.append((305, ASCII, b"Philips DP v1.0\0"))
    if slide.resolution is not None:
        tags += slide.resolution
    elif slide.vendor in ("generic", "ome") and slide.mpp:
        per_cm = (round(10_000_000 / slide.mpp / slide.downsamples[level]), 1000)
        tags += [(282, RATIONAL, per_cm), (283, RATIONAL, per_cm), (296, SHORT, (3,))]
    if slide.compression in ("lzw", "deflate"):
        tags.append((317, SHORT, (2 if slide.predictor else 1,)))
    if tables:
        tags.append((347, UNDEFINED, tables))
    if ycbcr:
        tags.append((530, SHORT, slide.subsampling))
    return tags


def _stripped(file: _File, size: tuple[int, int], colour: tuple[int, int, int], kind: int, text: str) -> None:
    """A page of one colour in strips of 16 rows, uncompressed."""
    width, height = size
    row = bytes(colour) * width
    strips = [row * min(16, height - y) for y in range(0, height, 16)]
    offsets = [file.append(strip) for strip in strips]
    tags: list[Tag] = [
        (254, LONG, (kind,)),
        (256, LONG, (width,)),
        (257, LONG, (height,)),
        (258, SHORT, (8, 8, 8)),
        (259, SHORT, (1,)),
        (262, SHORT, (2,)),
        (270, ASCII, f"Aperio Image Library v12.0.0 \r\n{text}".encode() + b"\0"),
        (273, file.address, tuple(offsets)),
        (277, SHORT, (3,)),
        (278, LONG, (16,)),
        (279, LONG, tuple(map(len, strips))),
        (284, SHORT, (1,)),
    ]
    file.ifd(tags)


def tiff_bytes(slide: TiffSlide) -> bytes:
    """The whole file."""
    file = _File(slide)
    tables: list[bytes] = []
    stored: dict[tuple[int, int], bytes] = {}
    for level in range(len(slide.downsamples)):
        blocks = blocks_of(slide, level)
        table = b""
        if slide.compression.startswith("jpeg") and slide.shared_tables:
            parts = [split_jpeg(block) for block in blocks]
            table, blocks = parts[0][0], [image for _, image in parts]
        tables.append(table)
        stored |= {(level, index): block for index, block in enumerate(blocks)}
    pointing = {(level, index): (level, other) for level, index, other in slide.shared}
    order = [key for key in stored if key not in pointing and key not in slide.empty]
    if slide.shuffled:
        np.random.default_rng(slide.seed).shuffle(order)
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for key in map(tuple, order):
        file.append(b"\xa5" * slide.gap)
        places[key] = file.append(stored[key]), len(stored[key])
    pages: list[list[Tag]] = []
    for level in range(len(slide.downsamples)):
        keys = [key for key in stored if key[0] == level]
        found = [places.get(pointing.get(key, key), (0, 0)) for key in keys]
        pages.append(_level_tags(slide, level, [o for o, _ in found], [n for _, n in found], tables[level]))
    if slide.vendor == "ome" and len(pages) > 1:
        offsets = tuple(file.ifd(page, chained=False) for page in pages[1:])
        pages = [[*pages[0], (330, file.address, offsets)]]
    for level, page in enumerate(pages):
        file.ifd(page)
        if slide.associated and level == 0:
            _stripped(file, THUMBNAIL_SIZE, (128, 128, 128), 0, "thumbnail")
    if slide.associated:
        _stripped(file, LABEL_SIZE, LABEL_COLOUR, 1, f"label {LABEL_SIZE[0]}x{LABEL_SIZE[1]}")
        _stripped(file, MACRO_SIZE, MACRO_COLOUR, 9, f"macro {MACRO_SIZE[0]}x{MACRO_SIZE[1]}")
    return bytes(file.data)


def write_tiff(slide: TiffSlide, path: Path) -> Path:
    """Writes the file and returns its path."""
    path.write_bytes(tiff_bytes(slide))
    return path


STAGED = TiffSlide(width=512, height=512, downsamples=(1, 2), compression="jp2k-ycbcr", subsampling=(4, 1))
"""An Aperio slide whose chroma is subsampled as no decoder of ours knows it: a remote one is staged for OpenSlide."""
