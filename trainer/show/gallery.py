"""A gallery: tiles, each beside those that are most like it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from streaming import storage
from streaming.errors import ConfigError
from streaming.slide.geometry import MAX_UPSAMPLING
from trainer.embed.files import SlideEmbeddings
from trainer.evaluate.neighbours import nearest
from trainer.show.figures import png
from trainer.show.thumbnails import tile_pixels


def neighbours(
    slides: Sequence[SlideEmbeddings], num_queries: int, k: int, *, seed: int = 0, across: bool = False
) -> list[list[tuple[int, int, float]]]:
    """Query tiles drawn at random and the k most similar others: slide, tile within it, cosine similarity.

    Each row begins with the query itself. With `across`, neighbours come from other slides alone.

    Raises:
        ConfigError: there are too few tiles.
    """
    vectors = np.concatenate([slide.features for slide in slides])
    of_slide = np.repeat(np.arange(len(slides)), [len(slide.features) for slide in slides])
    within = np.concatenate([np.arange(len(slide.features)) for slide in slides])
    largest = int(np.bincount(of_slide).max())
    if len(vectors) - (largest if across else 1) < k:
        raise ConfigError(f"{len(vectors)} tiles of {len(slides)} slides: too few for {k} neighbours; ask for fewer")
    queries = np.random.default_rng(seed).permutation(len(vectors))[:num_queries]
    left_out = of_slide if across else np.arange(len(vectors))
    near = nearest(vectors, vectors[queries], k, codes=(left_out, left_out[queries]))
    rows = np.hstack([queries[:, None], near.index]), np.hstack([np.ones((len(queries), 1)), near.similarity])
    return [
        [(int(of_slide[i]), int(within[i]), float(similarity)) for i, similarity in zip(*row, strict=True)]
        for row in zip(*rows, strict=True)
    ]


def gallery(
    slides: Sequence[SlideEmbeddings],
    rows: Sequence[Sequence[tuple[int, int, float]]],
    options: storage.StorageOptions | None = None,
    max_upsampling: float = MAX_UPSAMPLING,
) -> bytes:
    """A PNG of what `neighbours` gave: a query a row, its neighbours beside it."""
    chosen = [(slide, tile) for row in rows for slide, tile, _ in row]
    tiles = iter(tile_pixels(slides, chosen, 160, options, max_upsampling))
    columns = len(rows[0])
    with mpl.rc_context({"font.size": 7}):
        figure = Figure(figsize=(1.15 * columns, 1.35 * len(rows)), layout="constrained", dpi=160)
        every = figure.subplots(len(rows), columns, squeeze=False)
    for axes, row in zip(every, rows, strict=True):
        for axis, (slide, _, similarity) in zip(axes, row, strict=True):
            axis.imshow(next(tiles))
            axis.set_axis_off()
            name = slides[slide].about.name
            axis.set_title(f"query, {name}" if axis is axes[0] else f"{similarity:.3f}, {name}", fontsize=6)
    return png(figure)
