"""What TIFF tags say about a slide's levels."""

from __future__ import annotations

from collections.abc import Sequence

import tifffile


def level_compressions(path: str, level_dimensions: Sequence[tuple[int, int]]) -> list[str | None]:
    """The compression of each level by name (`JPEG`, `APERIO_JP2000_RGB`, …); None where the file is no TIFF.

    Levels are told from label, macro and thumbnail by their (width, height) and by being tiled.
    """
    found: dict[tuple[int, int], str] = {}
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                if isinstance(page, tifffile.TiffPage) and page.is_tiled:
                    found.setdefault((page.imagewidth, page.imagelength), tifffile.COMPRESSION(page.compression).name)
    except (tifffile.TiffFileError, ValueError, OSError):
        # Not a TIFF, or one whose tags only OpenSlide makes sense of: the pixels are what counts.
        return [None] * len(level_dimensions)
    return [found.get(dimensions) for dimensions in level_dimensions]
