"""Files of slides' embeddings, ours and others': whose they are, of which slide, and what they hold.

| | slide | layout |
|---|---|---|
| tilestream, Parquet or HDF5 | as the file says | `trainer.embed.files` |
| TRIDENT, HDF5 | the file's name | `features` (n, D) or (1, n, D), `coords` with attributes (wsi_objects/WSI.py) |
| CLAM, HDF5 | the file's name | the same without attributes (CLAM, extract_features_fp.py) |
| LazySlide, zarr | the store's name | a table of `tables/` (AnnData), whose tiles are in `shapes/` (wsidata 0.12) |
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.known import keys
from streaming.errors import ConfigError
from trainer.embed.files import (
    ABOUT,
    STORE_S,
    SUFFIXES,
    Embedded,
    SlideEmbeddings,
    files_of_embeddings,
    listed,
    read_embeddings,
)
from trainer.embed.passes import check_finite
from trainer.embed.table_slides import TableSlides

Maker = Literal["tilestream", "TRIDENT", "CLAM", "LazySlide"]
# A table of a store, by any file of its values.
_TABLE = re.compile(rf"(.+{re.escape(STORE_S)})tables/([^/]+)(?=/X/)")


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A file of one slide's embeddings."""

    uri: str
    maker: Maker
    slide: str
    """its address; of others' files, its name"""
    num: int
    width: int
    """numbers of an embedding"""


def find_features(sources: Sequence[str], options: storage.StorageOptions | None = None) -> list[FeatureFile]:
    """The files of embeddings that files and folders hold; files of coordinates alone, as others write them, are none.

    Of a store of LazySlide each table is one, called by its address in the store.

    Raises:
        ConfigError: there is none, or one is broken.
        StorageError: a source can't be reached.
    """
    uris = listed(sources, options)
    tables = sorted({match[0] for uri in uris if (match := _TABLE.match(uri))})
    found = [one for uri in (*files_of_embeddings(uris), *tables) if (one := _look(uri, options)) is not None]
    if not found:
        raise ConfigError(f"{', '.join(sources)}: no file here holds embeddings; name what `tilestream embed` wrote")
    return found


def check_alike(source: str, files: Sequence[FeatureFile]) -> None:
    """Refuses files whose embeddings differ in width, which are of several models.

    Raises:
        ConfigError: naming one of each.
    """
    of_width = {file.width: file.uri for file in files}
    if len(of_width) > 1:
        named = " and ".join(f"of {width} numbers ({uri})" for width, uri in sorted(of_width.items()))
        raise ConfigError(f"{source}: embeddings {named}; embed all alike, or name those of one model")


def read_features(file: FeatureFile, options: storage.StorageOptions | None = None) -> NDArray[np.float32]:
    """The embeddings (n, D) of a file, and nothing else of it.

    Raises:
        ConfigError: it is broken, or some are not finite.
        StorageError: it can't be read.
    """
    with _opened(file.uri, options) as opened:
        if isinstance(opened, pq.ParquetFile):
            # Arrow's own threads may let go of the file when Python has ended, which aborts (`storage.read_table`).
            rows = cast(Any, opened.read(["embedding"], use_threads=False)["embedding"].combine_chunks())
            values = rows.flatten().to_numpy(zero_copy_only=False)
        else:
            values = opened["X" if file.maker == "LazySlide" else "features"][:]
        features = np.asarray(values, dtype=np.float32).reshape(file.num, file.width)
    check_finite(file.uri, features)
    return features


@contextmanager
def _opened(uri: str, options: storage.StorageOptions | None) -> Generator[Any]:
    try:
        if STORE_S in uri:
            yield _opened_table(uri)
            return
        with storage.reading(uri, options) as file:
            if uri.endswith(SUFFIXES["h5"]):
                with _hdf5(file) as opened:
                    yield opened
            else:
                yield pq.ParquetFile(file)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{uri}: no whole file of embeddings ({reason}); make it again, or take it away") from error


def _hdf5(file: BinaryIO) -> Any:
    """Opened; what is wrong with its content is told as that, not as the storage's fault."""
    try:
        return h5py.File(file)
    except OSError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _opened_table(uri: str) -> Any:
    if not storage.is_local(uri):
        raise ConfigError(f"{uri}: LazySlide's stores are read on this machine alone; copy it here")
    try:
        zarr: Any = importlib.import_module("zarr")
    except ImportError:
        raise ConfigError(f"{uri}: LazySlide's stores need zarr: pip install 'zarr>=3,<4'") from None
    return zarr.open_group(storage.local_path(uri), mode="r")


def _look(uri: str, options: storage.StorageOptions | None) -> FeatureFile | None:
    with _opened(uri, options) as opened:
        if STORE_S in uri:
            return _of_table(uri, opened)
        return _of_parquet(uri, opened) if isinstance(opened, pq.ParquetFile) else _of_hdf5(uri, opened)


def _of_parquet(uri: str, file: pq.ParquetFile) -> FeatureFile | None:
    num = file.metadata.num_rows
    if not num or not {"embedding", "slide"} <= set(file.schema_arrow.names):
        return None
    first = next(file.iter_batches(1, columns=["slide", "embedding"], use_threads=False))
    slide, width = str(first["slide"][0].as_py()), len(cast(Any, first["embedding"])[0])
    return FeatureFile(uri=uri, maker="tilestream", slide=slide, num=num, width=width)


def _of_hdf5(uri: str, file: Any) -> FeatureFile | None:
    if "features" not in file:
        return None
    shape = getattr(file["features"], "shape", ())  # which a group has not
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ConfigError(f"{uri}: features of shape {shape}; they are (tiles, numbers)")
    maker: Maker = "CLAM"
    slide = storage.name_of(uri)
    if ABOUT in file.attrs:
        maker, slide = "tilestream", Embedded.from_json(file.attrs[ABOUT]).slide
    elif "coords" in file and "patch_size_level0" in file["coords"].attrs:
        maker = "TRIDENT"
    return FeatureFile(uri=uri, maker=maker, slide=slide, num=shape[0], width=shape[1])


def _of_table(uri: str, table: Any) -> FeatureFile | None:
    values = table["X"]
    if not hasattr(values, "shape") or len(values.shape) != 2:
        return None  # sparse, as counts of genes are
    num, width = values.shape
    return FeatureFile(uri=uri, maker="LazySlide", slide=_store(uri)[1], num=num, width=width)


def _store(uri: str) -> tuple[str, str]:
    """The store of a table, and its name."""
    store = uri[: uri.rindex(STORE_S) + len(STORE_S) - 1]
    return store, storage.name_of(store).removesuffix(".zarr")


def read_slides(
    sources: Sequence[str], slides: TableSlides, options: storage.StorageOptions | None = None
) -> list[SlideEmbeddings]:
    """All that files and folders hold; the slides of others' files are looked for by name.

    Raises:
        ConfigError: there is none, one is broken, they differ in width, or the slide of another's file is not found.
        TilestreamError: something can't be read.
    """
    files = find_features(sources, options)
    check_alike(", ".join(sources), files)
    return [read_embeddings(f.uri, options) if f.maker == "tilestream" else _foreign(f, slides, options) for f in files]


def _foreign(file: FeatureFile, slides: TableSlides, options: storage.StorageOptions | None) -> SlideEmbeddings:
    """A file of TRIDENT or CLAM as ours.

    Raises:
        ConfigError: its slide is not known, or it has no coordinates.
        SlideError, StorageError: the slide can't be read.
    """
    if not slides.are_looked_for:
        raise ConfigError(
            f"{file.uri}: as {file.maker} writes them, which tells no slide's address; name a folder or catalog with "
            "its slide by --slides-in"
        )
    tiles = _tiles_of_store(file.uri) if file.maker == "LazySlide" else _tiles_of_hdf5(file, options)
    slide = slides.open(file.slide, None)
    try:
        (width, height), slide_mpp, bounds = slide.level_dimensions[0], slide.mpp, slide.bounds
    finally:
        slide.close()
    assert slide_mpp is not None, "it is opened with one"
    _check_places(file, tiles, width, height)
    embedded = Embedded(
        slide=slide.uri,
        name=keys(file.slide)[-1],
        width=width,
        height=height,
        slide_mpp=slide_mpp,
        origin=bounds[:2],
        mpp=tiles.extent * slide_mpp / tiles.size,
        size=tiles.size,
        token="cls",
        precision="32",
        model=tiles.encoder,
        model_sha256="",
    )
    return SlideEmbeddings(file.uri, embedded, tiles.corners, read_features(file, options), None)


def _check_places(file: FeatureFile, tiles: _Tiles, width: int, height: int) -> None:
    """Refuses tiles that are not one an embedding, or that lie beside the slide (width, height in level-0 px).

    Raises:
        ConfigError: what is wrong.
    """
    if len(tiles.corners) != file.num:
        raise ConfigError(f"{file.uri}: {file.num} embeddings and {len(tiles.corners)} coords; make it again")
    if min(tiles.extent, tiles.size) <= 0:
        raise ConfigError(f"{file.uri}: tiles of {tiles.extent:g} level-0 px and {tiles.size} px; make it again")
    beside = ((tiles.corners <= -tiles.extent) | (tiles.corners >= (width, height))).any(axis=1)
    if beside.any():
        x, y = tiles.corners[beside.argmax()].tolist()
        raise ConfigError(
            f"{file.uri}: {beside.sum():,} of {file.num:,} tiles lie beside the slide of {width} × {height} px (x {x}, "
            f"y {y}); is it of another slide called {keys(file.slide)[-1]}?"
        )


@dataclass(frozen=True)
class _Tiles:
    """What a file of others tells of its tiles."""

    corners: NDArray[np.int64]
    """(n, 2), level-0 px"""
    extent: float
    """level-0 px of a side"""
    size: int
    """px of a side"""
    encoder: str


def _tiles_of_hdf5(file: FeatureFile, options: storage.StorageOptions | None) -> _Tiles:
    with _opened(file.uri, options) as opened:
        corners = np.asarray(opened["coords"][:], dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(corners).all():
            raise ValueError("some coords are not finite")
        corners = corners.astype(np.int64)
        about, encoder = dict(opened["coords"].attrs), opened["features"].attrs.get("encoder", file.maker)
    extent = int(about.get("patch_size_level0", _step(corners)))
    return _Tiles(corners, extent, int(about.get("patch_size", extent)), str(encoder))


def _tiles_of_store(uri: str) -> _Tiles:
    """Those of a table's rows: its region names the shapes, its instances their numbers (SpatialData 0.7)."""
    with _opened(uri, None) as table:
        region, key = table.attrs["region"], table.attrs["instance_key"]
        instances = table["obs"][key][:]
    store = _store(uri)[0]
    shapes = pq.read_table(f"{storage.local_path(store)}/shapes/{region}/shapes.parquet", use_threads=False)
    numbers = shapes[key].to_numpy() if key in shapes.column_names else np.arange(len(shapes))
    order = np.argsort(numbers, kind="stable")
    at = order[np.searchsorted(numbers, instances, sorter=order).clip(max=len(numbers) - 1)]
    if not np.array_equal(numbers[at], instances):
        raise ConfigError(f"{uri}: some of its rows are of no tile in shapes/{region}; make the store again")
    bounds = shapely.bounds(shapely.from_wkb(shapes["geometry"].to_numpy(zero_copy_only=False)))[at]
    extent = float(np.median(bounds[:, 2] - bounds[:, 0]))
    with _opened(f"{store}/", None) as root:
        spec = root.attrs.get("tile_spec", {}).get(region, {})
    corners = np.rint(bounds[:, :2]).astype(np.int64)
    # LazySlide calls a table MODEL_TILES.
    encoder = storage.name_of(uri).removesuffix(f"_{region}")
    return _Tiles(corners, extent, int(spec.get("width", round(extent))), encoder)


def _step(corners: NDArray[np.int64]) -> int:
    """The least distance of tiles of a row or a column: their side, where they lie edge to edge; 1 of one tile."""
    steps = [np.diff(np.unique(axis)) for axis in corners.T]
    return int(min((step.min() for step in steps if len(step)), default=1))
