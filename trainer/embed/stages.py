"""The stages that a slide's tiles pass through when it is embedded: places, pixels, embeddings.

Plain callables from columns to columns, which Ray Data keeps in its tasks and actors.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from streaming.catalog.inspection import Rejected
from streaming.catalog.known import KnownSlides, made_by
from streaming.catalog.tiling import tissue_tiles
from streaming.errors import SlideError, StorageError
from streaming.reading.batch import Batch
from streaming.reading.slide_pool import SlidePool
from streaming.slide import PendingTile, geometry
from trainer.embed.model import load_model
from trainer.embed.options import Precision, TissueTiles, Token
from trainer.embed.passes import NOT_FINITE, Passes


@dataclass(frozen=True)
class TiledSlide:
    """What the first row of a slide's tiles tells of the slide; travels as JSON."""

    width: int
    """level-0 px"""
    height: int
    """level-0 px"""
    mpp: float
    """µm/px at level 0"""
    origin: tuple[int, int]
    """level-0 px from which QuPath counts"""
    made_by: str
    """what else than its file decides its tiles (`streaming.catalog.known.made_by`)"""
    num_tiles: int


class PlaceTiles:
    """Slides to the places of their tiles."""

    def __init__(self, slides: KnownSlides | ray.ObjectRef[KnownSlides], wanted: TissueTiles) -> None:
        # A reference is one copy a node, in shared memory, for all its tasks.
        self._slides, self._wanted = slides, wanted

    def __call__(self, batch: Batch) -> Batch:
        """One row a tile of the slide numbered `batch["id"]` (1,); one row with the reason for a slide without any.

        Columns: `slide` (its number), `x`, `y` (level-0 px), `note` (in the first row `TiledSlide`), `reason`.
        """
        number, wanted = int(batch["id"][0]), self._wanted
        slide = _held(self._slides).inspect(number)
        corners, note, reason = np.zeros((1, 2), np.int64), "", ""
        if isinstance(slide, Rejected):
            reason = slide.reason
        elif refused := geometry.too_coarse(slide.row.mpp, wanted.mpp, wanted.max_upsampling):
            reason = refused
        elif len(found := tissue_tiles(slide, wanted.mpp, wanted.size, wanted.min_tissue)):
            row = slide.row
            origin = row.bounds[0], row.bounds[1]
            about = TiledSlide(row.width, row.height, row.mpp, origin, made_by(row), len(found))
            corners, note = found, json.dumps(vars(about))
        else:
            reason = f"no {wanted.size} px tile at {wanted.mpp} µm/px has {wanted.min_tissue:.0%} tissue"
        rest = [""] * (len(corners) - 1)
        return {
            "slide": np.full(len(corners), number, np.int32),
            "x": corners[:, 0],
            "y": corners[:, 1],
            "note": np.array([note, *rest], dtype=object),
            "reason": np.array([reason, *rest], dtype=object),
        }


def _held(slides: KnownSlides | ray.ObjectRef[KnownSlides]) -> KnownSlides:
    return ray.get(slides) if isinstance(slides, ray.ObjectRef) else slides


class ReadTiles:
    """Places to pixels; safe to call from several threads."""

    def __init__(self, slides: KnownSlides | ray.ObjectRef[KnownSlides], wanted: TissueTiles) -> None:
        self._wanted = wanted
        self._pool: SlidePool[int] = SlidePool(_held(slides).open)

    def __call__(self, batch: Batch) -> Batch:
        """The rows of `PlaceTiles` with `tile` uint8 (n, size, size, 3), black where there is a reason."""
        size = self._wanted.size
        tiles = np.zeros((len(batch["slide"]), size, size, 3), dtype=np.uint8)
        reasons = batch["reason"].astype(object)
        readable = np.flatnonzero(reasons == "")
        self._pool.open_all(np.unique(batch["slide"][readable]).tolist())
        begun: list[tuple[int, PendingTile]] = []
        # All requests go out before the first block is decoded.
        for i in readable.tolist():
            try:
                place = int(batch["slide"][i]), int(batch["x"][i]), int(batch["y"][i])
                begun.append((i, self._pool.begin_tile(*place, self._wanted.mpp, size, tolerance=0.0)))
            except (SlideError, StorageError) as error:
                reasons[i] = str(error)
        for i, tile in begun:
            try:
                tile.fill(tiles[i])
            except (SlideError, StorageError) as error:
                reasons[i] = str(error)
        return {**batch, "tile": tiles, "reason": reasons}


class EmbedTiles:
    """Pixels to embeddings, by a model that is loaded once; safe to call from several threads.

    On a GPU, one's tiles are on their way while another's are computed.
    """

    def __init__(
        self,
        source: str,
        storage_options: dict[str, Any],
        token: Token,
        precision: Precision,
        *,
        tokens: bool,
        gpu: bool,
    ) -> None:
        model = replace(load_model(source, token, storage_options), precision=precision)
        model = model.on(torch.device("cuda" if gpu else "cpu"))
        # Slides are many tiles: what compiling takes, they have soon taken less.
        self._passes, self._beginning = Passes(model, patches=tokens, compiled=gpu), threading.Lock()

    def __call__(self, batch: Batch) -> Batch:
        """The rows with `embedding` float32 (and `tokens` float16) in place of `tile`, also where there is a reason.

        An embedding that is not finite is one.
        """
        with self._beginning:
            begun = self._passes.begin(batch.pop("tile"))
        made = begun.result()
        reasons = batch["reason"].astype(object)
        reasons[(reasons == "") & ~np.isfinite(made.embeddings).all(axis=1)] = f"its embeddings are {NOT_FINITE}"
        batch = {**batch, "reason": reasons}
        return {**batch, "embedding": made.embeddings, **({} if made.patches is None else {"tokens": made.patches})}
