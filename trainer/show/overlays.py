"""Pictures that lie over a slide's thumbnail: heatmaps of scores, maps of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from streaming import storage
from streaming.show.pictures import slide_thumbnail
from streaming.slide.resample import Pixels
from streaming.vision import cv2
from trainer.embed.files import SlideEmbeddings
from trainer.show.colours import Floats, principal_colours
from trainer.show.figures import png

WIDTH = 1400
"""px of the thumbnail"""


def laid_out(slide: SlideEmbeddings, values: Floats) -> Floats:
    """Values (n, …) of tiles by their rows and columns, (rows, columns, …), NaN where there is no tile."""
    places = slide.rows_and_columns()
    rows, columns = places.max(axis=0) + 1
    found = np.full((rows, columns, *values.shape[1:]), np.nan, dtype=np.float32)
    found[places[:, 0], places[:, 1]] = values
    return found


def heatmap(slide: SlideEmbeddings, scores: Floats, name: str, options: storage.StorageOptions | None = None) -> bytes:
    """A PNG: scores (n,) from 0 to 1 over the slide's thumbnail, with a scale."""
    image = slide_thumbnail(slide.about.slide, slide.about.slide_mpp, WIDTH, options)
    shown = laid_out(slide, scores)
    figure, axes = _canvas(image, 1, extra=1.1)
    axes[0].imshow(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cmap="gray", vmin=0, vmax=255)
    painted = axes[0].imshow(
        shown,
        cmap="coolwarm",
        vmin=0,
        vmax=1,
        alpha=0.55,
        extent=_extent(slide, shown, image),
        interpolation="nearest",
    )
    axes[0].set_xlim(0, image.shape[1])
    axes[0].set_ylim(image.shape[0], 0)
    axes[0].set_title(f"{slide.about.name}: {name}, {len(scores):,} tiles at {slide.about.mpp:g} µm/px", fontsize=9)
    figure.colorbar(painted, ax=axes[0], fraction=0.035, pad=0.01, label=f"probability of {name}")
    return png(figure)


def token_map(slides: Sequence[SlideEmbeddings], options: storage.StorageOptions | None = None) -> list[bytes]:
    """A PNG a slide: thumbnail, and the first three principal components of its tokens as red, green and blue.

    Components are those of all slides together, so that a colour means the same on each. Without token maps, a tile's
    embedding is its one token.
    """
    vectors = [slide.features[:, None, None] if slide.tokens is None else slide.tokens for slide in slides]
    colours, _ = principal_colours(vectors)
    return [_token_picture(slide, coloured, options) for slide, coloured in zip(slides, colours, strict=True)]


def _token_picture(slide: SlideEmbeddings, coloured: Floats, options: storage.StorageOptions | None) -> bytes:
    image = slide_thumbnail(slide.about.slide, slide.about.slide_mpp, WIDTH, options)
    shown = laid_out(slide, coloured)
    flat = token_mosaic(shown)
    painted = np.concatenate([np.nan_to_num(flat), np.isfinite(flat[..., :1]).astype(np.float32)], axis=2)
    figure, axes = _canvas(image, 2)
    for axis in axes:
        axis.imshow(image)
    axes[1].imshow(painted, extent=_extent(slide, shown, image), interpolation="nearest")
    for axis in axes:
        axis.set_xlim(0, image.shape[1])
        axis.set_ylim(image.shape[0], 0)
    axes[0].set_title(slide.about.name, fontsize=9)
    axes[1].set_title(f"three principal components of {shown.shape[2] * shown.shape[3]} tokens a tile", fontsize=9)
    return png(figure)


def token_mosaic(tokens: Floats) -> Floats:
    """Tokens of tiles in their rows and columns, (rows, columns, r, c, 3), side by side: (rows·r, columns·c, 3)."""
    rows, columns, per_row, per_column, depth = tokens.shape
    return tokens.transpose(0, 2, 1, 3, 4).reshape(rows * per_row, columns * per_column, depth)


def _canvas(image: Pixels, columns: int, extra: float = 1.0) -> tuple[Figure, list[Any]]:
    width = 9.0
    height = width / columns * image.shape[0] / image.shape[1]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width * extra, height + 0.4), layout="constrained", dpi=160)
        axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _extent(slide: SlideEmbeddings, shown: Floats, image: Pixels) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in the thumbnail's px of rows and columns of tiles."""
    side = slide.about.exact_extent * image.shape[1] / slide.about.width
    return 0.0, shown.shape[1] * side, shown.shape[0] * side, 0.0
