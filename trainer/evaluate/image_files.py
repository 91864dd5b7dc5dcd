"""Image files as pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from streaming import storage
from streaming.errors import SlideError
from streaming.slide.resample import Pixels
from streaming.vision import cv2


def read_image(uri: str, options: storage.StorageOptions | None = None) -> Pixels:
    """An image file (PNG, JPEG, TIFF, …) as uint8 (height, width, 3).

    Raises:
        SlideError: it is no image.
        StorageError: it can't be read.
    """
    content = storage.read_bytes(uri, options)
    found: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if found is None:
        raise SlideError(f"{uri}: {len(content):,} bytes that are no image; fetch it again, or leave it out")
    return cv2.cvtColor(found, cv2.COLOR_BGR2RGB).astype(np.uint8)
