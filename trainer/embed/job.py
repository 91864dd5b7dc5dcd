"""Embeddings: the tissue tiles of slides through a model, to one file a slide.

A batch of the model holds tiles of several slides where one has too few. Tiles stay in Ray's object store; the driver
sees embeddings alone and appends them to the slide's file, so that its memory does not grow with a slide.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataIterator

from streaming import cluster, storage
from streaming.catalog.idc import IdcOptions
from streaming.catalog.inspection import Rejected
from streaming.catalog.known import KnownSlides, known_slides
from streaming.catalog.schema import REJECTED_SCHEMA
from streaming.errors import ConfigError, SlideError
from streaming.progress import Pace, ProgressLine
from streaming.reading.batch import Batch
from trainer.embed.files import REJECTED, SUFFIXES, Embedded, open_writer
from trainer.embed.model import load_model, resolve
from trainer.embed.options import EmbedOptions
from trainer.embed.stages import EmbedTiles, PlaceTiles, ReadTiles, TiledSlide
from trainer.run.placement import check_gpus

# Notes of finished slides, for formats whose files bear the slide's name alone.
DONE = ".done"
# Bytes that the driver gathers before it writes them: small pieces make slow files.
_PIECE = 32 << 20


@dataclass(frozen=True)
class EmbedReport:
    """What one run did."""

    slides: int
    skipped: int
    tiles: int
    rejected: list[Rejected]
    files: list[str]
    seconds: float
    """that they took"""
    tiles_per_s: float | None
    """once the first ones had come; None: all came at once"""


def name_of(info: storage.ObjectInfo) -> str:
    """A slide's file name without suffix."""
    return PurePosixPath(storage.name_of(info.uri)).stem


@dataclass(frozen=True)
class Job:
    """What is embedded by what, and where it goes."""

    source: str
    """of the model, as any process may use it"""
    digest: str
    """of the model"""
    out: str
    options: EmbedOptions
    stores: dict[str, Any]

    @property
    def settings(self) -> str:
        """All that decides what an embedding is."""
        options = self.options
        chosen = (options.mpp, options.size, options.min_tissue, options.token, options.products, options.tokens)
        return json.dumps([self.digest, *chosen])

    def marked(self, info: storage.ObjectInfo, made_by: str = "") -> str:
        """A slide's name, and a digest of its version, of how it is embedded, and of what else decides its tiles."""
        told = "\n".join([info.uri, info.version, self.settings, *([made_by] if made_by else [])])
        return f"{storage.shortened(name_of(info))}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def file(self, info: storage.ObjectInfo, made_by: str = "") -> str:
        """Where a slide's embeddings go. Readers of HDF5 look for a slide's name, those of Parquet for any file."""
        name = self.marked(info, made_by) if self.options.format == "parquet" else name_of(info)
        return storage.join(self.out, name + SUFFIXES[self.options.format])

    def check_names(self, slides: KnownSlides) -> None:
        """Refuses slides that would have the same file.

        Raises:
            ConfigError: naming it.
        """
        names = Counter(self.file(known.info) for known in slides.slides)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ConfigError(f"{twice[0]}: the file of several slides of one name; embed them to folders of their own")

    def note(self, info: storage.ObjectInfo, made_by: str = "") -> str | None:
        """Where it is noted that a file is of just this version and these settings, unless its name tells."""
        return None if self.options.format == "parquet" else storage.join(self.out, DONE, self.marked(info, made_by))

    def done(self, slides: KnownSlides) -> dict[int, str]:
        """The files of the slides, by number, that earlier runs have embedded just so."""
        files = set(storage.list_names(self.out, self.stores))
        notes = set(storage.list_names(storage.join(self.out, DONE), self.stores))
        found = dict[int, str]()
        for number, known in enumerate(slides.slides):
            for made_by in slides.may_be_made_by(number):
                file, note = self.file(known.info, made_by), self.note(known.info, made_by)
                if storage.name_of(file) in files and (note is None or storage.name_of(note) in notes):
                    found[number] = file
        return found

    def about(self, info: storage.ObjectInfo, found: TiledSlide) -> Embedded:
        """What a file says of its slide."""
        options = self.options
        return Embedded(
            slide=info.uri,
            name=name_of(info),
            width=found.width,
            height=found.height,
            slide_mpp=found.mpp,
            origin=found.origin,
            mpp=options.mpp,
            size=options.size,
            token=options.token,
            precision=options.products,
            model=self.source,
            model_sha256=self.digest,
        )

    def write(self, info: storage.ObjectInfo, pieces: Iterator[Batch]) -> tuple[str, int]:
        """Writes a slide's file when all its pieces came; returns where it is, and how many tiles it has.

        Raises:
            SlideError: why it has none.
            StorageError: it can't be written.
        """
        pieces, written = gathered(pieces), 0
        first = next(pieces)
        _refuse(first)
        slide = TiledSlide(**json.loads(first["note"][0]))
        with (
            storage.written_file(partial(self.file, info, slide.made_by), self.stores) as path,
            open_writer(self.options.format, path, self.about(info, slide)) as writer,
        ):
            for piece in itertools.chain([first], pieces):
                _refuse(piece)
                writer.append(np.stack([piece["x"], piece["y"]], axis=1), piece["embedding"], piece.get("tokens"))
                written += len(piece["x"])
            assert written == slide.num_tiles, "each tile comes once"
        if note := self.note(info, slide.made_by):
            storage.write_bytes(note, self.settings.encode(), self.stores)
        return self.file(info, slide.made_by), written


def _refuse(piece: Batch) -> None:
    for reason in piece["reason"].tolist():
        if reason:
            raise SlideError(reason)


def gathered(pieces: Iterator[Batch]) -> Iterator[Batch]:
    """Joins batches of columns up to some size, so that files get large pieces."""
    held, nbytes = list[Batch](), 0
    for piece in pieces:
        held.append(piece)
        nbytes += sum(piece[name].nbytes for name in ("embedding", "tokens") if name in piece)
        if nbytes >= _PIECE:
            yield _joined(held)
            held, nbytes = [], 0
    if held:
        yield _joined(held)


def _joined(pieces: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def embed(
    model: str,
    sources: Sequence[str],
    out: str,
    options: EmbedOptions,
    storage_options: dict[str, Any] | None = None,
    idc: IdcOptions | None = None,
    *,
    verbose: bool = False,
) -> EmbedReport:
    """Embeds the tissue tiles of slides to `out`, a file a slide; slides done before are skipped.

    model is what `load_model` takes, sources what `known_slides` does. A file (Parquet: `NAME-DIGEST.parquet`, HDF5:
    `NAME.h5`; `trainer.embed.files` tells what is in it) appears when it is whole. Slides that can't be used are listed
    in `trainer.embed.files.REJECTED`, and taken off that list by the run that embeds them.

    Raises:
        CheckpointError: no usable model.
        ConfigError: two slides would have the same file, or this machine has too few GPUs.
        CatalogError: a source holds no slide.
        SlideError: no slide could be used.
        StorageError: something can't be reached.
    """
    if options.gpu:
        check_gpus("--gpu", options.models, "leave it out" if options.models == 1 else "leave it out or lower --models")
    stores = dict(storage_options or {})
    # Workers run in folders of their own, so a relative path would mean another place to them.
    found = resolve(model, stores)
    # What is wrong with the model is told before anything starts.
    job = Job(found, load_model(found, options=stores).digest, out, options, stores)
    slides = known_slides(sources, stores, idc, options.slide_mpp)
    job.check_names(slides)
    done = job.done(slides)
    todo = slides.some([number for number in range(len(slides)) if number not in done])
    made = _Made()
    try:
        if len(todo):
            _embed_all(job, todo, made, verbose=verbose)
    finally:
        # Also where an error or Ctrl-C is the end.
        embedded = {slides.slides[number].info.uri for number in done} | made.files.keys()
        keep_rejected(out, made.rejected, embedded, stores)
    if len(made.rejected) == len(slides):
        first = made.rejected[0]
        raise SlideError(f"{first.slide}: {first.reason} ({len(slides)} of {len(slides)} slides can't be embedded)")
    files = sorted([*done.values(), *made.files.values()])
    return EmbedReport(
        slides=len(made.files),
        skipped=len(done),
        tiles=made.tiles,
        rejected=made.rejected,
        files=files,
        seconds=made.seconds,
        tiles_per_s=made.tiles_per_s,
    )


@dataclass
class _Made:
    """What a run has done so far."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    """by slide"""
    tiles: int = 0
    rejected: list[Rejected] = field(default_factory=list[Rejected])
    seconds: float = 0.0
    tiles_per_s: float | None = None


def keep_rejected(out: str, rejected: Sequence[Rejected], embedded: Set[str], stores: dict[str, Any]) -> None:
    """Puts slides on the list of those that can't be embedded, and takes off it those that are."""
    uri = storage.join(out, REJECTED)
    if not rejected and not storage.exists(uri, stores):
        return
    now = pa.Table.from_pylist([vars(entry) for entry in rejected], schema=REJECTED_SCHEMA)
    storage.update_rows(uri, now, "slide", lambda slide: slide not in embedded, stores)


def _embed_all(job: Job, todo: KnownSlides, made: _Made, *, verbose: bool) -> None:
    """Embeds slides one after the other; notes in `made` what became of each."""
    options = job.options
    cluster.connect(options.readers[1] + options.models * options.model_cpus + 2, verbose=verbose)
    with ProgressLine("embed", "slides", total=len(todo)) as progress:
        began, pace = time.monotonic(), Pace()

        def told(done: float, tiles: int) -> None:
            made.seconds, made.tiles_per_s = time.monotonic() - began, pace.at(tiles) or made.tiles_per_s
            rate = f"  {made.tiles_per_s:,.0f} tiles/s" if made.tiles_per_s else ""
            progress.update(done, f"{tiles:,} tiles{rate}  {len(made.rejected)} rejected")

        def noted(pieces: Iterator[Batch], before: int) -> Iterator[Batch]:
            seen, num_tiles = 0, 1
            for piece in pieces:
                if note := piece["note"][0]:
                    num_tiles = TiledSlide(**json.loads(note)).num_tiles
                yield piece
                seen += len(piece["x"])
                told(before + min(1.0, seen / num_tiles), made.tiles + seen)

        by_slide = itertools.groupby(_pieces(job, todo), key=lambda piece: int(piece["slide"][0]))
        for before, (number, pieces) in enumerate(by_slide):
            info = todo.slides[number].info
            try:
                made.files[info.uri], num = job.write(info, noted(pieces, before))
                made.tiles += num
            except SlideError as error:
                reason = str(error).removeprefix(f"{info.uri}: ")
                made.rejected.append(Rejected(info.uri, info.size, info.version, reason))
            told(before + 1, made.tiles)


def _pieces(job: Job, todo: KnownSlides) -> Iterator[Batch]:
    """Embedded rows in the slides' order, each piece of one slide."""
    for batch in cast(Any, rows_of(job, todo)).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        cuts = np.flatnonzero(np.diff(batch["slide"])) + 1
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(batch["slide"])]):
            yield {name: column[start:stop] for name, column in batch.items()}


def rows_of(job: Job, todo: KnownSlides) -> DataIterator:
    """Slides → places, in blocks of one batch of the model whatever slide they are of → pixels → embeddings."""
    options = job.options
    # One copy a node, whatever large catalogs they are of.
    slides = ray.put(todo), options.tiles
    model = job.source, job.stores, options.token, options.products
    # Ray's types know no callable classes.
    place_tiles, read_tiles, embed_tiles = cast(Any, PlaceTiles), cast(Any, ReadTiles), cast(Any, EmbedTiles)
    dataset = (
        ray.data.range(len(todo), override_num_blocks=len(todo))
        .map_batches(place_tiles(*slides), batch_size=1, num_cpus=1, max_retries=3)
        .repartition(target_num_rows_per_block=options.batch, strict=True)
        .map_batches(
            read_tiles,
            fn_constructor_args=slides,
            batch_size=options.batch,
            compute=ActorPoolStrategy(
                min_size=options.readers[0],
                max_size=options.readers[1],
                # While one batch is decoded, the other's bytes are on their way.
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
        )
        .map_batches(
            embed_tiles,
            fn_constructor_args=model,
            fn_constructor_kwargs={"tokens": options.tokens, "gpu": options.gpu},
            batch_size=options.batch,
            compute=ActorPoolStrategy(
                size=options.models,
                # While one batch is computed, the other is on its way to the GPU; a CPU has one to compute.
                max_concurrent_calls_per_actor=2 if options.gpu else 1,
                enable_true_multi_threading=options.gpu,
            ),
            num_cpus=options.model_cpus,
            num_gpus=1 if options.gpu else 0,
        )
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    # A batch is a block whatever its size: Ray would cut those over 128 MiB.
    context.target_max_block_size = None
    # A split runs the pipeline in an actor: in this process Ray's core would print, for each pool of actors, an error
    # about their arguments (ray#53727) that concerns nobody here.
    (rows,) = dataset.streaming_split(1, equal=False)
    return rows
