"""Compressed images for `test_fuzz` that are valid, and not what a block should be."""

import zlib
from collections.abc import Callable
from functools import cache

import imagecodecs
import numpy as np

from streaming.synthetic.jpeg2000 import jpeg2000_ycbcr


@cache
def foreign_block(kind: str) -> bytes:
    """A valid stream that is not what a block should be."""
    grey = (np.indices((64, 64)).sum(0) * 2).astype(np.uint8)
    rgb, cmyk = np.dstack([grey] * 3), np.dstack([grey] * 4)
    large = np.tile(rgb, (16, 16, 1))
    makers: dict[str, Callable[[], bytes]] = {
        "small jpeg": lambda: imagecodecs.jpeg8_encode(rgb[:16, :16].copy(), 80),
        "large jpeg": lambda: imagecodecs.jpeg8_encode(large, 80),
        "grey jpeg": lambda: imagecodecs.jpeg8_encode(np.tile(grey, (4, 4)), 80),
        "cmyk jpeg": lambda: imagecodecs.jpeg8_encode(
            np.tile(cmyk, (4, 4, 1)), 80, colorspace="CMYK", outcolorspace="CMYK"
        ),
        "small jpeg 2000": lambda: imagecodecs.jpeg2k_encode(rgb, level=40, codecformat="j2k"),
        "large jpeg 2000": lambda: imagecodecs.jpeg2k_encode(large, level=40, codecformat="j2k"),
        "grey jpeg 2000": lambda: imagecodecs.jpeg2k_encode(np.tile(grey, (4, 4)), level=40, codecformat="j2k"),
        "rgba jpeg 2000": lambda: imagecodecs.jpeg2k_encode(np.tile(cmyk, (4, 4, 1)), level=40, codecformat="j2k"),
        "16-bit jpeg 2000": lambda: imagecodecs.jpeg2k_encode(rgb.astype(np.uint16) * 200, level=40, codecformat="j2k"),
        "subsampled jpeg 2000": lambda: jpeg2000_ycbcr(np.tile(rgb, (4, 4, 1)), (2, 2), 40),
        "oddly subsampled jpeg 2000": lambda: jpeg2000_ycbcr(np.tile(rgb, (4, 4, 1)), (4, 1), 40),
        "short deflate": lambda: zlib.compress(bytes(100)),
        "long deflate": lambda: zlib.compress(bytes(4_000_000)),
        "short lzw": lambda: imagecodecs.lzw_encode(bytes(100)),
        "long lzw": lambda: imagecodecs.lzw_encode(bytes(4_000_000)),
        "nothing": lambda: b"",
        "zeros": lambda: bytes(5000),
        "small webp": lambda: imagecodecs.webp_encode(rgb),
        "large webp": lambda: imagecodecs.webp_encode(large),
        "small jpeg xl": lambda: imagecodecs.jpegxl_encode(rgb, effort=1),
        "large jpeg xl": lambda: imagecodecs.jpegxl_encode(large, effort=1),
        "16-bit jpeg xl": lambda: imagecodecs.jpegxl_encode(rgb.astype(np.uint16) * 200, effort=1),
        "short zstd": lambda: imagecodecs.zstd_encode(bytes(100)),
        "long zstd": lambda: imagecodecs.zstd_encode(bytes(2**26)),
        "short lzma": lambda: imagecodecs.lzma_encode(bytes(100)),
        "long lzma": lambda: imagecodecs.lzma_encode(bytes(4_000_000)),
        "long packbits": lambda: imagecodecs.packbits_encode(bytes(4_000_000)),
        "png": lambda: imagecodecs.png_encode(rgb),
    }
    return makers[kind]()


FOREIGN = (
    *(f"{kind} jpeg" for kind in ("small", "large", "grey", "cmyk")),
    *(f"{kind} jpeg 2000" for kind in ("small", "large", "grey", "rgba", "16-bit", "subsampled", "oddly subsampled")),
    *("short deflate", "long deflate", "short lzw", "long lzw", "nothing", "zeros", "png"),
    *("small webp", "large webp", "small jpeg xl", "large jpeg xl", "16-bit jpeg xl"),
    *("short zstd", "long zstd", "short lzma", "long lzma", "long packbits"),
)
