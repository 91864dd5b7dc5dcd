"""A frozen model, and what it makes of tiles: embeddings, and patch tokens kept on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from streaming import storage
from streaming.counters import Counters
from streaming.errors import SlideError
from streaming.reading.slide_pool import SlidePool
from streaming.slide import Slide, open_slide
from streaming.slide.resample import Pixels, resize
from trainer.embed.model import Model
from trainer.evaluate.annotations import checked_mpp
from trainer.evaluate.datasets import Tile
from trainer.evaluate.image_files import read_image
from trainer.evaluate.scratch import Scratch

_READERS = 8
_AHEAD = 4


class TileFiles:
    """Reads tiles wherever they are, in threads; slides stay open."""

    def __init__(self, options: storage.StorageOptions | None, size: int | None = None) -> None:
        """`size` is what images are resized to; None: as they are, which must all be of one size then."""
        self._options, self._size = options, size
        self._pool: SlidePool[tuple[str, float, float | None]] = SlidePool(self._open)

    def _open(self, key: tuple[str, float, float | None], count: Counters) -> Slide:
        uri, wanted, mpp = key
        slide = open_slide(uri, self._options, mpp=mpp, count=count)
        checked_mpp(uri, slide.mpp, wanted)
        return slide

    def read(self, tile: Tile) -> Pixels:
        """One tile, uint8 (H, W, 3).

        Raises:
            SlideError: it can't be read, or the slide lacks its resolution.
            StorageError: it can't be reached.
        """
        region = tile.region
        if region is None:
            pixels = read_image(tile.uri, self._options)
        else:
            pixels = np.empty((region.size, region.size, 3), dtype=np.uint8)
            key = (tile.uri, region.mpp, region.slide_mpp)
            self._pool.begin_tile(key, region.x, region.y, region.mpp, region.size, tolerance=0.0).fill(pixels)
        if self._size is None or pixels.shape[:2] == (self._size, self._size):
            return pixels
        resized = np.empty((self._size, self._size, 3), dtype=np.uint8)
        resize(pixels, resized)
        return resized

    def batches(self, tiles: Sequence[Tile], batch: int) -> Iterator[Pixels]:
        """Tiles uint8 (n, H, W, 3), so many at once, in order, read a few batches ahead.

        Raises:
            SlideError, StorageError: as `read`; images differ in size.
        """
        waiting, queued = iter(tiles), deque[Future[Pixels]]()
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
                shape = shape or found[0].shape
                if other := next((pixels.shape for pixels in found if pixels.shape != shape), None):
                    raise SlideError(
                        f"{tiles[0].uri} and others: {shape[1]} × {shape[0]} px, and {other[1]} × {other[0]} px; "
                        "give one --resize for all"
                    )
                yield np.stack(found)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model makes of tiles, in their order."""

    embeddings: NDArray[np.float32]
    """(N, D)"""
    patches: NDArray[np.float16] | None
    """patch tokens (N, rows, columns, D), mapped; None where they are not wanted"""
    side: tuple[int, int]
    """height and width of the tiles in px"""


def extract(
    model: Model,
    tiles: Sequence[Tile],
    *,
    patches: Scratch | None = None,
    resize_to: int | None = None,
    batch: int = 64,
    options: storage.StorageOptions | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Passes tiles through a model once; keeps patch tokens where `patches` tells.

    Raises:
        ConfigError: there is no room for them.
        SlideError, StorageError: a tile can't be read, or the tiles differ in size.
    """
    embeddings: list[NDArray[np.float32]] = []
    held: NDArray[np.float16] | None = None
    done, side = 0, (0, 0)
    for pixels in TileFiles(options, resize_to).batches(tiles, batch):
        tokens = model.tokens(pixels)
        embeddings.append(model.embedding(tokens).cpu().numpy())
        side = (pixels.shape[1], pixels.shape[2])
        if patches is not None:
            patch = model.backbone.patch_size
            own = tokens.patches.unflatten(1, (max(1, side[0] // patch), max(1, side[1] // patch)))
            if held is None:
                held = patches.array("patch-tokens", (len(tiles), *own.shape[1:]), np.float16)
            held[done : done + len(pixels)] = own.half().cpu().numpy()
        done += len(pixels)
        progress(done)
    return Features(embeddings=np.concatenate(embeddings), patches=held, side=side)
