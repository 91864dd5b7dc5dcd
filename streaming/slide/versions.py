"""Which libraries make the pixels."""

from __future__ import annotations

import imagecodecs
import numpy as np
import openslide
import PIL
import simplejpeg

from streaming.vision import cv2


def pixel_libraries() -> dict[str, str]:
    """Versions, by name, of what decodes blocks and resamples them: with others, pixels may be others."""
    return {
        "imagecodecs": imagecodecs.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "openslide": openslide.__library_version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,  # with a libjpeg-turbo of its own
    }
