"""OpenCV, the same on every CPU: whoever needs it takes it from here (`make lint` sees to it).

Its x86 wheels hand some functions to Intel's IPP, whose code, and with it the last bit of a pixel, depends on the CPU:
of 160 tiles 22 differed between a node with AVX-512 and one with AVX2. OpenCV's own code gives the same bytes at every
dispatch level (`tests/streaming/test_sameness.py`). Area averages and HSV take as long with it; enlarging a tile by
bicubic interpolation takes 0.45 ms instead of 0.13.
"""

from __future__ import annotations

import os
import warnings

import cv2


def _leave_out_ipp() -> None:
    # `cv2.ipp.setUseIPP(False)` counts for the calling thread alone, and readers have several. The variable counts for
    # all of them; OpenCV looks at it once, when the process first asks for IPP, and then warns that it was heeded.
    before, level = os.environ.get("OPENCV_IPP"), cv2.utils.logging.getLogLevel()
    os.environ["OPENCV_IPP"] = "disabled"
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    uses = cv2.ipp.useIPP()
    cv2.utils.logging.setLogLevel(level)
    if before is None:
        del os.environ["OPENCV_IPP"]
    else:
        os.environ["OPENCV_IPP"] = before
    if uses:
        warnings.warn(
            "OpenCV was at work before tilestream was imported, so tiles depend on this kind of CPU: import tilestream "
            "first, or set OPENCV_IPP=disabled",
            RuntimeWarning,
            stacklevel=2,
        )


_leave_out_ipp()

__all__ = ["cv2"]
