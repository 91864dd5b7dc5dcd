"""A frozen model, and what it makes of tiles: embeddings, and patch tokens kept on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.tiling import tile_extent
from streaming.counters import Counters
from streaming.errors import SlideError
from streaming.reading.slide_pool import SlidePool
from streaming.slide import Slide
from streaming.slide.resample import Pixels, resize
from trainer.embed.model import Model
from trainer.embed.passes import Passes, check_finite
from trainer.embed.table_slides import TableSlides
from trainer.evaluate.datasets import Region, Tile
from trainer.evaluate.image_files import read_image
from trainer.evaluate.scratch import Scratch

_READERS = 8
_AHEAD = 4
_WORTH_COMPILING = 50_000  # tiles, from which on a GPU they take longer than compiling does


class Shown(NamedTuple):
    """What a model is shown of a tile."""

    pixels: Pixels
    """uint8 (H, W, 3)"""
    whole: tuple[int, int]
    """height and width in px of the tile of which they are the middle"""


Fit = Callable[[Pixels], Shown]
"""How a tile is brought to the size that the model sees."""


def as_they_are(pixels: Pixels) -> Shown:
    """Tiles of their own size, which must all be of one then."""
    return Shown(pixels, (pixels.shape[0], pixels.shape[1]))


def resized_to(side: int) -> Fit:
    """Tiles resized to a square of `side` px."""

    def fit(pixels: Pixels) -> Shown:
        if pixels.shape[:2] == (side, side):
            return as_they_are(pixels)
        resized = np.empty((side, side, 3), dtype=np.uint8)
        resize(pixels, resized)
        return as_they_are(resized)

    return fit


class TileFiles:
    """Reads tiles wherever they are, in threads; slides stay open."""

    def __init__(
        self, options: storage.StorageOptions | None, fit: Fit = as_they_are, slides: TableSlides | None = None
    ) -> None:
        self._options, self._fit, self._slides = options, fit, slides or TableSlides(None, options)
        self._pool: SlidePool[tuple[str, float]] = SlidePool(self._open)
        self._sizes: dict[str, tuple[int, int, float]] = {}
        """width and height of slides in level-0 px, µm/px"""

    def _open(self, key: tuple[str, float], count: Counters) -> Slide:
        slide = self._slides.open(*key, count)
        assert slide.mpp is not None, "it is opened with one"
        self._sizes[key[0]] = (*slide.level_dimensions[0], slide.mpp)
        return slide

    def read(self, tile: Tile) -> Shown:
        """One tile.

        Raises:
            ConfigError: its slide is not found.
            SlideError: it can't be read, lies beside the slide, or the slide lacks its resolution.
            StorageError: it can't be reached.
        """
        region = tile.region
        if region is None:
            pixels = read_image(tile.uri, self._options)
        else:
            pixels = np.empty((region.size, region.size, 3), dtype=np.uint8)
            key = tile.uri, region.mpp
            pending = self._pool.begin_tile(key, region.x, region.y, region.mpp, region.size, tolerance=0.0)
            self._check_inside(tile.uri, region)
            pending.fill(pixels)
        return self._fit(pixels)

    def _check_inside(self, uri: str, region: Region) -> None:
        """Refuses a tile of which the slide shows nothing: it would be scored as glass."""
        width, height, mpp = self._sizes[uri]
        extent = tile_extent(region.size, region.mpp, mpp)
        if not (-extent < region.x < width and -extent < region.y < height):
            raise SlideError(
                f"{uri}: a tile at x {region.x}, y {region.y} lies beside the slide of {width} × {height} px; x and y "
                "are the level-0 pixel of its corner"
            )

    def batches(self, tiles: Sequence[Tile], batch: int) -> Iterator[tuple[Pixels, list[tuple[int, int]]]]:
        """Tiles uint8 (n, H, W, 3) and the size of the whole of each, so many at once, in order, read ahead.

        Raises:
            SlideError, StorageError: as `read`; images differ in size.
        """
        waiting, queued = iter(tiles), deque[Future[Shown]]()
        shape: tuple[int, ...] | None = None
        with ThreadPoolExecutor(_READERS) as threads:
            while True:
                queued.extend(threads.submit(self.read, tile) for tile in islice(waiting, batch * _AHEAD - len(queued)))
                if not queued:
                    return
                try:
                    found = [queued.popleft().result() for _ in range(min(batch, len(queued)))]
                except BaseException:
                    threads.shutdown(cancel_futures=True)
                    raise
                shape = shape or found[0].pixels.shape
                if other := next((one.pixels.shape for one in found if one.pixels.shape != shape), None):
                    raise SlideError(
                        f"{tiles[0].uri} and others: {shape[1]} × {shape[0]} px, and {other[1]} × {other[0]} px; "
                        "give one --resize for all"
                    )
                yield np.stack([one.pixels for one in found]), [one.whole for one in found]


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model makes of tiles, in their order."""

    embeddings: NDArray[np.float32]
    """(N, D)"""
    patches: NDArray[np.float16] | None
    """patch tokens (N, rows, columns, D), mapped; None where they are not wanted"""
    side: tuple[int, int]
    """height and width of the tiles in px, as the model saw them"""
    whole: tuple[tuple[int, int], ...] = ()
    """of each tile, before its middle was cut out"""


def extract(
    model: Model,
    tiles: Sequence[Tile],
    *,
    patches: Scratch | None = None,
    fit: Fit = as_they_are,
    batch: int = 64,
    options: storage.StorageOptions | None = None,
    slides: TableSlides | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Passes tiles through a model once; keeps patch tokens where `patches` tells.

    Raises:
        ConfigError: there is no room for them, or some embeddings are not finite.
        SlideError, StorageError: a tile can't be read, or the tiles differ in size.
    """
    embeddings: list[NDArray[np.float32]] = []
    held: NDArray[np.float16] | None = None
    whole: list[tuple[int, int]] = []
    done, side = 0, (0, 0)

    def shown() -> Iterator[Pixels]:
        nonlocal side
        for pixels, wholes in TileFiles(options, fit, slides).batches(tiles, batch):
            whole.extend(wholes)
            side = (pixels.shape[1], pixels.shape[2])
            yield pixels

    compiled = model.device.type == "cuda" and len(tiles) >= _WORTH_COMPILING
    for made in Passes(model, patches=patches is not None, compiled=compiled).through(shown()):
        check_finite("the model", made.embeddings)
        embeddings.append(made.embeddings)
        if patches is not None:
            assert made.patches is not None, "they are asked for"
            if held is None:
                held = patches.array("patch-tokens", (len(tiles), *made.patches.shape[1:]), np.float16)
            held[done : done + len(made.patches)] = made.patches
        done += len(made.embeddings)
        progress(done)
    return Features(embeddings=np.concatenate(embeddings), patches=held, side=side, whole=tuple(whole))
