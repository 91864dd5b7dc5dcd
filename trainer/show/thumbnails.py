"""Small pictures of the tiles that were embedded."""

from __future__ import annotations

from collections.abc import Sequence

from streaming import storage
from streaming.show.pictures import shrunk
from streaming.slide import open_slide
from streaming.slide.resample import Pixels
from trainer.embed.files import SlideEmbeddings


def tile_pixels(
    slides: Sequence[SlideEmbeddings],
    chosen: Sequence[tuple[int, int]],
    side: int,
    options: storage.StorageOptions | None = None,
) -> list[Pixels]:
    """Tiles, each by its slide's number and its own within it, uint8 (side, side, 3).

    Raises:
        SlideError, StorageError: one can't be read.
    """
    found: dict[tuple[int, int], Pixels] = {}
    for number in sorted({number for number, _ in chosen}):
        about, corners = slides[number].about, slides[number].corners
        opened = open_slide(about.slide, options, mpp=about.slide_mpp)
        try:
            for key in {key for key in chosen if key[0] == number}:
                x, y = (int(at) for at in corners[key[1]])
                tile = opened.read_tile(x, y, about.mpp, about.size, tolerance=0.0)
                found[key] = shrunk(tile, side, side)
        finally:
            opened.close()
    return [found[key] for key in chosen]
