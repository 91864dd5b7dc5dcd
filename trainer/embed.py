"""Embeddings: the tissue tiles of slides on a grid, through a checkpoint's teacher, to one Parquet file a slide."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from streaming import cluster, storage
from streaming.catalog import Inspected
from streaming.catalog_job import Rejected, find_slides, inspect
from streaming.errors import CheckpointError, ConfigError, SlideError, StorageError
from streaming.progress import ProgressLine
from streaming.reader import SlidePool
from streaming.slide import Slide, Staging, open_slide
from streaming.tissue import CELL_UM, window_fraction
from trainer import checkpoint
from trainer.backbone import Backbone
from trainer.config import Config
from trainer.module import build_backbone

Token = Literal["cls", "patch", "cls+patch"]
REJECTED = "rejected.parquet"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Which tiles are embedded, and how."""

    mpp: float = 0.5
    """µm/px of the tiles"""
    size: int = 256
    """side of a tile in px; resized to what the backbone's patches divide"""
    min_tissue: float = 0.4
    """share of a tile's area that must be tissue"""
    token: Token = "cls"
    """class token, mean patch token, or one after the other"""
    batch: int = 64
    """tiles that the model sees at once"""
    readers: tuple[int, int] = (1, 2)
    """least and most reader actors"""
    models: int = 1
    """actors that hold the model"""
    gpu: bool = False
    """whether each of them takes a GPU"""
    slide_mpp: float | None = None
    """µm/px at level 0 of slides whose metadata has none"""

    def __post_init__(self) -> None:
        if not self.mpp > 0 or self.size < 1 or self.batch < 1 or self.models < 1:
            raise ConfigError(
                f"mpp {self.mpp}, size {self.size}, batch {self.batch}, models {self.models}: all above 0"
            )
        if not 0 < self.min_tissue <= 1:
            raise ConfigError(f"min_tissue is {self.min_tissue}; it is a share above 0 and up to 1")
        if self.token not in get_args(Token):
            raise ConfigError(f"token {self.token!r}; take one of {', '.join(get_args(Token))}")


@dataclass(frozen=True)
class EmbedReport:
    """What one run did."""

    slides: int
    skipped: int
    tiles: int
    rejected: list[Rejected]
    files: list[str]


def load_backbone(uri: str, options: storage.StorageOptions | None = None) -> tuple[Config, Backbone]:
    """The teacher's backbone of a checkpoint (a run's folder, or one of its step folders), and its configuration.

    Raises:
        CheckpointError: there is none, it is damaged, or its weights don't fit its configuration.
    """
    found = checkpoint.find(uri, options)
    config = checkpoint.read_config(found, options)
    state = checkpoint.load(found, options)
    backbone = build_backbone(config.model, config.augment.global_size, drop_path=0.0)
    prefix = "teacher.backbone."
    weights = {key.removeprefix(prefix): w for key, w in state["state_dict"].items() if key.startswith(prefix)}
    if not weights:
        raise CheckpointError(f"{found}: holds no teacher; name a checkpoint that `tilestream train` wrote")
    checkpoint.load_weights(backbone, weights, found)
    return config, backbone.eval()


def tissue_tiles(slide: Inspected, mpp: float, size: int, min_tissue: float) -> NDArray[np.int64]:
    """Level-0 corners (n, 2) of the tiles on a regular grid from the top-left that lie on the slide and on tissue."""
    row = slide.row
    extent = size * mpp / row.mpp
    xs = np.floor(np.arange(max(0, math.floor(row.width / extent))) * extent).astype(np.int64)
    ys = np.floor(np.arange(max(0, math.floor(row.height / extent))) * extent).astype(np.int64)
    corners = np.stack([a.ravel() for a in np.meshgrid(xs, ys)], axis=1)
    cell_px, zeros = CELL_UM / row.mpp, np.zeros(len(corners), dtype=np.int64)
    share = window_fraction(
        slide.grid.fraction.ravel(),
        zeros,
        zeros + row.tissue_rows,
        zeros + row.tissue_columns,
        corners[:, 1] / cell_px,
        corners[:, 0] / cell_px,
        size * mpp / CELL_UM,
    )
    return corners[share >= min_tissue]


class Embedder:
    """The model behind a batch of tiles; Ray Data keeps one in each actor."""

    def __init__(self, uri: str, storage_options: dict[str, Any], token: Token, gpu: bool) -> None:
        config, backbone = load_backbone(uri, storage_options)
        self._device = torch.device("cuda" if gpu else "cpu")
        self._backbone = backbone.to(self._device)
        self._mean = torch.tensor(config.augment.mean, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(config.augment.std, device=self._device).view(3, 1, 1)
        self._token: Token = token

    @torch.inference_mode()
    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings float32 (n, D), or (n, 2D) for class and patch token, of tiles uint8 (n, size, size, 3)."""
        # A copy: what comes from Ray's object store is read-only, which torch has no notion of.
        images = torch.from_numpy(tiles.copy()).to(self._device).permute(0, 3, 1, 2).float() / 255
        patch = self._backbone.patch_size
        side = max(patch, images.shape[-1] // patch * patch)
        if side != images.shape[-1]:
            images = torch.nn.functional.interpolate(
                images, size=(side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        tokens = self._backbone((images - self._mean) / self._std)
        mean_patch = tokens.patches.mean(dim=1)
        chosen = {"cls": [tokens.cls], "patch": [mean_patch], "cls+patch": [tokens.cls, mean_patch]}[self._token]
        return torch.cat(chosen, dim=1).float().cpu().numpy()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Replaces a row's tiles by their embeddings."""
        tiles = item.pop("tiles")
        return {**item, "embedding": self.embed(tiles) if len(tiles) else np.zeros((0, 1), np.float32)}


def _chunks(item: dict[str, Any], options: EmbedOptions, storage_options: dict[str, Any]) -> list[dict[str, Any]]:
    """A slide as rows of one model batch each: its tiles' corners, or why there are none."""
    info = storage.ObjectInfo(item["slide"], item["size"], item["version"])
    slide = inspect(info, options.slide_mpp, storage_options, Staging())
    base = {"slide": info.uri, "size": info.size, "version": info.version}
    nothing = {"chunk": 0, "num_chunks": 0, "slide_mpp": 0.0, "corners": np.zeros((0, 2), np.int64)}
    if isinstance(slide, Rejected):
        return [{**base, **nothing, "reason": slide.reason}]
    corners = tissue_tiles(slide, options.mpp, options.size, options.min_tissue)
    if not len(corners):
        reason = f"no {options.size} px tile at {options.mpp} µm/px has {options.min_tissue:.0%} tissue"
        return [{**base, **nothing, "reason": reason}]
    parts = [corners[i : i + options.batch] for i in range(0, len(corners), options.batch)]
    return [
        {**base, "chunk": i, "num_chunks": len(parts), "slide_mpp": slide.row.mpp, "corners": part, "reason": ""}
        for i, part in enumerate(parts)
    ]


class GridReader:
    """Reads the tiles of a row's corners; Ray Data keeps a pool of them apart from the models."""

    def __init__(self, options: EmbedOptions, storage_options: dict[str, Any]) -> None:
        self._options, self._storage_options = options, storage_options
        self._pool: SlidePool[tuple[storage.ObjectInfo, float]] = SlidePool(self._open)

    def _open(self, key: tuple[storage.ObjectInfo, float]) -> Slide:
        info, mpp = key
        return open_slide(info.uri, self._storage_options, mpp=mpp, expected=info)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """The row with `tiles` uint8 (n, size, size, 3), or with none and the reason."""
        options, corners = self._options, item["corners"]
        tiles = np.zeros((len(corners), options.size, options.size, 3), dtype=np.uint8)
        key = (storage.ObjectInfo(item["slide"], item["size"], item["version"]), item["slide_mpp"])
        try:
            begun = [self._pool.begin_tile(key, int(x), int(y), options.mpp, options.size) for x, y in corners]
            for finish, tile in zip(begun, tiles, strict=True):
                finish(tile)
        except (SlideError, StorageError) as error:
            return {**item, "tiles": tiles[:0], "corners": corners[:0], "reason": str(error)}
        return {**item, "tiles": tiles}


def output_file(out: str, info: storage.ObjectInfo, settings: str) -> str:
    """Where a slide's embeddings go: its name, and a digest of its version and of how it is embedded."""
    digest = hashlib.sha256(f"{info.uri}\n{info.version}\n{settings}".encode()).hexdigest()[:8]
    return storage.join(out, f"{PurePosixPath(storage.name_of(info.uri)).stem}-{digest}.parquet")


def embed(
    checkpoint_uri: str,
    sources: Sequence[str],
    out: str,
    options: EmbedOptions,
    storage_options: dict[str, Any] | None = None,
    *,
    verbose: bool = False,
) -> EmbedReport:
    """Embeds the tissue tiles of slides to `out`, a file `NAME-DIGEST.parquet` a slide; slides done before are skipped.

    Columns: `slide`, `x`, `y` (level-0 pixel of the tile's top-left corner), `mpp`, `size` and `embedding`. A file
    appears when it is whole. Slides that can't be used are listed in `rejected.parquet`.

    Raises:
        CheckpointError: no usable checkpoint.
        CatalogError: a source holds no slide.
        SlideError: no slide could be used.
        StorageError: something can't be reached.
    """
    stores = dict(storage_options or {})
    # Workers run in folders of their own, so a relative path would mean another place to them.
    found = checkpoint.find(storage.canonical(checkpoint_uri), stores)
    load_backbone(found, stores)  # what is wrong with it is told before anything starts
    model = checkpoint.read_meta(found, stores).sha256
    settings = json.dumps([model, options.mpp, options.size, options.min_tissue, options.token])
    slides = find_slides(sources, stores)
    files = {info.uri: output_file(out, info, settings) for info in slides}
    done = set(storage.list_names(out, stores))
    todo = [info for info in slides if storage.name_of(files[info.uri]) not in done]
    rejected: list[Rejected] = []
    tiles = 0
    if todo:
        cluster.connect(options.readers[1] + options.models + 2, verbose=verbose)
        with ProgressLine("embed", "slides", total=len(todo)) as progress:
            count = 0
            for num_tiles, finished in _embedded(found, todo, options, stores):
                tiles += num_tiles
                if isinstance(finished, Rejected):
                    rejected.append(finished)
                elif finished is not None:
                    storage.write_table(files[finished["slide"][0].as_py()], finished, stores)
                count += finished is not None
                progress.update(count, f"{tiles:,} tiles  {len(rejected)} rejected")
    if rejected:
        storage.write_table(
            storage.join(out, REJECTED), pa.Table.from_pylist([vars(entry) for entry in rejected]), stores
        )
    if len(rejected) == len(slides):
        first = rejected[0]
        raise SlideError(f"{first.slide}: {first.reason} ({len(rejected)} of {len(slides)} slides can't be embedded)")
    written = [files[info.uri] for info in slides if info.uri not in {entry.slide for entry in rejected}]
    return EmbedReport(len(todo) - len(rejected), len(slides) - len(todo), tiles, rejected, written)


def _embedded(
    found: str, todo: Sequence[storage.ObjectInfo], options: EmbedOptions, stores: dict[str, Any]
) -> Iterator[tuple[int, pa.Table | Rejected | None]]:
    """Tiles embedded since the last time, and the slide that this finished: its table, or why it has none.

    Slides in order, each as: inspected → corners of one model batch a row → tiles → embeddings.
    """
    items = [{"slide": info.uri, "size": info.size, "version": info.version} for info in todo]
    # Ray's types know neither callable classes nor rows of more than one form.
    reader, embedder, chunks_of = cast(Any, GridReader), cast(Any, Embedder), cast(Any, _chunks)
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(chunks_of, fn_args=(options, stores), num_cpus=1, max_retries=3)
        .repartition(target_num_rows_per_block=1)
        .map(
            reader,
            fn_constructor_args=(options, stores),
            compute=ActorPoolStrategy(min_size=options.readers[0], max_size=options.readers[1]),
            num_cpus=1,
        )
        .map(
            embedder,
            fn_constructor_args=(found, stores, options.token, options.gpu),
            compute=ActorPoolStrategy(size=options.models),
            num_cpus=1,
            num_gpus=1 if options.gpu else 0,
        )
    )
    dataset.context.execution_options.preserve_order = True
    # A split runs the pipeline in an actor: in this process Ray's core would print, for each pool of actors, an error
    # about their arguments (ray#53727) that concerns nobody here.
    (rows,) = dataset.streaming_split(1, equal=False)
    chunks: list[dict[str, Any]] = []
    for item in rows.iter_rows():
        chunks.append(item)
        finished: pa.Table | Rejected | None = None
        if len(chunks) >= item["num_chunks"]:
            reason = next((chunk["reason"] for chunk in chunks if chunk["reason"]), "")
            slide = item["slide"]
            finished = (
                Rejected(slide, item["size"], item["version"], reason.removeprefix(f"{slide}: "))
                if reason
                else _table(slide, chunks, options)
            )
            chunks = []
        yield len(item["corners"]), finished


def _table(slide: str, chunks: Sequence[dict[str, Any]], options: EmbedOptions) -> pa.Table:
    corners = np.concatenate([chunk["corners"] for chunk in chunks])
    embedding = np.concatenate([chunk["embedding"] for chunk in chunks]).astype(np.float32)
    n, width = embedding.shape
    return pa.table(
        {
            "slide": pa.array([slide] * n, pa.string()),
            "x": pa.array(corners[:, 0], pa.int64()),
            "y": pa.array(corners[:, 1], pa.int64()),
            "mpp": pa.array([options.mpp] * n, pa.float64()),
            "size": pa.array([options.size] * n, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), width),
        }
    )
