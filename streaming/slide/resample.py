"""Pixels to pixels of another size."""

from __future__ import annotations

import threading

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

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
