"""Opening slides: the one seam between formats and the rest."""

from __future__ import annotations

from typing import Protocol

from streaming import storage
from streaming.slide.geometry import Pixels
from streaming.slide.staged import Staging, open_staged

# What a folder is searched for; a file named outright is tried whatever its suffix.
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")


class Slide(Protocol):
    """An open whole-slide image. Safe to read from several threads."""

    uri: str
    backend: str
    vendor: str
    mpp: float | None
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]

    def level_compressions(self) -> list[str | None]:
        """The compression of each level by name, None where unknown."""
        ...

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Pixels of one level as uint8 (h, w, 3); location in level-0 pixels, size in the level's."""
        ...

    def read_tile(self, x: int, y: int, mpp: float, size: int) -> Pixels:
        """A tile of uint8 (size, size, 3); x, y the level-0 pixel of its top-left corner, mpp its µm/px."""
        ...

    def close(self) -> None:
        """Lets go of the file."""
        ...


def open_slide(
    uri: str,
    storage_options: storage.StorageOptions | None = None,
    *,
    mpp: float | None = None,
    expected: storage.ObjectInfo | None = None,
    staging: Staging | None = None,
) -> Slide:
    """Opens a whole-slide image by file path, s3://, gs://, az:// or http(s)://.

    mpp (µm/px at level 0) serves where the metadata has none. With `expected`, a slide of another size or version is
    refused. Remote slides are copied to `staging` first.

    Raises:
        SlideError: it is no slide, is broken, or is not the version that was expected.
        StorageError: it can't be reached.
    """
    return open_staged(uri, storage_options, mpp, expected, staging or Staging())


__all__ = ["SLIDE_SUFFIXES", "Slide", "Staging", "open_slide"]
