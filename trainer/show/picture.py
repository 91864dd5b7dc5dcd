"""`tilestream picture`: which picture of which embeddings, and the files that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streaming import storage
from trainer.embed.feature_files import read_slides
from trainer.embed.files import SlideEmbeddings
from trainer.embed.table_slides import TableSlides
from trainer.show.class_scores import class_scores
from trainer.show.colours import Floats, principal_colours
from trainer.show.embedding_map import map_page
from trainer.show.gallery import gallery, neighbours
from trainer.show.options import PictureOptions
from trainer.show.overlays import heatmap, token_map
from trainer.show.qupath import geojson


def draw(
    sources: Sequence[str], out: str, options: PictureOptions, storage_options: storage.StorageOptions | None = None
) -> Iterator[str]:
    """Draws the embeddings that files and folders hold; gives the address of each file once it is written.

    Raises:
        ConfigError: there are no embeddings, or they don't suit the picture.
        TilestreamError: slides, dataset or model can't be read, or `out` can't be written.
    """
    slides = read_slides(sources, TableSlides(options.slides, storage_options), storage_options)
    if options.kind in ("neighbours", "map"):
        storage.write_bytes(out, _of_all(slides, options, storage_options), storage_options)
        yield out
        return
    for slide, content in zip(slides, _of_each(slides, options, storage_options), strict=True):
        suffix = ".geojson" if options.kind == "geojson" else f"-{options.kind}.png"
        uri = storage.join(out, storage.shortened(slide.about.name) + suffix)
        storage.write_bytes(uri, content, storage_options)
        yield uri


def _of_all(slides: list[SlideEmbeddings], options: PictureOptions, stores: storage.StorageOptions | None) -> bytes:
    bound = options.slides.max_upsampling
    if options.kind == "map":
        return map_page(
            slides,
            method=options.method,
            most=options.most,
            seed=options.seed,
            options=stores,
            max_upsampling=bound,
        )
    rows = neighbours(slides, options.queries, options.k, seed=options.seed, across=options.across)
    return gallery(slides, rows, stores, bound)


def _of_each(
    slides: list[SlideEmbeddings], options: PictureOptions, stores: storage.StorageOptions | None
) -> Iterator[bytes]:
    if options.kind == "tokens":
        yield from token_map(slides, stores)
        return
    scores: list[Floats] | None = None
    name = options.name or ""
    if options.dataset is not None:
        scores = class_scores(slides, options.dataset, name, TableSlides(options.slides, stores), stores)
    if options.kind == "heatmap" and scores is not None:
        for slide, score in zip(slides, scores, strict=True):
            yield heatmap(slide, score, name, stores)
        return
    colours, _ = principal_colours([slide.features for slide in slides])
    for i, (slide, colour) in enumerate(zip(slides, colours, strict=True)):
        measured = {f"PC {part + 1}": colour[:, part] for part in range(3)}
        if scores is not None:
            measured[f"probability of {name}"] = scores[i]
        yield geojson(slide, measured, colour)
