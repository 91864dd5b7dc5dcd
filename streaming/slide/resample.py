"""Pixels to pixels of another size."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from streaming.vision import cv2

Pixels = NDArray[np.uint8]

# By scale: what the sample before, itself and the two after it weigh at its middle, in 64ths, so that sums of products
# are exact in float32 and the bytes the same on any machine. Of those that move a slope by (scale - 1) / (2 * scale),
# the nearest to what least squares give for averages of TCGA's and luna's blocks by OpenJPEG's 9/7 wavelet.
_TO_THE_MIDDLE = {2: (-7, 58, 17, -4), 4: (-9, 52, 27, -6), 8: (-8, 46, 32, -6)}

# Memory by thread and purpose, kept from call to call. It carries nothing from one call to the next but its pages.
_buffers = threading.local()


def scratch(purpose: str, height: int, width: int) -> Pixels:
    """An uint8 (height, width, 3) of any content, this thread's alone until it asks for the same purpose again.

    Fresh memory of this size costs more (the kernel zeroes it page by page) than decoding a quarter of a block.
    """
    nbytes = height * width * 3
    found: NDArray[np.uint8] | None = getattr(_buffers, purpose, None)
    if found is None or found.size < nbytes:
        found = np.empty(nbytes, dtype=np.uint8)
        setattr(_buffers, purpose, found)
    return found[:nbytes].reshape(height, width, 3)


def resize(pixels: Pixels, out: Pixels) -> None:
    """Resamples uint8 (h, w, 3) into another: exact area average when it shrinks, bicubic when it grows."""
    height, width = out.shape[:2]
    if pixels.shape == out.shape:
        out[:] = pixels
        return
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized = cv2.resize(pixels, (width, height), dst=out, interpolation=how)
    assert np.shares_memory(resized, out), "out is contiguous uint8"


def centre(pixels: Pixels, scale: int) -> None:
    """Moves samples of uint8 (h, w, 3), each at the first of scale × scale pixels, to the middle of those; in place.

    A wavelet's low pass leaves them there, half a pixel and more up and left of where an average lies. Moved, they are
    8 dB nearer to one at 1/2 on a TCGA slide's fullest blocks. Past the edges pixels repeat.
    """
    before = scratch("before", *pixels.shape[:2])
    before[:] = pixels
    weights = np.array(_TO_THE_MIDDLE[scale], np.float32) / 64
    both = np.outer(weights, weights)  # OpenCV is slower with one after the other
    moved = cv2.filter2D(before, -1, both, dst=pixels, anchor=(1, 1), borderType=cv2.BORDER_REPLICATE)
    assert np.shares_memory(moved, pixels), "pixels are contiguous uint8"
