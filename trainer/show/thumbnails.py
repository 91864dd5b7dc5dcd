"""Small pictures of the tiles that were embedded."""

from __future__ import annotations

from collections.abc import Sequence

from streaming import storage
from streaming.errors import SlideError
from streaming.show.pictures import shrunk
from streaming.slide import geometry, open_slide
from streaming.slide.geometry import MAX_UPSAMPLING
from streaming.slide.resample import Pixels
from trainer.embed.files import SlideEmbeddings


def tile_pixels(
    slides: Sequence[SlideEmbeddings],
    chosen: Sequence[tuple[int, int]],
    side: int,
    options: storage.StorageOptions | None = None,
    max_upsampling: float = MAX_UPSAMPLING,
) -> list[Pixels]:
    """Tiles, each by its slide's number and its own within it, uint8 (side, side, 3).

    Raises:
        SlideError: one can't be read, or was enlarged over `max_upsampling` times.
        StorageError: it can't be reached.
    """
    found: dict[tuple[int, int], Pixels] = {}
    for number in sorted({number for number, _ in chosen}):
        about, corners = slides[number].about, slides[number].corners
        opened = open_slide(about.slide, options)
        try:
            opened.mpp = about.slide_mpp  # a catalog's or a table's word may have counted more than the metadata's
            if why := geometry.too_coarse(about.slide_mpp, about.mpp, max_upsampling):
                raise SlideError(f"{about.slide}: {why}")
            for key in {key for key in chosen if key[0] == number}:
                x, y = (int(at) for at in corners[key[1]])
                tile = opened.read_tile(x, y, about.mpp, about.size, tolerance=0.0)
                found[key] = shrunk(tile, side, side)
        finally:
            opened.close()
    return [found[key] for key in chosen]
