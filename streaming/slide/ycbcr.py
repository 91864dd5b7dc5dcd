"""Y, Cb and Cr of JPEG 2000 → RGB.

Where chroma is subsampled, imagecodecs and Pillow each convert in their own way, up to a grey level apart; samples that
are decoded here (`streaming.slide.openjpeg`) are converted as theirs are, so that it does not matter who decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streaming.slide.openjpeg import Plane
from streaming.slide.resample import Pixels, scratch
from streaming.vision import cv2

Painter = Callable[[list[Plane], Pixels], Pixels]
"""Takes the components of an image, uint8 (h, w) or subsampled, and an uint8 (h, w, 3) to paint them into as RGB."""

Offsets = tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]
"""What red has more than Y by Cr, green by 256 · Cb + Cr, and blue by Cb."""


def rgb_of_ycbcr(pixels: Pixels) -> Pixels:
    """BT.601 full range, as JFIF has it: what OpenSlide makes of Aperio's 33003. In integers, so the same anywhere."""
    height, width = pixels.shape[:2]
    swapped, out = scratch("ycrcb", height, width), scratch("block", height, width)
    cv2.mixChannels([pixels], [swapped], [0, 0, 1, 2, 2, 1])
    return cast(Pixels, cv2.cvtColor(swapped, cv2.COLOR_YCrCb2RGB, dst=out))


def painter(scale: int, *, ycbcr: bool, is_whole: bool) -> Painter:
    """What paints the components of a block decoded at 1 / scale; is_whole: its chroma is not subsampled.

    The colours are to the bit those that the libraries give for the same block.
    """
    if not is_whole:
        return partial(_paint_subsampled, offsets=_imagecodecs_offsets() if scale == 1 else _pillow_offsets())
    return _paint_ycbcr if ycbcr else _paint


def _paint(planes: list[Plane], out: Pixels) -> Pixels:
    return cast(Pixels, cv2.merge(planes * 3 if len(planes) == 1 else planes, out))


def _paint_ycbcr(planes: list[Plane], out: Pixels) -> Pixels:
    swapped = scratch("ycrcb", *out.shape[:2])
    cv2.merge([planes[0], planes[2], planes[1]], swapped)
    return cast(Pixels, cv2.cvtColor(swapped, cv2.COLOR_YCrCb2RGB, dst=out))


def _paint_subsampled(planes: list[Plane], out: Pixels, *, offsets: Offsets) -> Pixels:
    light, blueness, redness = planes
    (height, width), (rows, columns) = light.shape, blueness.shape
    repeated = columns * -(-width // columns), rows * -(-height // rows)
    light = light.astype(np.int16)
    both = blueness.astype(np.uint16) << 8 | redness
    channels = list[Plane]()
    for offset in (cv2.LUT(redness, offsets[0]), offsets[1].take(both), cv2.LUT(blueness, offsets[2])):
        everywhere = cv2.resize(offset, repeated, interpolation=cv2.INTER_NEAREST)[:height, :width]
        channels.append(cast(Plane, cv2.add(light, everywhere, dtype=cv2.CV_8U)))
    return cast(Pixels, cv2.merge(channels, out))


@lru_cache(maxsize=1)
def _imagecodecs_offsets() -> Offsets:
    """As OpenJPEG's own programs have it (sycc_to_rgb of color.c), which imagecodecs took over: cut, not rounded."""
    chroma = np.arange(256) - 128
    green = -np.trunc(0.344 * chroma[:, None] + 0.714 * chroma)
    red, green, blue = (
        each.astype(np.int16).ravel() for each in (np.trunc(1.402 * chroma), green, np.trunc(1.772 * chroma))
    )
    return red, green, blue


@lru_cache(maxsize=1)
def _pillow_offsets() -> Offsets:
    """As Pillow converts any image: asked of it for the darkest and the brightest Y, where one of both is not cut."""
    blueness, redness = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    dark, bright = (
        np.asarray(Image.fromarray(np.dstack([np.full_like(redness, y), blueness, redness]), "YCbCr").convert("RGB"))
        for y in (0, 255)
    )
    offsets = dark.astype(np.int16) - (255 - bright)
    return offsets[0, :, 0].copy(), offsets[..., 1].ravel(), offsets[:, 0, 2].copy()
