"""Bytes of one compressed block → pixels, JPEG and JPEG 2000 also at 1/2, 1/4 and 1/8 of its size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import imagecodecs
import numpy as np
import simplejpeg

from streaming.slide.jpeg2000 import decode_jpeg2000
from streaming.slide.resample import Pixels, scratch

_SOI, _APP0, _APP14 = b"\xff\xd8", b"\xff\xe0", b"\xff\xee"

# What libjpeg warns of where a JPEG goes on after the last row that its header tells of, and nothing else is wrong. It
# tells only the first thing that is wrong, and sees what is left over only after the last row: if rows before that are
# damaged, the text is another one.
_ONLY_LEFT_OVER = re.compile("extraneous bytes before marker 0xd9$")

# TIFF's compression tag → name: Adobe TIFF 6.0 and its supplements, and libtiff's numbers; 33003 to 33005 are Aperio's.
CODECS = {
    **{1: "NONE", 5: "LZW", 6: "JPEG", 7: "JPEG", 8: "DEFLATE", 32773: "PACKBITS", 32946: "DEFLATE", 34925: "LZMA"},
    **{33003: "JP2K_YCBCR", 33004: "JP2K_RGB", 33005: "JP2K_RGB", 34712: "JP2K_RGB"},
    **{50000: "ZSTD", 50001: "WEBP", 50002: "JPEGXL", 52546: "JPEGXL"},
}
_JPEG2000 = ("JP2K_YCBCR", "JP2K_RGB")
_OF_BYTES: dict[str, Any] = {
    "LZW": imagecodecs.lzw_decode,
    "DEFLATE": imagecodecs.zlib_decode,
    "ZSTD": imagecodecs.zstd_decode,
    "LZMA": imagecodecs.lzma_decode,
    "PACKBITS": imagecodecs.packbits_decode,
}
_EIGHT_OF_SIXTEEN = ((np.arange(2**16) + 128) // 257).astype(np.uint8)
_OF_IMAGES: dict[str, Any] = {
    "WEBP": imagecodecs.webp_decode,
    "JPEGXL": imagecodecs.jpegxl_decode,
    "JPEGLS": imagecodecs.jpegls_decode,
}


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a level are compressed; width and height of a block in the level's pixels.

    prefix stands before what follows a JPEG block's start marker: colour transform and shared tables. predictor: rows
    hold differences of neighbouring pixels. halvings: how often a JPEG 2000 block can be decoded at half its size.
    samples: 1 is grey, 3 RGB, 4 RGB and alpha. planes: how many blocks show the same place, one colour each, or 1.
    """

    codec: str
    width: int
    height: int
    prefix: bytes = field(default=b"", repr=False)
    predictor: bool = False
    halvings: int = 0
    samples: int = 3
    bits: int = 8
    is_big_endian: bool = False
    is_inverted: bool = False
    """grey, and 0 is white"""
    is_premultiplied: bool = False
    """its colours are multiplied by alpha"""
    planes: int = 1

    @property
    def is_jpeg2000(self) -> bool:
        """Whether its blocks are JPEG 2000, of whatever kind."""
        return self.codec in _JPEG2000

    @property
    def scales(self) -> tuple[int, ...]:
        """By how much a block can be decoded smaller, the most first."""
        if self.codec == "JPEG":
            return (8, 4, 2, 1) if self.width % 8 == self.height % 8 == 0 else (1,)
        most = 2 ** min(3, self.halvings)
        return tuple(s for s in (8, 4, 2, 1) if s <= most and self.width % s == self.height % s == 0)

    def scales_for(self, reduction: float) -> tuple[int, ...]:
        """Those of `scales` that are fit for pixels which are reduced so much in all.

        A wavelet's low pass is no average: at 1/4 and 1/8 it comes within 28 dB of one on a TCGA slide's fullest
        blocks, at 1/2 within 36 dB. So with JPEG 2000 the last halving is an average where there is more than one.
        """
        if not self.is_jpeg2000:
            return self.scales
        return tuple(scale for scale in self.scales if scale <= 2 or 2 * scale <= reduction)


def jpeg_prefix(tables: bytes, *, rgb: bool) -> bytes:
    """The start of every JPEG block of a level: start marker, Adobe's colour transform, shared tables.

    The TIFF's photometric tag is what counts, as for OpenSlide; libjpeg believes Adobe's marker (TIFF Technical Note 2;
    Adobe Technical Note 5116: transform 0 is RGB, 1 is YCbCr).
    """
    adobe = _APP14 + b"\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if rgb else b"\x01")
    return _SOI + adobe + tables.removeprefix(_SOI).removesuffix(b"\xff\xd9")


def decode(block: bytes, form: BlockFormat, scale: int = 1, area: tuple[int, int, int, int] | None = None) -> Pixels:
    """The pixels of a block, uint8 (height / scale, width / scale, 3); a scale above 1 only of `BlockFormat.scales`.

    Where only an area is wanted (left, top, right and bottom in the block's own pixels), pixels outside of it may be of
    any content, and rows below it missing.
    Grey is given as three equal channels, 16 bits as 8, what is transparent over white. The pixels may lie in memory
    that this thread's next call overwrites.

    Raises:
        ValueError: it is damaged, or of another size than the level's blocks.
    """
    if form.codec == "JPEG":
        return _decode_jpeg(block, form, scale, form.height if area is None else area[3])
    if form.is_jpeg2000:
        size, ycbcr = (form.width, form.height), form.codec == "JP2K_YCBCR"
        pixels = decode_jpeg2000(block, size, scale, ycbcr=ycbcr, samples=form.samples, area=area)
    else:
        pixels = _rgb_of(_decode_samples(block, form), form)
    wanted = (form.height // scale, form.width // scale, 3)
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


def _decode_samples(block: bytes, form: BlockFormat) -> Any:
    """Its samples as the file has them, uint8 or uint16 (height, width, samples)."""
    kind = np.dtype(np.uint8 if form.bits == 8 else np.uint16)
    out = np.empty((form.height, form.width, form.samples), kind)
    if form.codec in _OF_IMAGES:
        # Into an array that is there already: a header that claims another size is refused, not allocated for.
        into = out[..., 0] if form.samples == 1 else out
        # libwebp leaves alpha out of a block that is opaque all over.
        options = {"hasalpha": form.samples == 4} if form.codec == "WEBP" else {}
        _OF_IMAGES[form.codec](block, out=into, **options)
        return out
    if form.codec == "NONE":
        content = np.frombuffer(block, np.uint8)
    else:
        content = np.frombuffer(_OF_BYTES[form.codec](block, out=out.reshape(-1).view(np.uint8)), np.uint8)
    if content.size != out.nbytes:
        raise ValueError(f"it holds {content.size:,} of {out.nbytes:,} bytes")
    pixels = content.view(kind.newbyteorder(">" if form.is_big_endian else "<")).reshape(out.shape)
    pixels = pixels.astype(kind, copy=False)
    return imagecodecs.delta_decode(pixels, axis=1) if form.predictor else pixels


def _rgb_of(samples: Any, form: BlockFormat) -> Any:
    """Samples of any kind as uint8 (height, width, 3)."""
    if form.bits == 16:
        # As libtiff does, and so OpenSlide: colours are rounded, of grey the upper byte is taken.
        is_grey = form.samples == form.planes == 1
        samples = (samples >> 8).astype(np.uint8) if is_grey else _EIGHT_OF_SIXTEEN[samples]
    if form.samples == 1:
        return np.repeat(255 - samples if form.is_inverted else samples, 3, axis=2)
    if form.samples == 3:
        return samples
    colours, alpha = samples[..., :3].astype(np.uint16), samples[..., 3:].astype(np.uint16)
    if not form.is_premultiplied:
        colours = (colours * alpha + 127) // 255
    return np.minimum(colours + (255 - alpha), 255).astype(np.uint8)
