"""Pictures of embeddings: heatmaps and token maps over thumbnails, galleries of neighbours, GeoJSON for QuPath."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from streaming import storage
from streaming.catalog.tissue import thumbnail
from streaming.errors import ConfigError
from streaming.slide import open_slide
from streaming.slide.resample import Pixels
from trainer.embed.files import SlideEmbeddings
from trainer.embed.model import load_model
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import read_dataset
from trainer.evaluate.features import extracted

Floats = NDArray[np.floating[Any]]
WIDTH = 1400
"""px of a thumbnail"""
_FIT_MOST = 50_000  # vectors that a PCA is fitted to
_COLOUR_ENDS = (2, 98)  # percentiles of a component that become its darkest and brightest


def class_scores(
    slides: Sequence[SlideEmbeddings], dataset: str, name: str, options: storage.StorageOptions | None = None
) -> list[Floats]:
    """Probability that each tile of the slides is of a class, by logistic regression on a dataset's labelled tiles.

    dataset is what `tilestream evaluate` takes; its tiles go through the model that the slides went through.

    Raises:
        ConfigError: the dataset has no labels or no such class, or the model is not there any more.
        TilestreamError: the dataset can't be read.
    """
    about = slides[0].about
    samples = read_dataset(dataset, AnnotatedTiles(mpp=about.mpp, size=about.size), options)
    if samples.labels is None or name not in samples.classes:
        have = ", ".join(samples.classes) or "none"
        raise ConfigError(f"{dataset}: no tiles of class {name!r}; its classes: {have}")
    model = load_model(about.model, about.token, options)
    if any(slide.about.model_sha256 != model.digest for slide in slides):
        raise ConfigError(f"{about.model}: not the model that made all the embeddings; embed the slides by it again")
    with extracted(model, samples.tiles, options=options) as features:
        classifier: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(features.embeddings, samples.labels == samples.classes.index(name))
    return [classifier.predict_proba(slide.features)[:, 1] for slide in slides]


def slide_thumbnail(
    slide: SlideEmbeddings, options: storage.StorageOptions | None = None, width: int = WIDTH
) -> Pixels:
    """The whole slide, uint8 (h, width, 3).

    Raises:
        SlideError, StorageError: it can't be read.
    """
    about = slide.about
    opened = open_slide(about.slide, options, mpp=about.slide_mpp)
    try:
        image = thumbnail(opened, max(about.slide_mpp, about.width * about.slide_mpp / width))
    finally:
        opened.close()
    height = max(1, round(width * about.height / about.width))
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def on_grid(slide: SlideEmbeddings, values: Floats) -> Floats:
    """Values (n, …) of tiles on the slide's grid (rows, columns, …), NaN where there is no tile."""
    cells = slide.rows_and_columns()
    rows, columns = cells.max(axis=0) + 1
    grid = np.full((rows, columns, *values.shape[1:]), np.nan, dtype=np.float32)
    grid[cells[:, 0], cells[:, 1]] = values
    return grid


def heatmap(slide: SlideEmbeddings, scores: Floats, name: str, options: storage.StorageOptions | None = None) -> bytes:
    """A PNG: scores (n,) from 0 to 1 over the slide's thumbnail, with a scale."""
    image = slide_thumbnail(slide, options)
    grid = on_grid(slide, scores)
    figure, axes = _canvas(image, 1, extra=1.1)
    axes[0].imshow(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cmap="gray", vmin=0, vmax=255)
    painted = axes[0].imshow(
        grid, cmap="coolwarm", vmin=0, vmax=1, alpha=0.55, extent=_extent(slide, grid, image), interpolation="nearest"
    )
    axes[0].set_xlim(0, image.shape[1])
    axes[0].set_ylim(image.shape[0], 0)
    axes[0].set_title(f"{slide.about.name}: {name}, {len(scores):,} tiles at {slide.about.mpp:g} µm/px", fontsize=9)
    figure.colorbar(painted, ax=axes[0], fraction=0.035, pad=0.01, label=f"probability of {name}")
    return _png(figure)


def token_map(slides: Sequence[SlideEmbeddings], options: storage.StorageOptions | None = None) -> list[bytes]:
    """A PNG a slide: thumbnail, and the first three principal components of its tokens as red, green and blue.

    Components are those of all slides together, so that a colour means the same on each. Without token maps, a tile's
    embedding is its one token.
    """
    vectors = [slide.features[:, None, None] if slide.tokens is None else slide.tokens for slide in slides]
    colours = principal_colours(vectors)
    return [_token_picture(slide, coloured, options) for slide, coloured in zip(slides, colours, strict=True)]


def _token_picture(slide: SlideEmbeddings, coloured: Floats, options: storage.StorageOptions | None) -> bytes:
    image = slide_thumbnail(slide, options)
    grid = on_grid(slide, coloured)
    flat = token_mosaic(grid)
    painted = np.concatenate([np.nan_to_num(flat), np.isfinite(flat[..., :1]).astype(np.float32)], axis=2)
    figure, axes = _canvas(image, 2)
    for axis in axes:
        axis.imshow(image)
    axes[1].imshow(painted, extent=_extent(slide, grid, image), interpolation="nearest")
    for axis in axes:
        axis.set_xlim(0, image.shape[1])
        axis.set_ylim(image.shape[0], 0)
    axes[0].set_title(slide.about.name, fontsize=9)
    axes[1].set_title(f"three principal components of {grid.shape[2] * grid.shape[3]} tokens a tile", fontsize=9)
    return _png(figure)


def token_mosaic(grid: Floats) -> Floats:
    """Tokens of tiles on their slide's grid, (rows, columns, r, c, 3), side by side: (rows·r, columns·c, 3)."""
    rows, columns, per_row, per_column, depth = grid.shape
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * per_row, columns * per_column, depth)


def principal_colours(vectors: Sequence[NDArray[Any]]) -> list[Floats]:
    """The first three principal components of vectors (…, D) as colours from 0 to 1, (…, 3), alike for all."""
    every = [part.reshape(-1, part.shape[-1]) for part in vectors]
    step = max(1, sum(map(len, every)) // _FIT_MOST)
    sample = np.concatenate([part[::step] for part in every]).astype(np.float32)
    pca = PCA(n_components=min(3, *sample.shape)).fit(sample)
    low, high = np.percentile(pca.transform(sample), _COLOUR_ENDS, axis=0)
    found: list[Floats] = []
    for part, shaped in zip(every, vectors, strict=True):
        colour = np.zeros((len(part), 3), dtype=np.float32)
        scaled = (pca.transform(part.astype(np.float32)) - low) / np.maximum(high - low, 1e-12)
        colour[:, : scaled.shape[1]] = scaled.clip(0, 1)
        found.append(colour.reshape(*shaped.shape[:-1], 3))
    return found


def _canvas(image: Pixels, columns: int, extra: float = 1.0) -> tuple[Figure, list[Any]]:
    width = 9.0
    height = width / columns * image.shape[0] / image.shape[1]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width * extra, height + 0.4), layout="constrained", dpi=160)
        axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _extent(slide: SlideEmbeddings, grid: Floats, image: Pixels) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in the thumbnail's px of a grid of tiles."""
    about = slide.about
    side = about.size * about.mpp / about.slide_mpp * image.shape[1] / about.width
    return 0.0, grid.shape[1] * side, grid.shape[0] * side, 0.0


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
                tile = opened.read_tile(x, y, about.mpp, about.size)
                small = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
                found[key] = np.asarray(small, dtype=np.uint8)
        finally:
            opened.close()
    return [found[key] for key in chosen]


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
    # Those of the query's own slide are left out afterwards.
    search: Any = NearestNeighbors(metric="cosine").fit(vectors)
    asked = min(len(vectors), k + (largest if across else 1))
    distances, indices = search.kneighbors(vectors[queries], n_neighbors=asked)
    rows: list[list[tuple[int, int, float]]] = []
    for query, distance, index in zip(queries, distances, indices, strict=True):
        kept = of_slide[index] != of_slide[query] if across else index != query
        near = zip(index[kept][:k], distance[kept][:k], strict=True)
        row = [(query, 0.0), *near]
        rows.append([(int(of_slide[i]), int(within[i]), float(1 - d)) for i, d in row])
    return rows


def gallery(
    slides: Sequence[SlideEmbeddings],
    rows: Sequence[Sequence[tuple[int, int, float]]],
    options: storage.StorageOptions | None = None,
) -> bytes:
    """A PNG of what `neighbours` gave: a query a row, its neighbours beside it."""
    tiles = iter(tile_pixels(slides, [(slide, tile) for row in rows for slide, tile, _ in row], 160, options))
    columns = len(rows[0])
    with mpl.rc_context({"font.size": 7}):
        figure = Figure(figsize=(1.15 * columns, 1.35 * len(rows)), layout="constrained", dpi=160)
        grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for axis, (slide, _, similarity) in zip(axes, row, strict=True):
            axis.imshow(next(tiles))
            axis.set_axis_off()
            name = slides[slide].about.name
            axis.set_title(f"query, {name}" if axis is axes[0] else f"{similarity:.3f}, {name}", fontsize=6)
    return _png(figure)


def geojson(slide: SlideEmbeddings, measurements: dict[str, Floats], colours: Floats | None = None) -> bytes:
    """Tiles as QuPath reads them: a FeatureCollection of `tile` objects in level-0 px, each with measurements.

    measurements (n,) by name; colours (n, 3) from 0 to 1. Layout: QuPath's PathIO.exportObjectsAsGeoJSON since 0.4.
    """
    side, features = slide.about.extent, list[dict[str, Any]]()
    # The same tile gets the same id whenever it is written.
    space = uuid.uuid5(uuid.NAMESPACE_URL, slide.about.to_json())
    for i, (x, y) in enumerate(slide.corners.tolist()):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        properties: dict[str, Any] = {
            "objectType": "tile",
            "measurements": {name: float(values[i]) for name, values in measurements.items()},
        }
        if colours is not None:
            properties["color"] = [round(255 * float(part)) for part in colours[i]]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(space, f"{x},{y}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()
